"""Ways to use a cluster's nodes, and what each of them makes of the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from disagglab.config import way as way_rules
from disagglab.config.schema import Lab, NodeSection
from disagglab.config.way_section import WaySection
from disagglab.predict import simulation, stepbudget
from disagglab.predict.breakeven import Cluster, Point
from disagglab.predict.engine import Request
from disagglab.predict.sharding import AllReduces, sharded
from disagglab.predict.simulation import Served

Kind = Literal["single", "replicated", "disaggregated", "sharded"]


@dataclass(frozen=True)
class Planned:
    """One way, as a forecast takes it. ``arm``: its name, as reports have it.

    ``nodes``: equal servers of the kind replicated; ``prefill_nodes``, ``decode_nodes``: of the kind
    disaggregated; ``ranks``: nodes of the one server of the kind sharded. The kind single is one node.
    ``step_tokens``, ``max_seqs``: max-num-batched-tokens and max-num-seqs of its servers, of those that
    prefill where roles differ; 0: one whole prompt a step, any number of sequences. ``decode_step_tokens``,
    ``decode_max_seqs``: of its decode nodes; 0: the same.
    """

    arm: str
    kind: Kind
    nodes: int = 2
    prefill_nodes: int = 1
    decode_nodes: int = 1
    step_tokens: int = 0
    decode_step_tokens: int = 0
    max_seqs: int = 0
    decode_max_seqs: int = 0
    ranks: int = 2

    @property
    def nodes_used(self) -> int:
        """Nodes that it occupies."""
        match self.kind:
            case "single":
                return 1
            case "replicated":
                return self.nodes
            case "disaggregated":
                return self.prefill_nodes + self.decode_nodes
            case "sharded":
                return self.ranks


def own(lab: Lab) -> tuple[Planned, ...]:
    """The arms of a lab's own settings: single, replicated, disaggregated.

    Raises:
        ConfigError: if a chunk budget or a number of sequences makes no sense.
    """
    kinds: tuple[Kind, ...] = ("single", "replicated", "disaggregated")
    return tuple(_planned(lab, one, one) for one in kinds)


def of_way(lab: Lab, section: WaySection) -> Planned:
    """A ``[[way]]`` of a lab file.

    Raises:
        ConfigError: if a chunk budget or a number of sequences makes no sense.
    """
    return _planned(way_rules.changed(lab, section), section.kind, section.arm)


def _planned(lab: Lab, kind: Kind, arm: str) -> Planned:
    """``lab``: as the way has it. Servers of one role are taken for equal; the first one's options count."""

    def budget(nodes: Sequence[NodeSection]) -> stepbudget.StepBudget:
        return stepbudget.of_lab(lab, nodes[0].args, ranks)

    ranks = way_rules.ranks(lab)
    if kind != "disaggregated":
        held = budget(lab.prefill or lab.nodes)
        return Planned(
            arm, kind, nodes=len(lab.nodes), step_tokens=held.tokens, max_seqs=held.sequences, ranks=ranks
        )
    prefill, decode = budget(lab.prefill), budget(lab.decode)
    return Planned(
        arm,
        kind,
        prefill_nodes=len(lab.prefill),
        decode_nodes=len(lab.decode),
        step_tokens=prefill.tokens,
        decode_step_tokens=decode.tokens,
        max_seqs=prefill.sequences,
        decode_max_seqs=decode.sequences,
    )


def cluster_of(
    cluster: Cluster, planned: Planned, reduces: AllReduces | None = None, fixed_s: float = 0.0
) -> Cluster:
    """The cluster with the nodes, limits and speeds of a way.

    Args:
        reduces: what tensor parallelism sends, for the kind sharded.
        fixed_s: part of a step's base that is not divided by the ranks.

    Raises:
        ValueError: if a sharded way comes without ``reduces``.
    """
    speeds = cluster.speeds
    if planned.kind == "sharded":
        if reduces is None:
            raise ValueError(f"{planned.arm}: what its ranks send one another is not known")
        speeds = sharded(speeds, planned.ranks, reduces, fixed_s)
    return replace(
        cluster,
        speeds=speeds,
        step_tokens=planned.step_tokens,
        sequences=planned.max_seqs,
        decode_step_tokens=planned.decode_step_tokens,
        decode_sequences=planned.decode_max_seqs,
        prefill_nodes=planned.prefill_nodes,
        decode_nodes=planned.decode_nodes,
    )


def serve(
    cluster: Cluster,
    planned: Planned,
    point: Point,
    arrivals_s: Sequence[float],
    reduces: AllReduces | None = None,
    fixed_s: float = 0.0,
) -> Served:
    """What a way makes of requests of one shape, each of them; the point's rate is not looked at.

    Args and errors: see :func:`serve_requests`.
    """
    return serve_requests(cluster, planned, simulation.alike(point, arrivals_s), reduces, fixed_s)


def serve_requests(
    cluster: Cluster,
    planned: Planned,
    requests: Sequence[Request],
    reduces: AllReduces | None = None,
    fixed_s: float = 0.0,
) -> Served:
    """What a way makes of requests, which may be of several lengths (a steady stream beside long prompts).

    Args:
        cluster: speeds of one node and of the link; its own nodes and limits are not looked at.
        reduces, fixed_s: see :func:`cluster_of`.

    Raises:
        ValueError: if a sharded way comes without ``reduces``.
    """
    its = cluster_of(cluster, planned, reduces, fixed_s)
    if planned.kind == "disaggregated":
        return simulation.by_roles(its, requests)
    return simulation.by_equals(its, planned.nodes if planned.kind == "replicated" else 1, requests)

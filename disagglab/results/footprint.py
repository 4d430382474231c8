"""What a way occupies: nodes and GPUs, and which of them prefill and decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from disagglab.config import way
from disagglab.config.schema import Lab, NodeSection
from disagglab.config.way_section import WaySection


@dataclass(frozen=True)
class Footprint:
    """``gpus``: of all its nodes, 0 on CPUs. ``prefill_gpus``, ``decode_gpus``: of each role; where a server
    does both, all of them. ``prefill``, ``decode``: names of the nodes of a role.
    """

    nodes: int
    gpus: int
    prefill_gpus: int
    decode_gpus: int
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()

    @classmethod
    def of(cls, nodes: Sequence[NodeSection]) -> Footprint:
        """Of a way whose every server prefills and decodes: single, replicated, sharded."""
        return cls.of_roles(nodes, nodes)

    @classmethod
    def of_roles(cls, prefill: Sequence[NodeSection], decode: Sequence[NodeSection]) -> Footprint:
        """Of a way whose roles are apart."""
        everyone = dict.fromkeys(node.name for node in [*prefill, *decode])
        return cls(
            len(everyone),
            _gpus([*prefill, *decode]),
            _gpus(prefill),
            _gpus(decode),
            tuple(node.name for node in prefill),
            tuple(node.name for node in decode),
        )

    @classmethod
    def of_way(cls, lab: Lab, one: WaySection | str) -> Footprint:
        """Of a way of a lab, or of a kind in the lab's own settings. Of a sharded way ``prefill`` and
        ``decode`` name its server, one a host, as its runs do.

        Raises:
            ValidationError: see :func:`disagglab.config.way.transport_of`.
        """
        kind = one if isinstance(one, str) else one.kind
        if isinstance(one, str):
            changed = way.sharded(lab) if kind == way.SHARDED else lab
        else:
            changed = way.changed(lab, one)
        match kind:
            case "single":
                return cls.of(changed.prefill[:1])
            case "disaggregated":
                return cls.of_roles(changed.prefill, changed.decode)
            case "sharded":
                return replace(cls.of(changed.nodes), nodes=len(lab.nodes))
        return cls.of(changed.nodes)

    @property
    def apart(self) -> bool:
        """Whether the roles have nodes of their own."""
        return self.prefill != self.decode


def _gpus(nodes: Iterable[NodeSection]) -> int:
    return len({(node.host, gpu) for node in nodes for gpu in node.gpus})

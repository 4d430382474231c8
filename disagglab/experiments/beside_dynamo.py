"""Dynamo beside the lab's own topologies: the same engines, the same traffic, and what is claimed of it.

Five arms: single, replicated and disaggregated on ``vllm serve`` behind vllm-router, and Dynamo's workers
behind its frontend, which takes them in turns (round robin) or by what their caches hold (KV). Every server
gets the same engine options, so the arms differ in who routes and in which program runs the engine, and in
one thing more: Dynamo's aggregated workers have no KV connector loaded, the others have one.

Random prompts with exact lengths show what the paths cost; there is nothing to find in a cache. What a router
that knows the caches is worth shows in conversations (disagglab/experiments/conversations.py).
"""

from __future__ import annotations

import dataclasses

from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.verdicts import pair_rows, verdict_rows
from disagglab.results.arm import MARK, Arm
from disagglab.results.gate import State
from disagglab.results.records import VerdictRow
from disagglab.serving.dynamo import parts
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, SINGLE_AGAIN, Topology

BESIDE = "beside-dynamo"  # of the lab's own topologies here: their engines have other options than elsewhere
TAG = f"{MARK}{BESIDE}"

DYNAMO_KV = f"dynamo-{parts.KV}"
DYNAMO_ROUND_ROBIN = f"dynamo-{parts.ROUND_ROBIN}"
# (baseline, candidate) beside what the lab's gates ask for
PAIRS = (
    (REPLICATED, DYNAMO_ROUND_ROBIN),
    (REPLICATED, DYNAMO_KV),
    (DYNAMO_ROUND_ROBIN, DYNAMO_KV),
    (REPLICATED, DISAGGREGATED),
)


def compared(lab: Lab, engines: Lab, short: bool) -> Lab:
    """The lab with the gates of its own arms whose requests fit into these engines; in short form those of
    one workload. Ways have other engines, so their gates, and those against the best, are not for here.

    Which one: the first in which several users wait for each answer, or else the first.
    """
    own = tuple(
        gate
        for gate in lab.gates
        if gate.candidate == DISAGGREGATED and gate.baseline in (None, SINGLE, REPLICATED)
    )
    lab = lab.model_copy(update={"gates": own})
    fitting = [one for one in lab.gated_workloads if one.tokens <= engines.model.max_model_len]
    several = [one for one in fitting if (one.concurrency or 0) > 1]
    kept = {one.name for one in ((several or fitting)[:1] if short else fitting)}
    return lab.model_copy(update={"gates": tuple(gate for gate in own if gate.workload in kept)})


def one_wave(workload: Workload) -> Workload:
    """The workload with no more requests than are under way at once, for the short form."""
    return workload.model_copy(update={"requests": workload.most_under_way})


def alternating(topology: Topology) -> Topology:
    """A round robin, of which the ledger then demands that it alternates."""
    return dataclasses.replace(topology, kind=REPLICATED)


def rows_of(comparison: Comparison, lab: Lab) -> list[VerdictRow]:
    """Verdicts on the workloads of the lab's gates: the gates, the A/A pairs, and the pairs of PAIRS that no
    gate asks for.

    Raises:
        InvalidRun: if a gate has no pair of valid runs.
    """
    named = Comparison(
        [dataclasses.replace(run, topology=untagged(run.topology)) for run in comparison.runs],
        comparison.slo,
    )
    gated = verdict_rows(named, lab)
    asked = {(row.workload, row.metric, row.baseline, row.candidate) for row in gated}
    others = [
        row
        for row in pair_rows(named, lab, PAIRS, State.BESIDE)
        if (row.workload, row.metric, row.baseline, row.candidate) not in asked
    ]
    return [
        dataclasses.replace(row, candidate=tagged(row.candidate), baseline=tagged(row.baseline))
        for row in (*gated, *others)
    ]


def tagged(arm: str) -> str:
    """The name of an arm as runs, figures and verdicts have it."""
    own = arm in (SINGLE, SINGLE_AGAIN, REPLICATED, DISAGGREGATED)
    return str(Arm(arm, BESIDE)) if own else arm


def untagged(name: str) -> str:
    """The name of an arm as a lab's gates have it; the reverse of :func:`tagged`."""
    arm = Arm.parse(name)
    return arm.name if arm.tag == BESIDE else name

"""Topologies measured in turns, round by round, and judged by the lab's gates."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from disagglab import ledger
from disagglab.errors import InvalidRun, TransferError
from disagglab.kv import KvShape
from disagglab.load import LoadEngine, Run, figures
from disagglab.section import GateSection, Lab
from disagglab.store import Store, VerdictRow
from disagglab.topology import DISAGGREGATED, SINGLE, SINGLE_AGAIN, Topology
from disagglab.verdict import Direction, gate_p, holm, judge, noise_floor, passes
from disagglab.workload import Workload

WARM_UP_ROUND = -1
METRICS: dict[str, tuple[str, Direction]] = {
    "ttft_p50": ("s", "lower"),
    "tpot_p50": ("s", "lower"),
    "itl_p99": ("s", "lower"),
    "e2e_p50": ("s", "lower"),
    "output_tokens_per_s": ("tokens/s", "higher"),
}


@dataclass
class Comparison:
    """All runs of one session's comparison, valid and invalid."""

    runs: list[Run] = field(default_factory=list)

    def valid(self, workload: str, topology: str) -> list[Run]:
        """The runs that count, by round."""
        found = [
            r
            for r in self.runs
            if r.workload.name == workload and r.topology == topology and r.invalid is None
        ]
        return sorted(found, key=lambda run: run.round)

    def invalid(self) -> list[Run]:
        """The runs that do not count; each carries its reason."""
        return [run for run in self.runs if run.invalid is not None]

    def values(self, workload: str, topology: str, metric: str) -> list[float]:
        """A run-level figure by round; runs with too few samples for it are left out."""
        found = (figures(run)[metric] for run in self.valid(workload, topology))
        return [value for value in found if value is not None]

    def pairs(self, workload: str, baseline: str, candidate: str, metric: str) -> list[tuple[float, float]]:
        """(baseline, candidate) of every round in which both runs are valid."""
        rounds = {run.round: figures(run)[metric] for run in self.valid(workload, baseline)}
        pairs = []
        for run in self.valid(workload, candidate):
            left, right = rounds.get(run.round), figures(run)[metric]
            if left is not None and right is not None:
                pairs.append((left, right))
        return pairs


def measure(
    engine: LoadEngine,
    topology: Topology,
    workload: Workload,
    seed: int,
    number: int,
    shape: KvShape,
    version: str,
) -> Run:
    """One run with its proof of path. A run that breaks a rule comes back with ``invalid`` set, never
    dropped.
    """
    run: Run | None = None
    try:
        before = ledger.read(topology)
        run = engine.run(topology, workload, seed, number)
        after = ledger.settle(topology, before, len(run.sent))
        return dataclasses.replace(
            run, ledger=ledger.prove(topology, before, after, run.sent, shape, version)
        )
    except (InvalidRun, TransferError) as error:
        if run is None:
            run = Run(topology.name, workload, seed, number, "", 0.0, 0.0, (), (), (), (), ())
        return dataclasses.replace(run, invalid=str(error))


def run_rounds(
    engine: LoadEngine,
    topologies: Sequence[Topology],
    workloads: Sequence[Workload],
    rounds: int,
    store: Store,
    shape: KvShape,
    version: str,
    progress: Callable[[str], None],
    cap: int = 0,
    open_workloads: Callable[[Comparison], Container[str]] = lambda _: (),
) -> Comparison:
    """Warm every topology up, then measure all of them in every round.

    Within a round all topologies get the same prompts; the order is mirrored every other round, so that slow
    drift of the machine cancels; between rounds the prompts change. ``cap``: fixed beforehand; up to so many
    rounds are made of the workloads that ``open_workloads`` names when the planned ones are over.
    """
    comparison = Comparison()
    widest = max(workloads, key=lambda workload: workload.concurrency)
    warm_up = widest.model_copy(update={"requests": widest.concurrency})
    for topology in topologies:
        progress(f"warm-up, {topology.name}")
        run = measure(engine, topology, warm_up, random.getrandbits(31), WARM_UP_ROUND, shape, version)
        store.add_run(run)
        if run.invalid is not None:  # a warm-up never counts, but one that broke is shown
            comparison.runs.append(run)
    for number in range(max(rounds, cap)):
        order = list(topologies) if number % 2 == 0 else list(reversed(topologies))
        still_open = open_workloads(comparison) if number >= rounds else {one.name for one in workloads}
        for workload in (one for one in workloads if one.name in still_open):
            seed = random.getrandbits(31)
            for topology in order:
                progress(f"round {number + 1} of {max(rounds, number + 1)}, {workload.name}, {topology.name}")
                run = measure(engine, topology, workload, seed, number, shape, version)
                store.add_run(run)
                comparison.runs.append(run)
    return comparison


def verdict_rows(comparison: Comparison, lab: Lab) -> list[VerdictRow]:
    """One row a gate of the lab, in its order, the family corrected by Holm; then the A/A pair of each
    figure.

    Raises:
        InvalidRun: if a gate has no pair of valid runs.
    """
    families = [_pairs(comparison, gate, gate.baseline, DISAGGREGATED) for gate in lab.gates]
    p_values = [
        gate_p(pairs, METRICS[gate.metric][1], gate.margin, gate.want)
        for gate, pairs in zip(lab.gates, families, strict=True)
    ]
    rows = [
        _row(comparison, gate, pairs, p)
        for gate, pairs, p in zip(lab.gates, families, holm(p_values), strict=True)
    ]
    return [*rows, *_identical_arms(comparison, lab)]


def undecided_workloads(comparison: Comparison, lab: Lab) -> set[str]:
    """Workloads with a gate that is neither met nor refuted yet: more rounds may decide it."""
    rows = verdict_rows(comparison, lab)[: len(lab.gates)]
    return {row.workload for row in rows if row.outcome == "undecided" and not row.gate.startswith("met")}


def _pairs(
    comparison: Comparison, gate: GateSection, baseline: str, candidate: str
) -> list[tuple[float, float]]:
    pairs = comparison.pairs(gate.workload, baseline, candidate, gate.metric)
    if not pairs:
        raise InvalidRun(
            f"{gate.workload}: no valid pair of runs for {gate.metric}; see the invalid runs in the report"
        )
    return pairs


def _identical_arms(comparison: Comparison, lab: Lab) -> list[VerdictRow]:
    """The A/A pair beside every gated figure; what it shows is noise."""
    figures_gated = {(gate.workload, gate.metric): gate for gate in reversed(lab.gates)}
    rows = []
    for gate in reversed(figures_gated.values()):
        if comparison.values(gate.workload, SINGLE_AGAIN, gate.metric):
            pairs = _pairs(comparison, gate, SINGLE, SINGLE_AGAIN)
            rows.append(_row(comparison, gate, pairs, None, SINGLE, SINGLE_AGAIN))
    return rows


def _row(
    comparison: Comparison,
    gate: GateSection,
    pairs: Sequence[tuple[float, float]],
    p_adjusted: float | None,
    baseline: str = "",
    candidate: str = DISAGGREGATED,
) -> VerdictRow:
    unit, better = METRICS[gate.metric]
    baseline = baseline or gate.baseline
    values = {arm: comparison.values(gate.workload, arm, gate.metric) for arm in (baseline, candidate)}
    verdict = judge(pairs, better, gate.margin)
    identical = comparison.pairs(gate.workload, SINGLE, SINGLE_AGAIN, gate.metric)
    if p_adjusted is None:
        state = "A/A: identical arms"
    else:
        state = f"{'met' if passes(verdict, gate.want, p_adjusted) else 'not met'}: wants {gate.want}"
        if not state.startswith("met") and verdict.outcome == "undecided" and verdict.underpowered:
            state += ", underpowered"
        state += "" if gate.enforce else " (not enforced)"
    return VerdictRow(
        workload=gate.workload,
        metric=gate.metric,
        unit=unit,
        candidate=candidate,
        baseline=baseline,
        candidate_value=sum(values[candidate]) / len(values[candidate]),
        baseline_value=sum(values[baseline]) / len(values[baseline]),
        outcome=verdict.outcome,
        effect=verdict.effect,
        low=verdict.low,
        high=verdict.high,
        rounds=verdict.rounds,
        smallest_detectable=verdict.smallest_detectable,
        gate=state,
        reason=verdict.reason,
        noise_floor=noise_floor(identical) if identical else None,
        p_adjusted=p_adjusted,
        p_sign_flip=verdict.p_sign_flip,
    )

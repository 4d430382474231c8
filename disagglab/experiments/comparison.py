"""Topologies measured in turns, round by round, and judged by the lab's gates."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from disagglab.config.arrivals import MAIN, STEADY
from disagglab.config.schema import GateSection, Lab, SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments.rounds import WARM_UP_ROUND, Trial, runs, trials
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.results.arm import Arm
from disagglab.results.gate import GateState, State
from disagglab.results.metrics import figures
from disagglab.results.open_loop import saturated
from disagglab.results.records import FigureRow, Run, VerdictRow
from disagglab.results.run_folder import Store
from disagglab.serving.death import Died
from disagglab.serving.topology import DISAGGREGATED, SINGLE, SINGLE_AGAIN, Topology
from disagglab.stats.metric import METRICS, of_stream
from disagglab.stats.verdict import CONFIDENCE, NoiseFloor, gate_p, holm, judge, noise_floor, passes

LIMIT = "limit"  # in the place of a baseline, where a gate compares with a value of the lab file


@dataclass
class Comparison:
    """All runs of one session's comparison, valid and invalid; ``slo`` decides which requests were good.

    ``died``: what ended it before its last round.
    """

    runs: list[Run] = field(default_factory=list)
    slo: SloSection | None = None
    died: Died | None = None

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

    def values(self, workload: str, topology: str, metric: str, stream: str = "") -> list[float]:
        """A run-level figure by round; runs that do not have it (too few samples) are left out."""
        found = (figures(run, self.slo, stream)[metric] for run in self.valid(workload, topology))
        return [value for value in found if value is not None]

    def pairs(
        self, workload: str, baseline: str, candidate: str, metric: str, stream: str = ""
    ) -> list[tuple[float, float]]:
        """(baseline, candidate) of every round in which both runs are valid, as a verdict takes them."""

        def value(run: Run) -> float | None:
            found = figures(run, self.slo, stream)[metric]
            return None if found is None else METRICS[metric].comparable(found, len(run.ttft_s))

        rounds = {run.round: value(run) for run in self.valid(workload, baseline)}
        pairs = []
        for run in self.valid(workload, candidate):
            left, right = rounds.get(run.round), value(run)
            if left is not None and right is not None:
                pairs.append((left, right))
        return pairs

    def saturated(self, workload: str, topology: str) -> int:
        """How many of the runs that count fell behind their arrivals."""
        return sum(saturated(run) for run in self.valid(workload, topology))


def run_rounds(
    engine: LoadEngine,
    topologies: Sequence[Topology],
    workloads: Sequence[Workload],
    rounds: int,
    store: Store,
    shape: KvShape,
    progress: Callable[[str], None],
    cap: int = 0,
    open_workloads: Callable[[Comparison], Container[str]] = lambda _: (),
    slo: SloSection | None = None,
    earlier: Sequence[Run] = (),
) -> Comparison:
    """Warm every topology up, then measure all of them in every round.

    See :func:`disagglab.experiments.rounds.turns` for order and prompts. ``cap``: fixed beforehand; up to so
    many rounds are made of the workloads that ``open_workloads`` names when the planned ones are over.
    ``earlier``: whole rounds of earlier sessions, numbered from 0 on for each workload; they come first and
    count among ``rounds``. A server that dies ends the rounds; what was measured before is returned.
    """
    comparison = Comparison(list(earlier), slo)
    done = {
        one.name: 1 + max((run.round for run in earlier if run.workload.name == one.name), default=-1)
        for one in workloads
    }
    warm_up = warm_up_of(workloads, max(topology.cycle for topology in topologies))
    first = [
        Trial(WARM_UP_ROUND, rounds, topology, warm_up, random.getrandbits(31)) for topology in topologies
    ]

    def wanted(number: int) -> list[Workload]:
        lacking = [one for one in workloads if done[one.name] <= number]
        still_open = open_workloads(comparison) if lacking and number >= rounds else done
        return [one for one in lacking if one.name in still_open]

    all_turns = trials(topologies, wanted, rounds, lambda *_: random.getrandbits(31), cap)
    try:
        for run in runs(engine, first, shape, store, progress, named=lambda _: ""):
            if run.invalid is not None:  # a warm-up never counts, but one that broke is shown
                comparison.runs.append(run)
        for run in runs(engine, all_turns, shape, store, progress):
            comparison.runs.append(run)
    except Died as died:
        comparison.died = died
    return comparison


def figure_rows(comparison: Comparison) -> list[FigureRow]:
    """Every run-level figure of every arm on every workload that was measured."""
    rows = []
    for workload in dict.fromkeys(run.workload for run in comparison.runs if run.round != WARM_UP_ROUND):
        streams = ["", MAIN, STEADY] if workload.steady else [""]
        for arm in dict.fromkeys(run.topology for run in comparison.runs):
            for stream in streams:
                for metric in METRICS.values():
                    values = comparison.values(workload.name, arm, metric.name, stream)
                    if values:
                        name = of_stream(metric.name, stream)
                        found = (workload.name, arm, name, metric.unit, metric.better, tuple(values))
                        rows.append(FigureRow(*found, workload.definition))
    return rows


def warm_up_of(workloads: Sequence[Workload], least: int = 1) -> Workload:
    """As many requests at once as the fullest of the workloads can have; it gets prompts of its own.

    Args:
        least: requests that it has in any case, so that every pair of nodes has met before it is measured.
    """
    fullest = max(workloads, key=lambda workload: workload.most_under_way)
    count = max(fullest.most_under_way, least)
    return fullest.model_copy(
        update={
            "requests": count,
            "concurrency": count,
            "rate_per_s": None,
            "steady": None,
            "shared_prefix_tokens": 0,
        }
    )


def verdict_rows(comparison: Comparison, lab: Lab) -> list[VerdictRow]:
    """One row a gate of the lab, in its order, the family corrected by Holm; then the A/A pair of each
    figure.

    A comparison that a death ended has no row for a gate that it did not come to, which stays in the family.

    Raises:
        InvalidRun: if a gate has no pair of valid runs, and no death was the reason.
    """
    families = [_pairs(comparison, gate, gate.baseline or LIMIT, DISAGGREGATED) for gate in lab.gates]
    p_values = [
        gate_p(pairs, METRICS[gate.metric].better, gate.margin, gate.want) if pairs else 1.0
        for gate, pairs in zip(lab.gates, families, strict=True)
    ]
    rows = [
        _row(comparison, gate, pairs, _P(alone, p, len(p_values)))
        for gate, pairs, alone, p in zip(lab.gates, families, p_values, holm(p_values), strict=True)
        if pairs
    ]
    return [*rows, *_identical_arms(comparison, lab)]


def version_rows(comparison: Comparison, lab: Lab, other: str) -> list[VerdictRow]:
    """One row a gated figure and topology that both releases were measured on, the lab's release against
    ``other``; then the A/A pairs.

    ``gate`` is WORSE where the lab's release is found worse, after Holm, and enforced as its gate is; what is
    undecided says so.

    Raises:
        InvalidRun: if a figure has no pair of valid runs.
    """
    asked = [(gate, kind) for gate in _by_figure(lab) for kind in (SINGLE, DISAGGREGATED)]
    families = [_pairs(comparison, gate, str(Arm(kind, other)), kind) for gate, kind in asked]
    verdicts = [
        judge(pairs, METRICS[gate.metric].better, gate.margin)
        for (gate, _), pairs in zip(asked, families, strict=True)
    ]
    adjusted = holm([verdict.p for verdict in verdicts])
    rows = []
    for (gate, kind), pairs, verdict, p in zip(asked, families, verdicts, adjusted, strict=True):
        row = _row(comparison, gate, pairs, _P(verdict.p, p, len(adjusted)), str(Arm(kind, other)), kind)
        if verdict.outcome in ("better", "equivalent"):
            state = GateState(State.NO_REGRESSION)
        elif verdict.outcome == "worse" and p <= 1 - CONFIDENCE:
            state = GateState(State.WORSE, enforced=gate.enforce)
        else:
            state = GateState(State.UNDECIDED, underpowered=verdict.underpowered)
        rows.append(dataclasses.replace(row, gate=state))
    return [*rows, *_identical_arms(comparison, lab)]


def variant_rows(comparison: Comparison, lab: Lab, variants: Sequence[str]) -> list[VerdictRow]:
    """One row a gated figure and variant (``disaggregated@tcp``), against the lab's own settings."""
    return pair_rows(comparison, lab, [(DISAGGREGATED, arm) for arm in variants], State.VARIANT)


def pair_rows(
    comparison: Comparison, lab: Lab, arms: Sequence[tuple[str, str]], state: State
) -> list[VerdictRow]:
    """One row a gated figure and pair of arms (baseline, candidate) that both have it.

    No gate hangs on them; ``state`` stands in its place. The p values are corrected by Holm as one family.
    """
    asked = [
        (gate, baseline, arm)
        for baseline, arm in arms
        for gate in {(gate.workload, gate.figure): gate for gate in lab.gates}.values()
        if comparison.pairs(gate.workload, baseline, arm, gate.metric, gate.stream)
    ]
    pairs = [comparison.pairs(g.workload, left, right, g.metric, g.stream) for g, left, right in asked]
    own = [gate.model_copy(update={"baseline": None, "limit": None}) for gate, _, _ in asked]
    verdicts = [
        judge(each, METRICS[g.metric].better, g.margin) for (g, _, _), each in zip(asked, pairs, strict=True)
    ]
    adjusted = holm([verdict.p for verdict in verdicts])
    rows = []
    for (_, baseline, arm), gate, each, verdict, p in zip(asked, own, pairs, verdicts, adjusted, strict=True):
        row = _row(comparison, gate, each, _P(verdict.p, p, len(adjusted)), baseline, arm)
        rows.append(dataclasses.replace(row, gate=GateState(state)))
    return rows


def undecided_workloads(comparison: Comparison, lab: Lab) -> set[str]:
    """Workloads with a gate that is neither met nor refuted yet: more rounds may decide it."""
    rows = verdict_rows(comparison, lab)[: len(lab.gates)]
    return {row.workload for row in rows if row.outcome == "undecided" and row.gate.state is not State.MET}


def _pairs(
    comparison: Comparison, gate: GateSection, baseline: str, candidate: str
) -> list[tuple[float, float]]:
    pairs = comparison.pairs(gate.workload, baseline, candidate, gate.metric, gate.stream)
    if gate.limit is not None:
        again = comparison.pairs(gate.workload, candidate, candidate, gate.metric, gate.stream)
        pairs = [(gate.limit, value) for _, value in again]
    if not pairs and comparison.died is None:
        raise InvalidRun(
            f"{gate.workload}: no valid pair of runs for {gate.figure}; see the invalid runs in the report"
        )
    return pairs


def _by_figure(lab: Lab) -> list[GateSection]:
    """One gate, the first, for every figure that is compared with a baseline."""
    found: dict[tuple[str, str], GateSection] = {}
    for gate in lab.gates:
        if gate.limit is None:
            found.setdefault((gate.workload, gate.figure), gate)
    return list(found.values())


def _identical_arms(comparison: Comparison, lab: Lab) -> list[VerdictRow]:
    """The A/A pair beside every gated figure; what it shows is noise."""
    rows = []
    for gate in _by_figure(lab):
        if comparison.values(gate.workload, SINGLE_AGAIN, gate.metric, gate.stream):
            if not (pairs := _pairs(comparison, gate, SINGLE, SINGLE_AGAIN)):
                continue
            rows.append(_row(comparison, gate, pairs, None, SINGLE, SINGLE_AGAIN))
    return rows


@dataclass(frozen=True)
class _P:
    """p of one hypothesis, alone and after Holm's correction over a family of so many."""

    alone: float
    adjusted: float
    family: int


def _floor(comparison: Comparison, gate: GateSection) -> NoiseFloor | None:
    """What the A/A pair leaves open of a gate's figure; None where none was measured."""
    pairs = comparison.pairs(gate.workload, SINGLE, SINGLE_AGAIN, gate.metric, gate.stream)
    if not pairs:
        return None
    requests = min(len(run.ttft_s) for run in comparison.valid(gate.workload, SINGLE))
    step = max(METRICS[gate.metric].step(value, requests) for pair in pairs for value in pair)
    return noise_floor(pairs, step)


def _row(
    comparison: Comparison,
    gate: GateSection,
    pairs: Sequence[tuple[float, float]],
    p: _P | None,
    baseline: str = "",
    candidate: str = DISAGGREGATED,
) -> VerdictRow:
    metric = METRICS[gate.metric]
    baseline = baseline or gate.baseline or LIMIT
    values = {
        arm: comparison.values(gate.workload, arm, gate.metric, gate.stream) for arm in (baseline, candidate)
    }
    if gate.limit is not None:
        values[LIMIT] = [gate.limit]
    verdict = judge(pairs, metric.better, gate.margin)
    late = sum(comparison.saturated(gate.workload, arm) for arm in values)
    reason = verdict.reason
    if late:
        counted = sum(len(comparison.valid(gate.workload, arm)) for arm in values)
        reason += f"; saturated: {late} of {counted} runs fell behind their arrivals"
    if p is None:
        state = GateState(State.IDENTICAL)
    else:
        met = passes(verdict, gate.want, p.adjusted)
        lacking = not met and verdict.outcome == "undecided" and verdict.underpowered
        state = GateState(State.MET if met else State.NOT_MET, gate.want, gate.enforce, lacking)
    return VerdictRow.of(
        verdict,
        workload=gate.workload,
        metric=gate.figure,
        unit=metric.unit,
        candidate=candidate,
        baseline=baseline,
        candidate_value=sum(values[candidate]) / len(values[candidate]),
        baseline_value=sum(values[baseline]) / len(values[baseline]),
        gate=state,
        reason=reason,
        saturated=late,
        floor=_floor(comparison, gate),
        p=p.alone if p else None,
        p_adjusted=p.adjusted if p else None,
        family=p.family if p else None,
    )

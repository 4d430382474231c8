"""Topologies measured in turns, round by round, and judged by the lab's gates."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from disagglab.config.arms import OWN, twin_of
from disagglab.config.arrivals import MAIN, STEADY
from disagglab.config.schema import GateSection, Lab, SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments.rounds import WARM_UP_ROUND, runs, trials
from disagglab.experiments.warming import warm_up
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.results.arm import Arm
from disagglab.results.gate import GateState, State
from disagglab.results.metrics import figures
from disagglab.results.open_loop import saturated
from disagglab.results.records import FigureRow, Run, VerdictRow
from disagglab.results.run_folder import Store
from disagglab.serving.death import Died
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, Topology
from disagglab.stats.metric import METRICS, of_stream
from disagglab.stats.rule import ANY_TIME, ORDER_DRAWN
from disagglab.stats.verdict import CONFIDENCE, NoiseFloor, Rule, gate_p, holm, judge, noise_floor, passes

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

    def arms(self, workload: str) -> list[str]:
        """The arms with a run of a workload that counts, in the order of their first."""
        found = (run for run in self.runs if run.workload.name == workload and run.round != WARM_UP_ROUND)
        return list(dict.fromkeys(run.topology for run in found if run.invalid is None))

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

    def of_pairs(
        self, workload: str, arms: Sequence[str], metric: str, stream: str = ""
    ) -> dict[str, list[float]]:
        """The figures of each arm in the rounds in which all of these arms have one."""
        by_arm = {
            arm: {run.round: figures(run, self.slo, stream)[metric] for run in self.valid(workload, arm)}
            for arm in arms
        }
        first, *others = by_arm.values()
        shared = [
            number
            for number, value in first.items()
            if value is not None and all(other.get(number) is not None for other in others)
        ]
        return {
            arm: [value for number in shared if (value := found[number]) is not None]
            for arm, found in by_arm.items()
        }

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

    def wanted(number: int) -> list[Workload]:
        lacking = [one for one in workloads if done[one.name] <= number]
        still_open = open_workloads(comparison) if lacking and number >= rounds else done
        return [one for one in lacking if one.name in still_open]

    all_turns = trials(topologies, wanted, rounds, lambda *_: random.getrandbits(31), cap)
    try:
        warm_up(engine, topologies, workloads, shape, store, progress, comparison.runs)
        for run in runs(engine, all_turns, shape, store, progress):
            comparison.runs.append(run)
    except Died as died:
        comparison.died = died
    return comparison


def figure_rows(comparison: Comparison) -> list[FigureRow]:
    """Every run-level figure of every arm on every workload that was measured."""
    rows = []
    measured = {run.workload.name: run.workload for run in comparison.runs if run.round != WARM_UP_ROUND}
    for workload in measured.values():
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


def verdict_rows(comparison: Comparison, lab: Lab, rule: Rule = "fixed-n") -> list[VerdictRow]:
    """One row a gate of the lab, in its order, the family corrected by Holm; then the A/A pair of each
    figure.

    ``rule``: what the verdicts hold for, see :func:`disagglab.stats.verdict.judge`. A comparison that a death
    ended has no row for a gate that it did not come to, which stays in the family.

    Raises:
        InvalidRun: if a gate has no pair of valid runs, and no death was the reason.
    """
    families = [_pairs(comparison, gate, gate.baseline or LIMIT, DISAGGREGATED) for gate in lab.gates]
    p_values = [
        gate_p(pairs, METRICS[gate.metric].better, gate.margin, gate.want, rule_of(gate, rule))
        if pairs
        else 1.0
        for gate, pairs in zip(lab.gates, families, strict=True)
    ]
    rows = [
        _row(comparison, gate, pairs, _P(alone, p, len(p_values)), rule=rule)
        for gate, pairs, alone, p in zip(lab.gates, families, p_values, holm(p_values), strict=True)
        if pairs
    ]
    return [*rows, *_identical_arms(comparison, lab, rule)]


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


def way_rows(
    comparison: Comparison, lab: Lab, ways: Sequence[str], rule: Rule = "fixed-n"
) -> list[VerdictRow]:
    """One row a gated figure and way (``disaggregated@tcp``), against the lab's own settings of its kind;
    a sharded one against the replicas.
    """
    kinds = {arm: Arm.parse(arm).name for arm in ways}
    pairs = [(kind if kind in OWN else REPLICATED, arm) for arm, kind in kinds.items()]
    return pair_rows(comparison, lab, pairs, State.WAY, rule)


def pair_rows(
    comparison: Comparison,
    lab: Lab,
    arms: Sequence[tuple[str, str]],
    state: State,
    rule: Rule = "fixed-n",
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
        judge(each, METRICS[g.metric].better, g.margin, rule)
        for (g, _, _), each in zip(asked, pairs, strict=True)
    ]
    adjusted = holm([verdict.p for verdict in verdicts])
    rows = []
    for (_, baseline, arm), gate, each, verdict, p in zip(asked, own, pairs, verdicts, adjusted, strict=True):
        row = _row(comparison, gate, each, _P(verdict.p, p, len(adjusted)), baseline, arm, rule)
        rows.append(dataclasses.replace(row, gate=GateState(state)))
    return rows


def undecided_workloads(comparison: Comparison, lab: Lab, rule: Rule = ANY_TIME) -> set[str]:
    """Workloads with a gate that is neither met nor refuted yet: more rounds may decide it."""
    rows = verdict_rows(comparison, lab, rule)
    return {row.workload for row in rows if row.gate.of_a_gate and row.open}


def gate_pairs(
    comparison: Comparison, gate: GateSection, baseline: str = "", candidate: str = DISAGGREGATED
) -> list[tuple[float, float]]:
    """(baseline, candidate) of every round that a gate can be judged by; the limit of one that has a limit
    stands in the place of its baseline.
    """
    if gate.limit is not None:
        again = comparison.pairs(gate.workload, candidate, candidate, gate.metric, gate.stream)
        return [(gate.limit, value) for _, value in again]
    left = baseline or gate.baseline or candidate
    return comparison.pairs(gate.workload, left, candidate, gate.metric, gate.stream)


def rule_of(gate: GateSection, rule: Rule) -> Rule:
    """The rule for one gate of a session: a limit is no arm, so no order of arms was drawn with it."""
    return ANY_TIME if gate.limit is not None and rule == ORDER_DRAWN else rule


def _pairs(
    comparison: Comparison, gate: GateSection, baseline: str, candidate: str
) -> list[tuple[float, float]]:
    pairs = gate_pairs(comparison, gate, baseline, candidate)
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


def _identical_arms(comparison: Comparison, lab: Lab, rule: Rule = "fixed-n") -> list[VerdictRow]:
    """The A/A pair beside every gated figure; what it shows is noise."""
    rows = []
    for gate in _by_figure(lab):
        arm = _twin(comparison, gate)
        if arm and (pairs := gate_pairs(comparison, gate, arm, twin_of(arm))):
            rows.append(_row(comparison, gate, pairs, None, arm, twin_of(arm), rule))
    return rows


def _twin(comparison: Comparison, gate: GateSection) -> str | None:
    """The arm whose twin was measured beside it: the gate's baseline, or else single."""
    for arm in (gate.baseline or SINGLE, SINGLE):
        if comparison.values(gate.workload, twin_of(arm), gate.metric, gate.stream):
            return arm
    return None


@dataclass(frozen=True)
class _P:
    """p of one hypothesis, alone and after Holm's correction over a family of so many."""

    alone: float
    adjusted: float
    family: int


def _floor(comparison: Comparison, gate: GateSection, rounds: int) -> NoiseFloor | None:
    """What the A/A pair leaves open of a gate's figure in so many rounds; None where none was measured."""
    arm = _twin(comparison, gate)
    pairs = comparison.pairs(gate.workload, arm, twin_of(arm), gate.metric, gate.stream) if arm else []
    if not arm or not pairs:
        return None
    requests = min(len(run.ttft_s) for run in comparison.valid(gate.workload, arm))
    step = max(METRICS[gate.metric].step(value, requests) for pair in pairs for value in pair)
    return noise_floor(pairs, step, rounds)


def _row(
    comparison: Comparison,
    gate: GateSection,
    pairs: Sequence[tuple[float, float]],
    p: _P | None,
    baseline: str = "",
    candidate: str = DISAGGREGATED,
    rule: Rule = "fixed-n",
) -> VerdictRow:
    metric = METRICS[gate.metric]
    baseline = baseline or gate.baseline or LIMIT
    values = comparison.of_pairs(gate.workload, (baseline, candidate), gate.metric, gate.stream)
    if gate.limit is not None:
        values = comparison.of_pairs(gate.workload, (candidate,), gate.metric, gate.stream)
        values[LIMIT] = [gate.limit]
    verdict = judge(pairs, metric.better, gate.margin, rule_of(gate, rule))
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
        floor=_floor(comparison, gate, verdict.rounds),
        p=p.alone if p else None,
        p_adjusted=p.adjusted if p else None,
        family=p.family if p else None,
    )

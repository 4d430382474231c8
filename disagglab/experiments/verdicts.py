"""Rows of the table of verdicts: a comparison judged by the lab's gates, and what stands beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.config.arms import OWN, baselines, twin_of, twinned
from disagglab.config.schema import GateSection, Lab
from disagglab.errors import InvalidRun
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.match import LIMIT, Match, between, match_of
from disagglab.results.arm import Arm
from disagglab.results.gate import GateState, State
from disagglab.results.records import VerdictRow
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE
from disagglab.stats.metric import METRICS
from disagglab.stats.rule import ANY_TIME, FIXED, Rule
from disagglab.stats.verdict import CONFIDENCE, NoiseFloor, holm, noise_floor, passes


def verdict_rows(comparison: Comparison, lab: Lab, rule: Rule = FIXED) -> list[VerdictRow]:
    """One row a gate of the lab, in its order, the family corrected by Holm; then the A/A pair of each
    figure.

    ``rule``: what the verdicts hold for, see :func:`disagglab.stats.verdict.judge`. A comparison that a death
    ended has no row for a gate that it did not come to, which stays in the family.

    Raises:
        InvalidRun: if a gate has no pair of valid runs, and no death was the reason.
    """
    matches = [match_of(comparison, gate) for gate in lab.gates]
    p_values = [match.p(rule) if _whole(comparison, match) else 1.0 for match in matches]
    rows = [
        _row(comparison, match, _P(alone, p, len(p_values)), rule)
        for match, alone, p in zip(matches, p_values, holm(p_values), strict=True)
        if match.whole
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
    matches = [
        between(comparison, gate, str(Arm(kind, other)), kind)
        for gate in _by_figure(lab)
        for kind in (SINGLE, DISAGGREGATED)
    ]
    for match in matches:
        _whole(comparison, match)
    verdicts = [match.judge(FIXED).verdict for match in matches]
    adjusted = holm([verdict.p for verdict in verdicts])
    rows = []
    for match, verdict, p in zip(matches, verdicts, adjusted, strict=True):
        gate, row = match.gate, _row(comparison, match, _P(verdict.p, p, len(adjusted)))
        if verdict.outcome in ("better", "equivalent"):
            state = GateState(State.NO_REGRESSION)
        elif verdict.outcome == "worse" and p <= 1 - CONFIDENCE:
            state = GateState(State.WORSE, enforced=gate.enforce)
        else:
            state = GateState(State.UNDECIDED, underpowered=verdict.underpowered)
        rows.append(dataclasses.replace(row, gate=state))
    return [*rows, *_identical_arms(comparison, lab)]


def way_rows(comparison: Comparison, lab: Lab, ways: Sequence[str], rule: Rule = FIXED) -> list[VerdictRow]:
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
    rule: Rule = FIXED,
) -> list[VerdictRow]:
    """One row a gated figure and pair of arms (baseline, candidate) that both have it.

    No gate hangs on them; ``state`` stands in its place. The p values are corrected by Holm as one family.
    """
    matches = [
        match
        for baseline, arm in arms
        for gate in {(gate.workload, gate.figure): gate for gate in lab.gates}.values()
        if (match := between(comparison, gate.model_copy(update={"baseline": None}), baseline, arm)).whole
    ]
    verdicts = [match.judge(rule).verdict for match in matches]
    adjusted = holm([verdict.p for verdict in verdicts])
    return [
        dataclasses.replace(
            _row(comparison, match, _P(verdict.p, p, len(adjusted)), rule), gate=GateState(state)
        )
        for match, verdict, p in zip(matches, verdicts, adjusted, strict=True)
    ]


def undecided_workloads(comparison: Comparison, lab: Lab, rule: Rule = ANY_TIME) -> set[str]:
    """Workloads with a gate that is neither met nor refuted yet: more rounds may decide it."""
    rows = verdict_rows(comparison, lab, rule)
    return {row.workload for row in rows if row.gate.of_a_gate and row.open}


def _whole(comparison: Comparison, match: Match) -> bool:
    """Whether a gate can be judged; False only where a death came before its first pair.

    Raises:
        InvalidRun: where no death is the reason that it cannot.
    """
    if not match.whole and comparison.died is None:
        gate, lacking = match.gate, ", ".join(match.lacking) or "any other way"
        raise InvalidRun(
            f"{gate.workload}: no valid pair of runs for {gate.figure} of {match.candidate} and {lacking};"
            " see the invalid runs in the report"
        )
    return match.whole


def _by_figure(lab: Lab) -> list[GateSection]:
    """One gate, the first, for every figure that is compared with a baseline."""
    found: dict[tuple[str, str], GateSection] = {}
    for gate in lab.gates:
        if gate.limit is None:
            found.setdefault((gate.workload, gate.figure), gate)
    return list(found.values())


def _identical_arms(comparison: Comparison, lab: Lab, rule: Rule = FIXED) -> list[VerdictRow]:
    """The A/A pair beside every gated figure; what it shows is noise."""
    rows = []
    for gate in _by_figure(lab):
        arm = _twin(comparison, gate)
        if arm and (match := between(comparison, gate, arm, twin_of(arm))).whole:
            rows.append(_row(comparison, match, None, rule))
    return rows


def _twin(comparison: Comparison, gate: GateSection) -> str | None:
    """The arm whose twin was measured beside it: the gate's baseline, of several any one, or else single."""
    measured = comparison.arms(gate.workload)
    for arm in (twinned(gate, measured), *baselines(gate, measured), SINGLE):
        if arm and comparison.values(gate.workload, twin_of(arm), gate.metric, gate.stream):
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


def _row(comparison: Comparison, match: Match, p: _P | None, rule: Rule = FIXED) -> VerdictRow:
    gate, candidate = match.gate, match.candidate
    metric = METRICS[gate.metric]
    found = match.judge(rule)
    verdict, baseline = found.verdict, found.baseline
    if gate.limit is None:
        values = comparison.of_pairs(gate.workload, (baseline, candidate), gate.metric, gate.stream)
    else:
        values = comparison.of_pairs(gate.workload, (candidate,), gate.metric, gate.stream)
        values[LIMIT] = [gate.limit]
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
        baseline=match.called(baseline),
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

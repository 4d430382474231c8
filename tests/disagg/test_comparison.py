"""Disaggregated serving beside both baselines, measured in turns.

Every run stands on its own proof of path; one that lacks it is kept, shown as invalid, and never aggregated.
The verdicts are computed from pairs of runs of the same round (disagglab/stats/verdict.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab.config.schema import GateSection, Lab
from disagglab.experiments.comparison import Comparison, figure_rows
from disagglab.pytest_plugin.session import Session
from disagglab.results.gate import State
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.topology import DISAGGREGATED, SINGLE_AGAIN, TOPOLOGIES
from disagglab.stats.metric import METRICS
from disagglab.stats.verdict import NO_SPREAD

pytestmark = pytest.mark.lab_has("gates")

ALWAYS_KNOWN = ("ttft_p50", "tpot_p50", "e2e_p50", "output_tokens_per_s")


@pytest.mark.parametrize("arm", TOPOLOGIES)
def test_gated_figure_of_each_arm(
    comparison: Comparison, live: Session, gate: GateSection, timing: Callable[..., None], arm: str
) -> None:
    """The figure that a gate compares, one value a round; times are in pytest-benchmark's table and storage.

    That table knows times alone, lower being better: throughput is stored as time per output token, and named
    so. A share is no time; it lies in ``extra_info`` of the times of its workload and arm, and in
    ``figures.jsonl`` like every figure.
    """
    if METRICS[gate.metric].needs_transfer and arm != DISAGGREGATED:
        pytest.skip(f"NO-SUCH-FIGURE: {gate.metric} is a figure of disaggregated serving alone")
    live.require_arms(arm)
    if live.budget_s is not None and arm not in comparison.arms(gate.workload):
        pytest.skip(f"NOT-COMPARED: no gate of {gate.workload} takes {arm}; --rounds N measures every arm")
    values = comparison.values(gate.workload, arm, gate.metric, gate.stream)
    assert values, f"{gate.workload} has too few samples a run for {gate.figure}; raise its requests"
    assert all(value >= 0 for value in values)
    times = METRICS[gate.metric].as_times(values)
    if times is not None:
        name, values_s = times
        shares = {
            metric.name: found
            for metric in METRICS.values()
            if metric.as_times(()) is None and (found := comparison.values(gate.workload, arm, metric.name))
        }
        timing(
            values_s,
            renamed=(gate.metric, name),
            metric=gate.figure,
            values=values,
            unit=METRICS[gate.metric].unit,
            workload=gate.workload,
            arm=arm,
            no_times=shares,
            command=comparison.valid(gate.workload, arm)[0].command,
        )


def test_figures_of_every_run_are_recorded(
    comparison: Comparison, live: Session, lab: Lab, record: Recorder
) -> None:
    """Every run-level figure of each arm on each workload, with the command.

    Of a workload with steady requests also theirs alone: what the arriving prompts do to them is the point.
    """
    rows = figure_rows(comparison)
    for row in rows:
        command = comparison.valid(row.workload, row.arm)[0].command
        record.numbers(f"{row.metric}, {row.workload}", row.values, row.unit, arm=row.arm, command=command)
    measured = [name for name in TOPOLOGIES if name in live.arms.kept]
    if live.budget_s is not None:
        measured = [
            arm for arm in measured if any(arm in comparison.arms(gate.workload) for gate in lab.gates)
        ]
    for gate in lab.gates:
        arms = [arm for arm in measured if arm in comparison.arms(gate.workload)]
        if gate.limit is not None:
            arms = [arm for arm in comparison.arms(gate.workload) if arm == gate.candidate]
        by_arm = {arm: comparison.values(gate.workload, arm, gate.metric, gate.stream) for arm in arms}
        record.plot(
            f"{gate.figure}, {gate.workload}",
            "round",
            METRICS[gate.metric].unit,
            {arm: (list(range(1, len(values) + 1)), values) for arm, values in by_arm.items()},
            style="points",
            caption="One point a run; within a round all topologies got the same prompts.",
        )
    found = {(row.workload, row.arm, row.metric) for row in rows}
    for workload in dict.fromkeys(gate.workload for gate in lab.gates):
        wanted = measured if live.budget_s is None else comparison.arms(workload)
        for arm in wanted:
            missing = [name for name in ALWAYS_KNOWN if (workload, arm, name) not in found]
            assert not missing, f"{workload}, {arm}: no values for {missing}"


def test_the_client_was_not_what_was_measured(comparison: Comparison, record: Recorder) -> None:
    """CPU share and event-loop lag of the load engine were watched in every run that counts.

    Each token's time stamp may be late by the lag of the client's event loop. A run whose client was busy for
    more than nine tenths of the time is invalid.
    """
    loads = [run.client for run in comparison.runs if run.invalid is None]
    assert loads
    seen = [load for load in loads if load is not None]
    assert len(seen) == len(loads), "the load engine was not watched in every run"
    record.numbers("CPU of the load engine / wall time", [load.cpu_share for load in seen], "share")
    record.numbers("event loop late by, p99 of a run", [load.lag_p99_s for load in seen], "s")
    record.numbers("event loop late by, most of a run", [load.lag_max_s for load in seen], "s")


def test_every_run_took_the_path_it_claims(comparison: Comparison) -> None:
    """No run of the comparison is invalid: counters agree with the client, bytes with arithmetic, split with
    the arm.
    """
    assert comparison.runs
    invalid = comparison.invalid()
    assert not invalid, (
        f"{len(invalid)} of {len(comparison.runs)} runs are invalid; first: {invalid[0].invalid}"
    )


def test_identical_arms_measure_the_noise(comparison: Comparison, live: Session, store: Store) -> None:
    """Single against itself gives every figure of a judged gate an A/A row, and a noise floor beside it."""
    live.require_arms(SINGLE_AGAIN)
    identical = [row for row in store.verdicts if row.gate.state is State.IDENTICAL]
    judged = live.arms.judged(live.lab).gates
    compared = {(gate.workload, gate.figure) for gate in judged if gate.limit is None}
    assert {(row.workload, row.metric) for row in identical} == compared
    beside = [row for row in store.verdicts if (row.workload, row.metric) in compared]
    seen = {(row.workload, row.metric): row.rounds for row in identical}
    for row in beside:
        if row.noise_floor is not None:
            assert row.noise_floor > 0
        elif seen[row.workload, row.metric] > 1:  # one round of identical arms has no spread
            assert row.floor_note == NO_SPREAD, f"{row.workload} {row.metric}: no noise floor"


def test_gates_of_the_lab(comparison: Comparison, live: Session, store: Store, gate: GateSection) -> None:
    """A gate that the lab file enforces is met; another is reported. One that lacks an arm is not judged."""
    live.require_gate(gate)
    judged = live.arms.judged(live.lab).gates
    gated = [row for row in store.verdicts if row.gate.of_a_gate]
    (row,) = (row for one, row in zip(judged, gated, strict=True) if one == gate)
    assert not row.gate.fails, (
        f"{row.workload} {row.metric}: {row.standing}; alone {row.outcome}, effect {row.effect:+.1%}"
        f" [{row.low:+.1%}, {row.high:+.1%}], {row.rounds} rounds"
    )

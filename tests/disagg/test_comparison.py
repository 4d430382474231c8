"""Disaggregated serving beside both baselines, measured in turns.

Every run stands on its own proof of path; one that lacks it is kept, shown as invalid, and never aggregated.
The verdicts are computed from pairs of runs of the same round (disagglab/verdict.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab.comparison import METRICS, Comparison
from disagglab.recorder import Recorder
from disagglab.section import GateSection, Lab
from disagglab.store import Store
from disagglab.topology import TOPOLOGIES


@pytest.mark.parametrize("arm", TOPOLOGIES)
def test_gated_figure_of_each_arm(
    comparison: Comparison, gate: GateSection, timing: Callable[..., None], arm: str
) -> None:
    """The figure that a gate compares, one value a round, in pytest-benchmark's table and storage.

    pytest-benchmark takes times, lower being better: throughput is stored as seconds per token.
    """
    unit, better = METRICS[gate.metric]
    values = comparison.values(gate.workload, arm, gate.metric)
    assert values, f"{gate.workload} has too few samples a run for {gate.metric}; raise its requests"
    timing(
        values if better == "lower" else [1 / value for value in values],
        metric=gate.metric,
        workload=gate.workload,
        arm=arm,
        unit=unit if better == "lower" else "s per token",
        command=comparison.valid(gate.workload, arm)[0].command,
    )


def test_figures_of_every_run_are_recorded(comparison: Comparison, lab: Lab, record: Recorder) -> None:
    """TTFT, TPOT, ITL, end-to-end time and throughput of each arm on each workload, with the command."""
    missing = []
    for workload in dict.fromkeys(gate.workload for gate in lab.gates):
        for metric, (unit, _) in METRICS.items():
            for arm in TOPOLOGIES:
                values = comparison.values(workload, arm, metric)
                if not values:  # too few samples for this percentile on this workload
                    missing.append((workload, metric, arm))
                    continue
                command = comparison.valid(workload, arm)[0].command
                record.numbers(f"{metric}, {workload}", values, unit, arm=arm, command=command)
    for gate in lab.gates:
        by_arm = {arm: comparison.values(gate.workload, arm, gate.metric) for arm in TOPOLOGIES}
        record.plot(
            f"{gate.metric}, {gate.workload}",
            "round",
            METRICS[gate.metric][0],
            {arm: (list(range(1, len(values) + 1)), values) for arm, values in by_arm.items()},
            style="points",
            caption="One point a run; within a round all topologies got the same prompts.",
        )
    assert {metric for _, metric, _ in missing} <= {"itl_p99"}, f"no values for {missing}"


def test_every_run_took_the_path_it_claims(comparison: Comparison) -> None:
    """No run of the comparison is invalid: counters agree with the client, bytes with arithmetic, split with
    the arm.
    """
    assert comparison.runs
    invalid = comparison.invalid()
    assert not invalid, (
        f"{len(invalid)} of {len(comparison.runs)} runs are invalid; first: {invalid[0].invalid}"
    )


def test_identical_arms_measure_the_noise(comparison: Comparison, store: Store, lab: Lab) -> None:
    """Single against itself gives every gated figure an A/A row, and a noise floor beside it."""
    identical = [row for row in store.verdicts if row.p_adjusted is None]
    assert {(row.workload, row.metric) for row in identical} == {(g.workload, g.metric) for g in lab.gates}
    assert all(row.noise_floor is not None and row.noise_floor >= 0 for row in store.verdicts)


def test_gates_of_the_lab(comparison: Comparison, store: Store, lab: Lab) -> None:
    """Every gate that the lab file enforces is met; the others are reported."""
    gated = [row for row in store.verdicts if row.p_adjusted is not None]
    failed = [
        row
        for gate, row in zip(lab.gates, gated, strict=True)
        if gate.enforce and row.gate.startswith("not met")
    ]
    assert not failed, "\n".join(
        f"{row.workload} {row.metric}: {row.gate}; {row.outcome}, effect {row.effect:+.1%}"
        f" [{row.low:+.1%}, {row.high:+.1%}], {row.rounds} rounds"
        for row in failed
    )

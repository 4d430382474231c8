"""Disaggregated serving beside both baselines, measured in turns.

Every run stands on its own proof of path; one that lacks it is kept, shown as invalid, and never aggregated.
The verdicts are computed from pairs of runs of the same round (disagglab/verdict.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab.comparison import METRICS, Comparison
from disagglab.lab import Lab
from disagglab.recorder import Recorder
from disagglab.store import Store
from disagglab.topology import TOPOLOGIES


@pytest.mark.parametrize("arm", TOPOLOGIES)
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_figures_of_each_arm(
    comparison: Comparison, lab: Lab, record: Recorder, timing: Callable[..., None], arm: str, metric: str
) -> None:
    """Run-level figures of one topology on every workload, one value a round, stored with their commands."""
    unit, better = METRICS[metric]
    stored: list[float] = []
    for workload in dict.fromkeys(gate.workload for gate in lab.gates):
        values = comparison.values(workload, arm, metric)
        if not values:
            continue  # too few samples for this percentile on this workload
        command = comparison.valid(workload, arm)[0].command
        record.numbers(f"{metric}, {workload}", values, unit, arm=arm, command=command)
        stored.extend(values if better == "lower" else [1 / value for value in values])
    assert stored, f"no workload of this lab has enough samples for {metric}"
    timing(stored, metric=metric, arm=arm, unit="s" if better == "lower" else "s per token")


def test_every_run_took_the_path_it_claims(comparison: Comparison) -> None:
    """No run of the comparison is invalid: counters agree with the client, bytes with arithmetic, split with
    the arm.
    """
    assert comparison.runs
    invalid = comparison.invalid()
    assert not invalid, (
        f"{len(invalid)} of {len(comparison.runs)} runs are invalid; first: {invalid[0].invalid}"
    )


def test_gates_of_the_lab(comparison: Comparison, store: Store, lab: Lab) -> None:
    """Every gate that the lab file enforces is met; the others are reported."""
    assert len(store.verdicts) == len(lab.gates)
    failed = [
        row
        for gate, row in zip(lab.gates, store.verdicts, strict=True)
        if gate.enforce and row.gate.startswith("not met")
    ]
    assert not failed, "\n".join(
        f"{row.workload} {row.metric}: {row.gate}; {row.outcome}, effect {row.effect:+.1%}"
        f" [{row.low:+.1%}, {row.high:+.1%}], {row.rounds} rounds"
        for row in failed
    )

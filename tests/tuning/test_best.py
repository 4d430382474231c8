"""Best against best: the tuned disaggregated way beside the best of all other tuned ways.

The baseline is picked by its figures, so it has had luck; the interval and p are those of a comparison with
the best of several (disagglab/stats/best.py), which pay for the pick. Rounds are starts: every way's servers
came up anew in each.
"""

from __future__ import annotations

import pytest

from disagglab.config.arms import BEST
from disagglab.experiments.campaign import Campaign
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store

from .conftest import Entered

pytestmark = [pytest.mark.lab_has("tuning", "slo"), pytest.mark.lab_has("gates")]


def test_gates_best_against_best(
    campaign: Campaign, entered: Entered, live: Session, store: Store, record: Recorder
) -> None:
    """Every gate of the tuned lab has a verdict; one that is enforced is met. Skipped with --short.

    With two rounds hardly anything is decided; three or more are for figures that matter.
    """
    if live.short:
        pytest.skip("SHORT: the workloads of the gates are measured in the full form")
    if not entered.lab.gates:
        pytest.skip("ARM-LEFT-OUT: no gate of the lab is about the ways of this session")
    rows = [row for row in store.verdicts if row.gate.of_a_gate]
    assert len(rows) == len(entered.lab.gates)
    for gate, row in zip(entered.lab.gates, rows, strict=True):
        if gate.baseline == BEST:
            assert row.baseline != row.candidate
        record.numbers(
            f"{row.metric}, {row.workload}, {row.candidate} / {row.baseline}",
            [1 + row.effect],
            "ratio",
            what="geometric mean",
            note=f"{row.outcome} [{row.low:+.1%}, {row.high:+.1%}], {row.rounds} rounds; {row.standing}",
        )
        assert not row.gate.fails, f"{row.workload} {row.metric}: {row.standing}"

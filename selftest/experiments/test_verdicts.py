"""Rows of gates against the best of all other ways, on made-up runs; others are in test_comparison."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from disagglab.errors import InvalidRun
from disagglab.experiments.trials import outlook, plan, with_outlook
from disagglab.experiments.verdicts import pair_rows, undecided_workloads, verdict_rows
from disagglab.results.gate import State
from disagglab.results.records import VerdictRow
from disagglab.results.report import effect_text, verdict_cells
from disagglab.stats.verdict import gate_p
from selftest.experiments.test_match import BEST, LAB, TIMES, TTFT, USER, compared

TUNED = BEST.model_copy(update={"candidate": "disaggregated@tuned", "enforce": True})


def gated(*gates: Any) -> Any:
    """The embedded lab with other gates."""
    return LAB.model_copy(update={"gates": gates})


def test_a_gate_against_the_best() -> None:
    """It names the baseline that was picked, with its value, and says of how many; p is the largest."""
    comparison = compared()
    row, *_ = verdict_rows(comparison, gated(BEST))
    assert (row.candidate, row.baseline, row.rounds) == ("disaggregated", "best: replicated@tuned", 3)
    assert row.baseline_value == pytest.approx((0.5 + 0.6 + 0.55) / 3)
    assert row.outcome == "worse"
    picked = ("replicated@tuned", "single", "replicated", "sharded")
    assert f"the best of 4 other ways ({', '.join(picked)})" in row.reason
    pairs = comparison.pairs(USER.name, "replicated@tuned", "disaggregated", "ttft_p50")
    assert row.p == gate_p(pairs, "lower", BEST.margin, BEST.want)
    assert row.gate.state is State.NOT_MET


def test_the_best_stands_in_the_family_of_gates() -> None:
    """Holm's correction takes it as any other; rows come in the order of the gates."""
    rows = [row for row in verdict_rows(compared(), gated(TTFT, TUNED, BEST)) if row.gate.of_a_gate]
    assert [row.baseline.partition(":")[0] for row in rows] == ["single", "best", "best"]
    assert [row.candidate for row in rows] == ["disaggregated", "disaggregated@tuned", "disaggregated"]
    assert {row.family for row in rows} == {3}
    (alone,) = [row for row in verdict_rows(compared(), gated(TTFT)) if row.gate.of_a_gate]
    assert rows[0].p == alone.p
    assert alone.p is not None
    assert rows[0].p_adjusted == pytest.approx(3 * alone.p)


def test_the_best_of_one_is_that_one() -> None:
    """With one other way the row is that of a gate which names it, but for the name."""
    times = {arm: TIMES[arm] for arm in ("single", "disaggregated")}
    (best,) = verdict_rows(compared(times), gated(BEST))
    (named,) = verdict_rows(compared(times), gated(TTFT))
    assert best.baseline == "best: single"
    assert dataclasses.replace(best, baseline="single") == named


def test_files_and_tables_hold_the_picked_name() -> None:
    """A row that is read again is the same, and says in words what was picked."""
    row, *_ = verdict_rows(compared(), gated(BEST))
    assert VerdictRow.from_json(row.as_json()) == row
    assert verdict_cells(row)["baseline"] == "best: replicated@tuned 0.55 s"
    open_above = dataclasses.replace(row, effect=0.5, low=0.1, high=float("inf"))
    assert effect_text(open_above) == "+50.0 % [+10.0 %, no upper limit yet]"
    assert effect_text(dataclasses.replace(open_above, low=-1.0)) == "+50.0 % [no limits yet]"


def test_the_noise_of_a_best_gate_is_that_of_the_replicas() -> None:
    """Their twin stands beside it, and has the A/A row."""
    times = {**TIMES, "replicated-again": (0.91, 1.02, 0.99)}
    row, identical = verdict_rows(compared(times), gated(BEST))
    assert (identical.candidate, identical.baseline) == ("replicated-again", "replicated")
    assert identical.gate.state is State.IDENTICAL
    assert row.noise_floor is not None


def test_where_another_way_has_the_twin_its_noise_counts() -> None:
    """Ways that take turns have one twin, that of the tuned replicas; it need not be the pick."""
    times = {arm: row for arm, row in TIMES.items() if arm != "single-again"}
    times["replicated@tuned-again"] = (0.52, 0.58, 0.57)
    row, identical = verdict_rows(compared(times), gated(BEST))
    assert (identical.candidate, identical.baseline) == ("replicated@tuned-again", "replicated@tuned")
    assert row.noise_floor is not None


def test_a_way_that_broke_is_named() -> None:
    """Its runs do not count, so the best is not known; after a death the gate has no row."""
    comparison = compared(broken=["sharded"])
    with pytest.raises(InvalidRun, match="of disaggregated and sharded; see the invalid runs"):
        verdict_rows(comparison, gated(BEST))
    with pytest.raises(InvalidRun, match="and any other way"):
        verdict_rows(compared({"disaggregated": (1.0, 1.0)}), gated(BEST))
    died: Any = object()
    comparison.died = died
    assert [row.baseline for row in verdict_rows(comparison, gated(BEST, TTFT)) if row.gate.of_a_gate] == [
        "single"
    ]


def test_rows_beside_the_gates_name_their_baseline() -> None:
    """Pairs that no gate asks for have one baseline, also where the figure's gate is against the best."""
    (row,) = pair_rows(compared(), gated(BEST), [("sharded", "single")], State.BESIDE)
    assert (row.candidate, row.baseline) == ("single", "sharded")


def test_an_open_gate_against_the_best_is_planned_for() -> None:
    """It has an outlook by all of its baselines, and its row the minutes that it would take."""
    times = {
        "single": (1.0, 1.1, 1.05, 0.95),
        "sharded": (1.05, 1.0, 1.1, 1.0),
        "disaggregated": (1.2, 1.0, 1.3, 1.05),
    }
    comparison, lab = compared(times), gated(BEST)
    assert undecided_workloads(comparison, lab) == {USER.name}
    found = outlook(comparison, BEST, list(times), is_open=True)
    alone = outlook(comparison, TTFT, list(times), is_open=True)
    assert found.rounds == 4
    assert found.needed is not None
    assert alone.needed is not None
    made = plan(comparison, lab, [USER], {USER.name: tuple(times)}, 0, 0)
    (row,) = with_outlook(verdict_rows(comparison, lab, "any time"), made)
    assert row.open
    assert row.gate.minutes is not None

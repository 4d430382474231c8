"""Figures of a frontier: their series by hand, and that each of them can be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from disagglab.results import frontier_plots, plot
from disagglab.results.price import Price
from disagglab.results.promise import NOTHING
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from selftest.results.rated import frontier, rated

MADE = frontier(
    {
        "replicated": {1.0: [10.0, 12.5], 2.0: [10.0, 10.1]},
        "disaggregated": {1.0: [5.0, 6.25], 2.0: [10.0, 10.0]},
    }
)


def test_rounds_and_their_means() -> None:
    """20 good requests in 10 and 12.5 s: 2 and 1.6, in the mean 1.8."""
    found = frontier_plots.by_rate(MADE, lambda run: run.good_per_s(MADE.promise))
    assert list(found) == ["replicated, rounds", "replicated", "disaggregated, rounds", "disaggregated"]
    xs, ys = found["replicated, rounds"]
    assert (xs, ys[:2]) == ([1.0, 1.0, 2.0, 2.0], [2.0, 1.6])
    assert found["replicated"][0] == [1.0, 2.0]
    assert found["replicated"][1][0] == 1.8


def test_tokens_per_user_and_per_gpu() -> None:
    """A TPOT of 50 ms is 20 tokens/s for each user; 220 tokens in 10 s on two GPUs are 11 for each."""
    found = frontier_plots.tokens(MADE)
    assert found["replicated, rounds"][0] == [20.0] * 4
    assert found["replicated, rounds"][1][0] == 11.0


def test_winners_by_limit() -> None:
    """Twice the goodput at 1/s, level at 2/s; every TPOT is 50 ms, which a limit of 50 ms lets pass."""
    found = frontier_plots.winners_by_limit(MADE)
    assert set(found) == {"disaggregated", "no way is ahead"}
    rates, limits = found["disaggregated"]
    assert set(rates) == {1.0}
    assert min(limits) == 0.05
    assert not frontier_plots.winners_by_limit(MADE.promising(NOTHING))


def test_the_report_has_numbers_and_figures(tmp_path: Path) -> None:
    """Every point has a row, and every figure is drawn as SVG."""
    store = Store.create(tmp_path, "run")
    frontier_plots.record(Recorder(store, "tuning", "test_frontier"), MADE)
    assert {(one.arm, one.name, one.values) for one in store.records} >= {
        ("replicated", "goodput at 1 requests/s", (2.0, 1.6)),
        ("disaggregated", "goodput at 1 requests/s", (4.0, 3.2)),
    }
    assert len(store.records) == 4
    assert [one.title for one in store.plots] == [
        "Goodput against offered rate",
        "p99 ITL against offered rate",
        "Tokens/s per user against tokens/s for the hardware",
        "Who is ahead, by load and promise",
    ]
    drawn = [plot.render(one) for one in store.plots]
    assert all(one.startswith("<svg") for one in drawn)
    assert "replicated" in drawn[0]
    assert "rounds" not in drawn[0].replace("are rounds", ""), "the key names the lines alone"
    assert "disaggregated, 2.00 times the goodput of replicated" in store.plots[0].caption


def test_cost_and_energy_are_axes(tmp_path: Path) -> None:
    """2 GPUs at 3.6 EUR an hour, 2 good requests/s: 0.001 EUR each; 440 J for 220 tokens."""
    runs = (rated("replicated", energy_j={"a": 220.0, "b": 220.0}),)
    priced = replace(MADE, runs=runs, price=Price(3.6, "gpu", "EUR"))
    store = Store.create(tmp_path, "run")
    frontier_plots.record(Recorder(store, "tuning", "test_frontier"), priced)
    spent = {one.y_label: one.series for one in store.plots if one.title.endswith("per user")}
    assert spent["J per output token"] == {"replicated": ((20.0,), (2.0,))}
    assert spent["EUR per good request"]["replicated"][1][0] == pytest.approx(0.001)
    assert spent["EUR per 1M output tokens"]["replicated"][1][0] == pytest.approx(0.002 / 22 * 1e6)


def test_what_no_run_has_is_not_drawn(tmp_path: Path) -> None:
    """Too few gaps for a p99, and no limit whose place on an axis could be changed."""
    runs = tuple(replace(run, itl_p99_s=None) for run in MADE.runs)
    store = Store.create(tmp_path, "run")
    recorder = Recorder(store, "tuning", "test_frontier")
    frontier_plots.record(recorder, replace(MADE, runs=runs, promise=NOTHING))
    assert [one.title for one in store.plots] == [
        "Goodput against offered rate",
        "Tokens/s per user against tokens/s for the hardware",
    ]

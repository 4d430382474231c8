"""The objective: more good requests, then a lower p99 gap, with the resolution of one request.

Numbers worked out by hand.
"""

from __future__ import annotations

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import SloSection
from disagglab.results.objective import Score, Seen, ranked, score, seen
from selftest.experiments.made import made_run

LAB = load_lab("embedded")
SLO = SloSection(ttft_s=1.0, tpot_s=0.15)


def of(good: int, duration_s: float = 10.0, itl_p99_s: float | None = 0.1) -> Score:
    """A score of one run of 12 requests."""
    return Score(1, good, 12, duration_s, itl_p99_s)


def test_more_good_requests_win_whatever_the_gaps() -> None:
    scores = {"few": of(7, itl_p99_s=0.01), "many": of(8, itl_p99_s=3.0)}
    assert ranked(scores, open_loop=True) == ["many", "few"]
    assert ranked(scores, open_loop=False) == ["many", "few"]


def test_of_equally_many_the_lower_gap_wins() -> None:
    """And one without a p99 comes last; of equals the first given is first."""
    scores = {"none": of(8, itl_p99_s=None), "high": of(8, itl_p99_s=0.3), "low": of(8, itl_p99_s=0.2)}
    assert ranked(scores, open_loop=True) == ["low", "high", "none"]
    assert ranked({"a": of(8), "b": of(8)}, open_loop=True) == ["a", "b"]
    assert ranked({"b": of(8), "a": of(8)}, open_loop=True) == ["b", "a"]
    assert ranked({}, open_loop=True) == []


def test_an_open_loop_is_judged_by_the_requests_it_was_sent() -> None:
    """The one whose last answer comes later has as many good requests, and lower gaps."""
    scores = {"short": of(8, 9.0, 0.3), "long": of(8, 11.0, 0.2)}
    assert ranked(scores, open_loop=True) == ["long", "short"]


def test_a_closed_loop_is_judged_by_requests_in_equal_times() -> None:
    """All 12 good: in the median 10 s 13.3, 12 and 10.9 requests. Less than one request apart, gaps decide:
    11.9 and 12.1 are both 12.
    """
    apart = {"slow": of(12, 11.0, 0.1), "mid": of(12, 10.0, 0.2), "fast": of(12, 9.0, 0.3)}
    assert ranked(apart, open_loop=False) == ["fast", "mid", "slow"]
    near = {"faster": of(12, 9.9, 0.3), "slower": of(12, 10.1, 0.2)}
    assert ranked(near, open_loop=False) == ["slower", "faster"]


def test_runs_are_taken_together() -> None:
    """12 of 24 good requests in 30 s are 0.4/s; p99 of 0.1 and 0.4 s: the geometric mean is 0.2 s."""
    both = score([Seen(8, 12, 10.0, 0.1, 12.0), Seen(4, 12, 20.0, 0.4, 22.0)])
    assert (both.runs, both.good, both.sent) == (2, 12, 24)
    assert both.good_per_s == pytest.approx(0.4)
    assert both.itl_p99_s == pytest.approx(0.2)
    assert score([Seen(0, 12, 10.0, None, 12.0)]).itl_p99_s is None
    with pytest.raises(ValueError, match="no run"):
        score([])


def test_a_run_as_it_is_seen() -> None:
    """made_run: TTFT as long as asked, TPOT the same over the tokens, gaps a tenth of it. Steady requests
    give the gaps where there are some.
    """
    workload = LAB.workload("long-prompts-into-steady-decode")
    good = seen(made_run("replicated", workload, 0, seconds=0.9, took_s=2.0), SLO)
    assert (good.good, good.sent) == (6, 6)
    assert good.itl_p99_s == pytest.approx(0.09)
    assert good.took_s == pytest.approx(good.duration_s + 2.0)
    late = seen(made_run("replicated", workload, 0, seconds=1.1), SLO)
    assert (late.good, late.sent) == (0, 6)
    with pytest.raises(ValueError, match="the run is invalid: lost"):
        seen(made_run("replicated", workload, 0, invalid="lost"), SLO)


def test_few_gaps_have_no_p99() -> None:
    """documents on this lab: 4 requests with 10 gaps each in a made run."""
    assert seen(made_run("single", LAB.workload("documents"), 0), SLO).itl_p99_s is None

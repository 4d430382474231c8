"""Stretches of rates and their words, on runs whose winner is known at each rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from disagglab.results.dominance import leaders, stretches, words
from disagglab.results.frontier import Frontier
from disagglab.results.promise import Promise
from disagglab.results.standing import ITL_P99, Place, standings
from selftest.results.rated import MANY, frontier, rated

NOISE = (1.01, 1.0, 0.99)


def rounds(goodput: float) -> list[float]:
    """How long runs take so that the arm has this share of 2 good requests/s, give or take 1 %."""
    return [10 / goodput * noise for noise in NOISE]


def made(disaggregated: Sequence[float], rates: Sequence[float] = (1.0, 3.0, 6.0, 9.0, 12.0)) -> Frontier:
    """Replicas with a goodput of 1 at each rate, exactly, and disaggregated serving with these."""
    return frontier(
        {
            "replicated": {rate: [10.0] * 3 for rate in rates},
            "disaggregated": {rate: rounds(share) for rate, share in zip(rates, disaggregated, strict=True)},
        },
        MANY,
    )


MADE = made([1.0, 1.3, 1.6, 1.4, 0.5])


def test_neighbouring_rates_of_one_answer() -> None:
    """Level, three rates ahead, then behind."""
    found = stretches(standings(MADE))
    assert [(one.winner, one.place, one.rates) for one in found] == [
        (None, Place.LEVEL, (1.0,)),
        ("disaggregated", Place.AHEAD, (3.0, 6.0, 9.0)),
        ("replicated", Place.AHEAD, (12.0,)),
    ]


def test_what_is_said() -> None:
    """Rates, promise, winner, ratios, the best other way, limits."""
    level, ahead, behind = words(MADE)
    assert level.startswith("at 1 requests/s at TTFT <= 1 s, TPOT <= 100 ms: level within 5 %: ")
    assert ahead.startswith(
        "between 3 and 9 requests/s (3 rates) at TTFT <= 1 s, TPOT <= 100 ms: disaggregated, 1.30 to 1.60"
        " times the goodput of replicated (the best other); 95 % limits of each rate within "
    )
    assert behind.startswith(
        "at 12 requests/s at TTFT <= 1 s, TPOT <= 100 ms: replicated, 2.00 times the goodput"
    )


def test_a_gap_between_two_wins_parts_them() -> None:
    """Ahead, level, ahead: two stretches, not one from end to end."""
    found = stretches(standings(made([1.5, 1.0, 1.5], (1.0, 2.0, 3.0))))
    assert [one.winner for one in found] == ["disaggregated", None, "disaggregated"]


def test_one_round_tells_nothing_apart() -> None:
    """The negative control of the words: the same means, and no winner."""
    once = replace(MADE, runs=tuple(run for run in MADE.runs if run.round == 1))
    (said,) = words(once)
    assert "not told apart" in said
    assert "disaggregated 1.60 times the goodput of replicated" in said
    assert said.endswith("one round has no band")


def test_a_win_of_little_use_is_said() -> None:
    """12, 13 and 11 of 20 against 3, 4 and 2: three times as many, and 60 % of those sent."""
    good = {"replicated": (3, 4, 2), "disaggregated": (12, 13, 11)}
    runs = tuple(rated(arm, 1.0, n, good=k) for arm, rounds in good.items() for n, k in enumerate(rounds))
    (said,) = words(replace(MADE, runs=runs))
    assert "disaggregated, 3" in said
    assert said.endswith("as few as 60 % of its requests are good")
    assert "as few as" not in words(MADE)[1]


def test_nothing_good_is_nothing_to_tell_apart() -> None:
    """Every request misses a TTFT of 0.1 s, however long the runs took."""
    (said,) = words(MADE.promising(Promise(ttft_s=0.1)))
    assert "not told apart" in said


def test_another_figure_has_no_promise() -> None:
    """p99 ITL is the same in all made runs."""
    (said,) = words(MADE, ITL_P99)
    assert said.startswith("between 1 and 12 requests/s (5 rates): level within 5 %: ")


def test_of_two_that_are_ahead_the_larger_leads() -> None:
    """Two settings of one kind are both ahead of the other kind."""
    tuned = tuple(
        replace(run, arm="disaggregated@tuned", duration_s=run.duration_s / 1.2)
        for run in MADE.runs
        if run.arm == "disaggregated"
    )
    both = replace(
        MADE,
        runs=MADE.runs + tuned,
        footprints={**MADE.footprints, "disaggregated@tuned": MADE.footprints["disaggregated"]},
    )
    found = {one.rate_per_s: one.arm for one in leaders(standings(both))}
    assert found[6.0] == "disaggregated@tuned"
    assert found[1.0] == "disaggregated@tuned", "1.2 times where the lab's own is level"
    assert found[12.0] == "replicated"


def test_a_way_that_was_not_measured_is_named() -> None:
    runs = tuple(run for run in MADE.runs if (run.arm, run.rate_per_s) != ("replicated", 12.0))
    single = tuple(
        replace(run, arm="single", duration_s=100.0) for run in MADE.runs if run.arm == "replicated"
    )
    said = words(replace(MADE, runs=runs + single))
    assert said[-1].endswith("not measured there: replicated")


def test_one_kind_alone_is_no_comparison() -> None:
    alone = replace(MADE, runs=tuple(run for run in MADE.runs if run.arm == "replicated"))
    assert words(alone) == ["nothing to compare: fewer than two kinds of ways have runs at the same rate"]

"""Where an arm stands against the best of the others: ratios by hand, bands of rounds, what is not there."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from disagglab.errors import InvalidRun
from disagglab.results.frontier import Frontier
from disagglab.results.standing import ITL_P99, Figure, Place, Standing, Terms, pairs, place_of, standings
from selftest.results.rated import FOOTPRINTS, frontier, rated

# Goodput is the inverse of these times: disaggregated 1.5 times replicated at 1/s, equal at 2/s, and at both
# twice of single. Rounds differ by a factor that all arms share, and by 1 % of their own.
LOG = 0.01
SHARED = (1.0, 1.3, 0.8)
OWN = (math.exp(LOG), 1.0, math.exp(-LOG))


def times(ratio: float) -> list[float]:
    return [10 / ratio * shared / own for shared, own in zip(SHARED, OWN, strict=True)]


def plain(ratio: float) -> list[float]:
    return [10 / ratio * shared for shared in SHARED]


MADE = frontier(
    {
        "single": {1.0: plain(0.5), 2.0: plain(0.5)},
        "replicated": {1.0: plain(1.0), 2.0: plain(1.0)},
        "disaggregated": {1.0: times(1.5), 2.0: times(1.0)},
    }
)


PACE = Figure("pace", "higher", lambda run: 1 / run.duration_s)  # the same ratios, and no count of requests


def at(rate: float, arm: str) -> Standing:
    (found,) = (one for one in standings(MADE, PACE) if (one.rate_per_s, one.arm) == (rate, arm))
    return found


def test_ahead_by_hand() -> None:
    """Log-ratios 0.01, 0 and -0.01 about ln 1.5: pooled over both rates a deviation of 0.01 with 4 degrees of
    freedom, t 2.776445 below and, for two rivals at half the level, 3.495406 above.
    """
    found = at(1.0, "disaggregated")
    assert (found.best, found.place, found.rounds, found.pooled) == ("replicated", Place.AHEAD, 3, True)
    assert found.ratio == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5 * math.exp(-2.776445 * LOG / math.sqrt(3)))
    assert found.high == pytest.approx(1.5 * math.exp(3.495406 * LOG / math.sqrt(3)))
    assert found.good_share == 1.0


def test_what_is_not_ahead() -> None:
    """The winner's rival is behind; equal ways are level within 5 %; at a margin of 0.1 % that is open."""
    assert at(1.0, "replicated").place is Place.BEHIND
    assert at(1.0, "replicated").ratio == pytest.approx(1 / 1.5)
    assert at(1.0, "single").best == "disaggregated"
    assert {at(2.0, arm).place for arm in ("replicated", "disaggregated")} == {Place.LEVEL}
    narrow = {one.place for one in standings(MADE, PACE, Terms(0.001)) if one.rate_per_s == 2.0}
    assert narrow == {Place.OPEN, Place.BEHIND}


def test_bands_of_a_rates_own_rounds_are_wider() -> None:
    """2 degrees of freedom: t 4.302653 in place of 2.776445."""
    (own,) = (
        one
        for one in standings(MADE, PACE, Terms(own_spread=True))
        if (one.rate_per_s, one.arm) == (1.0, "disaggregated")
    )
    assert not own.pooled
    assert own.low == pytest.approx(1.5 * math.exp(-4.302653 * LOG / math.sqrt(3)))


def test_one_round_is_no_band() -> None:
    """However large the difference."""
    found = standings(frontier({"replicated": {1.0: [10]}, "disaggregated": {1.0: [1]}}))
    assert {(one.place, one.low, one.high) for one in found} == {(Place.OPEN, 0.0, math.inf)}


def test_only_common_rounds_are_paired() -> None:
    """Round 1 of one arm is missing, as an invalid run is: two rounds are left."""
    runs = tuple(run for run in MADE.runs if (run.arm, run.round) != ("replicated", 1))
    found = pairs(replace(MADE, runs=runs))["disaggregated", "replicated"]
    assert [len(point) for point in found.pooled.points] == [2, 2]
    assert found.pooled.points[0] == pytest.approx((math.log(1.5) + LOG, math.log(1.5) - LOG))


def test_a_rival_that_is_not_there_is_named() -> None:
    """At 2/s replicated was not measured, so that nothing is said of it there."""
    runs = tuple(run for run in MADE.runs if (run.arm, run.rate_per_s) != ("replicated", 2.0))
    found = {(one.arm, one.rate_per_s): one for one in standings(replace(MADE, runs=runs))}
    assert found["disaggregated", 2.0].absent == ("replicated",)
    assert found["disaggregated", 2.0].best == "single"
    assert found["disaggregated", 1.0].absent == ()
    assert ("replicated", 2.0) not in found


def test_lower_is_better_for_itl() -> None:
    """Gaps of 20 ms against 50 ms: 2.5 times less."""
    runs = tuple(
        rated(arm, number=number, tpot_s=tpot_s)
        for arm, tpot_s in (("replicated", 0.05), ("disaggregated", 0.02))
        for number in range(3)
    )
    (ours,) = (one for one in standings(replace(MADE, runs=runs), ITL_P99) if one.arm == "disaggregated")
    assert ours.ratio == pytest.approx(2.5)
    assert ours.place is Place.AHEAD


def test_twins_are_not_judged() -> None:
    places = FOOTPRINTS | {"single-again": FOOTPRINTS["single"]}
    runs = (*MADE.runs, *(replace(run, arm="single-again") for run in MADE.runs if run.arm == "single"))
    found = standings(replace(MADE, footprints=places, runs=runs))
    assert {one.arm for one in found} == {"single", "replicated", "disaggregated"}
    assert found == standings(MADE)


def test_a_figure_of_zero_is_refused() -> None:
    runs = tuple(replace(run, itl_p99_s=0.0) for run in MADE.runs)
    with pytest.raises(InvalidRun, match="p99 ITL of round 0"):
        standings(replace(MADE, runs=runs), ITL_P99)


@pytest.mark.parametrize(
    ("low", "high", "place"),
    [
        (0.01, 0.2, Place.AHEAD),
        (0.01, 0.04, Place.LEVEL),
        (-0.04, 0.04, Place.LEVEL),
        (-0.01, 0.2, Place.OPEN),
        (-0.2, -0.01, Place.BEHIND),
        (-0.04, -0.01, Place.LEVEL),
    ],
)
def test_places(low: float, high: float, place: Place) -> None:
    """At a margin of 5 %, whose logarithm is 0.0488."""
    assert place_of(low, high, 0.05) is place


def counted(good: dict[str, dict[float, tuple[int, ...]]]) -> Frontier:
    runs = tuple(
        rated(arm, rate, number, good=k)
        for arm, rates in good.items()
        for rate, rounds in rates.items()
        for number, k in enumerate(rounds)
    )
    return replace(MADE, runs=runs)


def test_equal_counts_are_known_to_a_request_only() -> None:
    """15 and 14 of 20 in both of two rounds: log-ratios without any spread, and no win. The least variance is
    that of rounding each of both counts, 1 / 12 of a request; t with 1 degree of freedom is 12.706.
    """
    found = standings(counted({"replicated": {1.0: (14, 14)}, "disaggregated": {1.0: (15, 15)}}))
    (ours,) = (one for one in found if one.arm == "disaggregated")
    assert ours.place is Place.OPEN
    first, second = (20 * (2 * k + 0.5) / 41 for k in (14, 15))
    half = 12.7062 * math.sqrt((1 / first**2 + 1 / second**2) / 12 / 2)
    assert (ours.ratio, ours.low) == pytest.approx((15.5 / 14.5, 15.5 / 14.5 * math.exp(-half)), rel=1e-4)


def _told_apart(share: dict[float, float], of: int) -> float:
    """How often a band of two equal ways misses 1: ``of`` simulated frontiers of three rounds of 20 requests,
    each good with these chances by rate.
    """
    draw = random.Random(11)
    seen = 0
    for _ in range(of):
        good = {
            arm: {
                rate: tuple(sum(draw.random() < p for _ in range(20)) for _ in range(3))
                for rate, p in share.items()
            }
            for arm in ("replicated", "disaggregated")
        }
        found = standings(counted(good))
        seen += sum(one.place in (Place.AHEAD, Place.BEHIND) for one in found if one.arm == "replicated")
    return seen / of / len(share)


def test_equal_ways_are_seldom_told_apart() -> None:
    """From nearly all requests good to nearly none: by chance a band misses 1 in 20 times, here within twice
    that, since variances are looked at first (disagglab/stats/pooled.py).
    """
    assert _told_apart({1.0: 0.99, 3.0: 0.9, 6.0: 0.6, 9.0: 0.3, 12.0: 0.1}, 300) < 0.10


def test_a_win_in_overload_is_seen() -> None:
    """Few good requests make a noisy ratio; that a count of few is noisy is known, so the other rates tell by
    how much. 12 of 20 against 5 is a win, beside a rate at which all are good.
    """
    found = standings(
        counted(
            {
                "replicated": {1.0: (20, 19, 20), 3.0: (11, 13, 10), 6.0: (5, 4, 6)},
                "disaggregated": {1.0: (20, 20, 20), 3.0: (18, 16, 17), 6.0: (12, 13, 11)},
            }
        )
    )
    places = {one.rate_per_s: (one.place, one.pooled) for one in found if one.arm == "disaggregated"}
    assert places[3.0] == places[6.0] == (Place.AHEAD, True)
    assert places[1.0][0] is not Place.AHEAD

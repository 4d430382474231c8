"""The offset of a clock is an interval as wide as asking takes; the oracle is a clock that is set here."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.hosts import clock
from disagglab.hosts.clock import Offset


@pytest.mark.parametrize(
    ("low_s", "high_s", "answer"),
    [
        (-0.01, 0.01, "yes"),
        (0.02, 0.03, "yes"),  # outside of the round trip, as NTP leaves it
        (-0.5, 0.5, "yes"),
        (0.51, 0.6, "no"),
        (-9.0, -8.0, "no"),
        (0.4, 0.6, "unknown"),
        (-0.6, -0.4, "unknown"),
        (-2.0, 2.0, "unknown"),
    ],
)
def test_the_whole_interval_is_held_against_the_limit(low_s: float, high_s: float, answer: str) -> None:
    """All of it inside, all of it outside, or undecided."""
    assert Offset(low_s, high_s).within(0.5) == answer


def test_the_truth_lies_in_the_interval() -> None:
    """However long each way took, of a clock 0.2 s ahead that is asked at 10.0 and heard at 11.0."""
    for way_s in (0.0, 0.3, 1.0):
        offset = Offset.of(10.0, 10.0 + way_s + 0.2, 11.0)
        assert offset.low_s - 1e-9 <= 0.2 <= offset.high_s + 1e-9
        assert offset.round_trip_s == pytest.approx(1.0)
    assert str(Offset.of(10.0, 10.7, 11.0)) == "+0.2000 s ± 0.5000 s"


def test_the_quickest_reading_counts() -> None:
    """Four slow answers do not widen what a quick one has narrowed."""
    trips_s = [2.0, 1.0, 0.01, 3.0, 1.0]
    ours = itertools.accumulate([0.0, *itertools.chain.from_iterable((trip, 0.0) for trip in trips_s)])
    clocks = list(ours)
    moments = iter(clocks)
    asked = itertools.count()
    host: Any = SimpleNamespace(
        check_output=lambda _: f"{clocks[2 * next(asked)] + 0.03:.9f}"  # read as soon as it is asked
    )
    offset = clock.read(host, lambda: next(moments))
    assert offset.round_trip_s == pytest.approx(0.01)
    assert offset.within(clock.MOST_OFFSET_S) == "yes"
    assert [offset.low_s, offset.high_s] == pytest.approx([0.02, 0.03])

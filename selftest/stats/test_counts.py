"""The expected variance of a ratio of counts: by hand, and against simulated counts."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from disagglab.stats.counts import expected
from disagglab.stats.pooled import Expected, Pooled

DRAWS = 4000


def test_by_hand() -> None:
    """31 of 40 over two rounds is (31 + 1/2) / 41, so 15.366 of 20; 10 of 40 is 10.5 / 41, so 5.122 of 20."""
    found = expected([(15, 20), (16, 20)], [(4, 20), (6, 20)])
    ours, theirs = 31.5 / 41, 10.5 / 41
    assert found.weight == pytest.approx((1 - ours) / (20 * ours) + (1 - theirs) / (20 * theirs))
    assert found.resolution == pytest.approx((1 / 15.3659**2 + 1 / 5.12195**2) / 12, rel=1e-4)
    assert found.tells


@pytest.mark.parametrize(
    ("ours", "theirs", "tells"),
    [(20, 20, False), (20, 0, False), (0, 0, False), (19, 20, True), (20, 1, True)],
)
def test_all_good_and_none_good_tell_nothing(ours: int, theirs: int, tells: bool) -> None:
    found = expected([(ours, 20)] * 2, [(theirs, 20)] * 2)
    assert found.tells is tells
    assert found.weight > 0
    assert found.resolution > 0


def test_no_requests_are_refused() -> None:
    for rounds in ([], [(0, 0)]):
        with pytest.raises(ValueError, match="no request"):
            expected(rounds, [(1, 2)])


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.8), (0.5, 0.5), (0.3, 0.8)])
def test_the_variance_of_independent_requests(first: float, second: float) -> None:
    """Logs of counts of 50 requests, drawn: their variance is the weight within a fifth."""
    draw = random.Random(5)

    def count(p: float) -> int:
        return sum(draw.random() < p for _ in range(50))

    pairs = [(count(first), count(second)) for _ in range(DRAWS)]
    seen = statistics.variance(math.log((a + 0.5) / (b + 0.5)) for a, b in pairs)
    found = expected([(a, 50) for a, _ in pairs], [(b, 50) for _, b in pairs])
    assert seen == pytest.approx(found.weight, rel=0.2)


def test_rounds_are_weighed_by_what_is_expected() -> None:
    """Two points with variances of 0.02 and 0.08, of which the second was to have four times the first: equal
    once divided, 0.02 at a weight of 1. A point that tells nothing takes its share of that.
    """
    points = ((0.1, 0.3), (0.0, 0.4), (0.5, 0.5))
    pooled = Pooled(points, expected=(Expected(1.0), Expected(4.0), Expected(0.25, 0.001, False)))
    assert pooled.freedom == 2
    assert pooled.deviation == pytest.approx(math.sqrt(0.02))
    assert pooled.equal_p == pytest.approx(1.0)
    for point, weight in enumerate((1.0, 4.0, 0.25)):
        band = pooled.band(point)
        assert band.high - band.mean == pytest.approx(4.302653 * math.sqrt(0.02 * weight / 2))


def test_no_variance_is_below_the_resolution() -> None:
    """Two equal rounds, of each point its own."""
    pooled = Pooled(((0.5, 0.5),), own=True, expected=(Expected(1.0, 0.001),))
    assert pooled.band(0).high == pytest.approx(0.5 + 12.7062 * math.sqrt(0.001 / 2), rel=1e-5)

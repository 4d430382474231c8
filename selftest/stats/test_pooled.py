"""One variance for several points: numbers by hand, SciPy's Bartlett test, coverage on simulated rounds."""

from __future__ import annotations

import math
import random

import pytest
from scipy import special, stats

from disagglab.stats.pooled import Band, Pooled

HAND = Pooled(((0.1, 0.3), (0.0, 0.4)))
EQUAL, NOISY = (0.1,) * 5, (0.3, *(0.1,) * 4)
SETS = 2000
OF_CHANCE = 4 * math.sqrt(0.05 * 0.95 / SETS)  # four standard errors of a coverage of 95 %


def test_a_band_by_hand() -> None:
    """Squares 0.02 and 0.08 about the means: a variance of 0.05 with 2 degrees of freedom; t is 4.302653."""
    assert HAND.freedom == 2
    assert HAND.deviation == pytest.approx(math.sqrt(0.05))
    assert HAND.equal_p == pytest.approx(0.5854, abs=1e-4)
    half = 4.302653 * math.sqrt(0.05 / 2)
    band = HAND.band(0)
    assert (band.mean, band.low, band.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert band.limited
    assert band.turned == Band(-band.mean, -band.high, -band.low)


def test_equal_variances_are_looked_at_as_scipy_does() -> None:
    """Points of unequal numbers of rounds; those of one round say nothing of a variance."""
    points = ((0.1, 0.3, 0.15), (0.0, 0.4), (5.0,), (0.2, 0.21, 0.19, 0.6))
    several = [point for point in points if len(point) > 1]
    assert Pooled(points).equal_p == pytest.approx(stats.bartlett(*several).pvalue)


def test_where_variances_differ_each_point_has_its_own() -> None:
    """A quiet point and a noisy one: the quiet one's band is that of Student's t on its rounds alone."""
    quiet, noisy = (0.100, 0.101, 0.099, 0.100), (0.5, -0.5, 0.4, -0.3)
    pooled = Pooled((quiet, noisy))
    assert pooled.equal_p is not None
    assert pooled.equal_p < 0.001
    assert not pooled.equal
    low, high = stats.t.interval(0.95, 3, loc=0.1, scale=stats.sem(quiet))
    assert (pooled.band(0).low, pooled.band(0).high) == pytest.approx((low, high))


def test_one_round_has_no_band() -> None:
    """Neither alone nor at several points; beside a point with two rounds, that is no look at variances."""
    for points in (((0.3,),), ((0.3,), (0.1,)), ((0.3,), (0.1, 0.2))):
        pooled = Pooled(points)
        assert pooled.equal_p is None
        assert pooled.band(0) == Band(0.3, -math.inf, math.inf)
        assert not pooled.band(0).limited
    assert Pooled(((0.3,),)).deviation is None


def test_no_spread_beside_some_refutes_equal_variances() -> None:
    assert Pooled(((0.1, 0.1), (0.0, 0.4))).equal_p == 0.0
    assert Pooled(((0.1, 0.1), (0.3, 0.3))).equal_p == 1.0


def _bands(deviations: tuple[float, ...], own: bool, pool_anyway: bool = False) -> tuple[float, float]:
    """Of simulated sets, three rounds a point: how often the band at the first point holds its true mean 0,
    and the mean half width at the last point.
    """
    draw = random.Random(7)
    held, width = 0, 0.0
    for _ in range(SETS):
        pooled = Pooled(tuple(tuple(draw.gauss(0, sigma) for _ in range(3)) for sigma in deviations), own)
        band = pooled.band(0)
        if pool_anyway:
            assert pooled.deviation is not None
            half = float(special.stdtrit(pooled.freedom, 0.975)) * pooled.deviation / math.sqrt(3)
            band = Band(band.mean, band.mean - half, band.mean + half)
        held += band.low <= 0 <= band.high
        last = pooled.band(len(deviations) - 1)
        width += last.high - last.mean
    return held / SETS, width / SETS


def test_equal_variances_keep_the_coverage_nearly() -> None:
    """The look at variances costs two points of coverage, and bands of their own rounds are much wider."""
    coverage, width = _bands(EQUAL, own=False)
    exact, wide = _bands(EQUAL, own=True)
    assert coverage == pytest.approx(0.93, abs=OF_CHANCE)
    assert exact == pytest.approx(0.95, abs=OF_CHANCE)
    assert wide > 1.3 * width


def test_a_noisier_point_is_found_out_only_sometimes() -> None:
    """Three times as noisy as the others: of its own rounds alone the band is right; with the look it is too
    narrow in one set of six, and without a look, the negative control, in more than one of four.
    """
    assert _bands(NOISY, own=True)[0] == pytest.approx(0.95, abs=OF_CHANCE)
    assert _bands(NOISY, own=False)[0] == pytest.approx(0.84, abs=0.035)
    assert _bands(NOISY, own=False, pool_anyway=True)[0] < 0.75

"""The any-time t test by itself: its formula against the integral that it stands for, and numbers by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagglab.stats import sequential
from disagglab.stats.sequential import G, fewest_rounds, inflation, log_e, multiplier, p_value

RATIOS = (0.21, -0.04, 0.13, 0.3, 0.08, 0.17)


def test_e_is_the_integral_of_the_likelihood_ratio() -> None:
    """Integrated over sigma (density 1 / sigma) and over the true mean in sigmas (normal, variance 1 / G),
    over the same without a mean, by a grid of 2,000 x 2,001 points: the closed form, to six digits.
    """
    ratios = np.array(RATIOS)
    n = len(ratios)
    log_sigma = np.linspace(-6, 4, 2000)
    sizes = np.linspace(-8, 8, 2001) / math.sqrt(G)
    inverse = np.exp(-log_sigma)
    squares, total = float((ratios**2).sum()), float(ratios.sum())
    base = -n * log_sigma - squares * inverse**2 / 2
    weights = math.sqrt(G / 2 / math.pi) * np.exp(-G * sizes**2 / 2) * (sizes[1] - sizes[0])
    with_mean = np.exp(base + np.outer(sizes, total * inverse) - n * sizes[:, np.newaxis] ** 2 / 2)
    expected = float(weights @ with_mean.sum(axis=1)) / float(np.exp(base).sum())
    t = ratios.mean() / (ratios.std(ddof=1) / math.sqrt(n))
    assert math.exp(log_e(t, n)) == pytest.approx(expected, rel=1e-6)


def test_e_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.0, 1.2, 0.8, 1.0: t^2 = 150; with G = 0.2, r = 1 / 21: E = sqrt(r) x (51 / (71 / 21))^2 = 49.65."""
    expected = math.sqrt(1 / 21) * (51 * 21 / 71) ** 2
    assert expected == pytest.approx(49.65, abs=0.01)
    assert math.exp(log_e(math.sqrt(150), 4, 0.2)) == pytest.approx(expected)
    assert p_value(-math.sqrt(150), 4, 0.2) == pytest.approx(1 / expected)
    assert p_value(0.0, 4) == p_value(math.inf, 1) == 1


def test_without_any_spread_e_is_the_largest_of_so_many_rounds() -> None:
    """r^(-(n - 1) / 2): 96 with four rounds and 8 with three, which is less than 20 and decides nothing."""
    assert math.exp(log_e(math.inf, 4, 0.2)) == pytest.approx(21**1.5)
    assert math.exp(log_e(math.inf, 3, 0.2)) == pytest.approx(16)
    assert math.exp(log_e(1e200, 4, 0.2)) == pytest.approx(21**1.5)


@given(st.integers(2, 60), st.floats(0.0001, 0.5))
def test_at_the_multiplier_p_is_alpha(n: int, alpha: float) -> None:
    """At its t the p value is alpha; where it is infinite no t, however large, has so small a p."""
    factor = multiplier(n, alpha)
    if factor < math.inf:
        assert p_value(factor, n) == pytest.approx(alpha, rel=1e-6)
    else:
        assert p_value(math.inf, n) >= alpha


def test_the_interval_narrows_as_rounds_are_made() -> None:
    """Half widths in standard deviations fall with every round, and so do rounds lie above Student's t."""
    halves = [multiplier(n, 0.05) / math.sqrt(n) for n in range(fewest_rounds(0.05), 200)]
    assert all(later < earlier for earlier, later in itertools.pairwise(halves))


def test_fewest_rounds() -> None:
    """Four at 5 %, five at 1 %: below, the multiplier is infinite."""
    assert (fewest_rounds(0.05), fewest_rounds(0.01)) == (4, 5)
    assert multiplier(3, 0.05) == multiplier(4, 0.01) == multiplier(1, 0.5) == math.inf
    assert multiplier(4, 0.05) == pytest.approx(6.88, abs=0.01)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0], math.sqrt(1.375 / 0.625)),  # rho 1/8 + 2/8
        ([1.0, 2.0, 3.0, 4.0], 2.0),  # rho 1/4 + 2/4, above the most
        ([1.0, -1.0] * 8, 1.0),  # neighbours are opposites
        ([5.0, 5.0, 5.0], 1.0),  # no spread
        ([1.0, 2.0], 1.0),  # nothing to be said
        ([1.0], 1.0),
    ],
)
def test_inflation_by_hand(ratios: list[float], expected: float) -> None:
    """sqrt((1 + rho) / (1 - rho)), rho from 0 to 0.6."""
    assert inflation(ratios) == pytest.approx(expected)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.1, 10), st.floats(-3, 3))
def test_inflation_only_widens(ratios: list[float], scale: float, shift: float) -> None:
    """It is between 1 and 2, whatever the log-ratios."""
    assert 1 <= inflation(ratios) <= 2 + 1e-9
    assert sequential.MOST_AUTOCORRELATION == 0.6
    assert 1 <= inflation([scale * ratio + shift for ratio in ratios]) <= 2 + 1e-9

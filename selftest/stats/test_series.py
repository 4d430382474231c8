"""Series of equal runs: constructed ones, whose answer is known."""

from __future__ import annotations

import math
import random

import pytest

from disagglab.errors import InvalidRun
from disagglab.stats.series import DESIGNS, autocorrelation, design_errors


def test_autocorrelation_by_hand() -> None:
    """1, -1, 1, -1: neighbours are opposite, three products over four squares."""
    assert autocorrelation([1.0, -1.0, 1.0, -1.0]) == pytest.approx(-0.75)
    assert autocorrelation([1.0, -1.0, 1.0, -1.0], 2) == pytest.approx(0.5)
    assert autocorrelation([3.0, 3.0, 3.0]) == 0.0


def test_autocorrelation_finds_what_was_put_in() -> None:
    source, values = random.Random(4), [0.0]
    for _ in range(4000):
        values.append(0.3 * values[-1] + source.gauss(0, 1))
    assert autocorrelation(values) == pytest.approx(0.3, abs=0.05)


def test_a_straight_drift_is_cancelled_by_mirrored_pairs_alone() -> None:
    """Steps of 1: pairs in one order see 1, four after four see 4, by lot half of it with either sign."""
    found = design_errors([float(step) for step in range(24)], 4)
    assert found["mirrored pairs"] == pytest.approx(0.0)
    assert found["pairs in one order"] == pytest.approx(1.0)
    assert found["pairs by lot"] == pytest.approx(0.5)
    assert found["one arm after the other"] == pytest.approx(4.0)


def test_independent_noise_does_not_care_for_the_order() -> None:
    """Every design then errs by sqrt(2 / pairs) of a run's deviation."""
    source = random.Random(9)
    found = design_errors([source.gauss(0, 1) for _ in range(20_000)], 6)
    assert set(found) == set(DESIGNS)
    for name, error in found.items():
        assert error == pytest.approx(math.sqrt(2 / 6), rel=0.05), name


def test_too_short_a_series_is_refused() -> None:
    with pytest.raises(InvalidRun):
        design_errors([1.0, 2.0, 3.0], 2)
    with pytest.raises(InvalidRun):
        design_errors([1.0, 2.0, 3.0], 0)
    with pytest.raises(InvalidRun):
        autocorrelation([1.0, 2.0])

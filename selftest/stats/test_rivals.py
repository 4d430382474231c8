"""A way against the best of several: limits by hand, and how often equal ways are told apart by luck."""

from __future__ import annotations

import math
import random

import pytest

from disagglab.stats.pooled import Pooled
from disagglab.stats.rivals import against_best

SETS, ROUNDS = 3000, 6
AT = 0.025  # one side of a 95 % interval
OF_CHANCE = 3 * math.sqrt(AT * (1 - AT) / SETS)


def alone(*rounds: float) -> tuple[Pooled, int]:
    return Pooled((rounds,)), 0


def test_one_rival_is_the_plain_band() -> None:
    """With nothing to pick there is nothing to correct."""
    pooled, place = alone(0.1, 0.2, 0.4)
    found = against_best({"a": (pooled, place)})
    assert (found.best, found.rivals, found.band) == ("a", 1, pooled.band(0))


def test_limits_of_two_rivals() -> None:
    """The best is the one with the smallest ratio; the lowest lower limit is the noisy rival's, which is not;
    upper limits are taken at half the level.
    """
    near, noisy = alone(0.10, 0.12, 0.11), alone(0.6, -0.2, 0.5)
    found = against_best({"noisy": noisy, "near": near})
    assert found.best == "near"
    assert found.band.mean == pytest.approx(0.11)
    assert found.band.low == noisy[0].band(0).low
    assert found.band.high == near[0].band(0, 0.025).high
    assert found.band.high > near[0].band(0).high


def test_no_rival_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="no rival"):
        against_best({})


def _behind(naive: bool) -> float:
    """How often one of four equal ways is called worse than the best of the other three."""
    draw = random.Random(3)
    found = 0
    for _ in range(SETS):
        own, *others = ([draw.gauss(0, 0.05) for _ in range(ROUNDS)] for _ in range(4))
        ratios = {
            str(i): (Pooled((tuple(a - b for a, b in zip(own, other, strict=True)),)), 0)
            for i, other in enumerate(others)
        }
        judged = against_best(ratios)
        band = ratios[judged.best][0].band(0) if naive else judged.band
        found += band.high < 0
    return found / SETS


def test_the_luck_of_the_pick_is_corrected() -> None:
    """Equal ways are called worse in 2.5 % of the sets at most; picked first and judged then, in more."""
    assert _behind(naive=False) <= AT + OF_CHANCE
    assert _behind(naive=True) > AT + 2 * OF_CHANCE

"""Verdicts on constructed pairs, and the false-alarm rate of the rule on simulated A/A experiments."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagglab.errors import InvalidRun
from disagglab.verdict import judge, passes

SPREAD = (0.99, 1.01, 0.995, 1.005, 1.0, 1.0)


def pairs(ratio: float, spread: tuple[float, ...] = SPREAD) -> list[tuple[float, float]]:
    """Rounds whose candidate is ``ratio`` times the baseline, give or take the spread."""
    return [(100.0 + i, (100.0 + i) * ratio * noise) for i, noise in enumerate(spread)]


@pytest.mark.parametrize(
    ("ratio", "better", "outcome"),
    [
        (0.5, "lower", "better"),
        (0.5, "higher", "worse"),
        (2.0, "higher", "better"),
        (2.0, "lower", "worse"),
        (1.0, "lower", "equivalent"),
        (1.0, "higher", "equivalent"),
    ],
)
def test_clear_cases(ratio: float, better: str, outcome: str) -> None:
    """Halved, doubled and unchanged, in both directions of better."""
    verdict = judge(pairs(ratio), better, 0.05)  # type: ignore[arg-type]
    assert verdict.outcome == outcome
    assert verdict.low <= ratio - 1 <= verdict.high


def test_noise_wider_than_the_margin_is_undecided() -> None:
    """An interval that holds no difference and more than the margin decides nothing, and passes no gate."""
    verdict = judge(pairs(1.0, (0.5, 2.0, 0.7, 1.4)), "lower", 0.05)
    assert verdict.outcome == "undecided"
    assert not passes(verdict, "better", "lower")
    assert not passes(verdict, "not worse", "lower")


def test_one_round_decides_nothing() -> None:
    """A single pair has no spread: undecided, with the reason, whatever the effect."""
    verdict = judge([(1.0, 0.001)], "lower", 0.05)
    assert verdict.outcome == "undecided"
    assert "more rounds" in verdict.reason
    assert not passes(verdict, "not worse", "lower")
    assert not passes(verdict, "not worse", "higher")


def test_not_worse_holds_for_better_and_equivalent() -> None:
    """A gate that asks for not worse takes better and equivalent, and refuses worse."""
    assert passes(judge(pairs(0.5), "lower", 0.05), "not worse", "lower")
    assert passes(judge(pairs(1.0), "higher", 0.05), "not worse", "higher")
    assert not passes(judge(pairs(1.5), "lower", 0.05), "not worse", "lower")
    assert not passes(judge(pairs(0.7), "higher", 0.05), "not worse", "higher")


@pytest.mark.parametrize("bad", [[], [(0.0, 1.0)], [(1.0, math.nan)], [(1.0, math.inf)], [(-1.0, 1.0)]])
def test_values_that_cannot_be_compared_are_refused(bad: list[tuple[float, float]]) -> None:
    """Nothing, zero, negative, infinite and not-a-number are errors, not verdicts."""
    with pytest.raises(InvalidRun):
        judge(bad, "lower", 0.05)


def test_identical_arms_rarely_differ() -> None:
    """Of 400 simulated A/A experiments of six rounds, about 5 % call a difference: at most 8 %."""
    source = random.Random(11)
    alarms = 0
    for _ in range(400):
        rounds = [(source.lognormvariate(0, 0.1), source.lognormvariate(0, 0.1)) for _ in range(6)]
        alarms += judge(rounds, "lower", 0.001).outcome in ("better", "worse")
    assert alarms / 400 <= 0.08


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=8))
def test_swapping_the_arms_swaps_the_verdict(rounds: list[tuple[float, float]]) -> None:
    """better and worse change places when baseline and candidate do; the other two stay."""
    opposite = {"better": "worse", "worse": "better", "equivalent": "equivalent", "undecided": "undecided"}
    forward = judge(rounds, "lower", 0.05).outcome
    assert judge([(b, a) for a, b in rounds], "lower", 0.05).outcome == opposite[forward]

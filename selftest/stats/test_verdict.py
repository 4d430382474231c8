"""Verdicts on constructed pairs, and the false-alarm rate of the rule on simulated A/A experiments."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from disagglab.errors import InvalidRun
from disagglab.paths import ROOT
from disagglab.stats.metric import METRICS, Direction
from disagglab.stats.verdict import (
    NoiseFloor,
    Rule,
    Want,
    gate_p,
    held_back,
    holm,
    judge,
    noise_floor,
    passes,
    rounds_needed,
    sign_flip_p,
)

RULES: tuple[Rule, ...] = ("fixed-n", "any time", "any time, order drawn")
SPREAD = (0.99, 1.01, 0.995, 1.005, 1.0, 1.0)


def pairs(ratio: float, spread: tuple[float, ...] = SPREAD) -> list[tuple[float, float]]:
    """Rounds whose candidate is ``ratio`` times the baseline, give or take the spread."""
    return [(100.0 + i, (100.0 + i) * ratio * noise) for i, noise in enumerate(spread)]


def met(rounds: list[tuple[float, float]], better: Direction, want: Want) -> bool:
    """Whether a gate that stands alone is met."""
    return passes(judge(rounds, better, 0.05), want, gate_p(rounds, better, 0.05, want))


@pytest.mark.parametrize("rule", RULES)
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
def test_clear_cases(ratio: float, better: Direction, outcome: str, rule: Rule) -> None:
    """Halved, doubled and unchanged, in both directions of better, by both rules."""
    verdict = judge(pairs(ratio), better, 0.05, rule)
    assert (verdict.outcome, verdict.rule) == (outcome, rule)
    assert verdict.low <= ratio - 1 <= verdict.high


def test_noise_wider_than_the_margin_is_undecided() -> None:
    """An interval that holds no difference and more than the margin decides nothing, and passes no gate."""
    noisy = pairs(1.0, (0.5, 2.0, 0.7, 1.4))
    verdict = judge(noisy, "lower", 0.05)
    assert verdict.outcome == "undecided"
    assert verdict.underpowered
    assert "underpowered" in verdict.reason
    assert not met(noisy, "lower", "better")
    assert not met(noisy, "lower", "not worse")


def test_one_round_decides_nothing() -> None:
    """A single pair has no spread: undecided, with the reason, whatever the effect."""
    verdict = judge([(1.0, 0.001)], "lower", 0.05)
    assert verdict.outcome == "undecided"
    assert "more rounds" in verdict.reason
    assert (verdict.p, verdict.p_sign_flip, verdict.smallest_detectable) == (1.0, 1.0, None)
    assert verdict.underpowered
    assert not met([(1.0, 0.001)], "lower", "not worse")
    assert not met([(1.0, 0.001)], "higher", "not worse")


def test_not_worse_holds_for_better_and_equivalent() -> None:
    """A gate that asks for not worse takes better and equivalent, and refuses worse."""
    assert met(pairs(0.5), "lower", "not worse")
    assert met(pairs(1.0), "higher", "not worse")
    assert not met(pairs(1.5), "lower", "not worse")
    assert not met(pairs(0.7), "higher", "not worse")


def test_equivalent_is_not_better() -> None:
    """A difference that is certain and smaller than the margin meets no gate that wants a win."""
    small = pairs(0.98)
    verdict = judge(small, "lower", 0.05)
    assert (verdict.outcome, verdict.high < 0) == ("equivalent", True)
    assert gate_p(small, "lower", 0.05, "better") < 0.05
    assert not met(small, "lower", "better")


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


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=8),
    st.booleans(),
    st.sampled_from(RULES),
)
def test_gate_p_says_what_the_interval_says(
    rounds: list[tuple[float, float]], lower: bool, rule: Rule
) -> None:
    """Alone, a gate is met exactly where the 95 % interval excludes its hypothesis, by either rule."""
    better: Direction = "lower" if lower else "higher"
    verdict = judge(rounds, better, 0.05, rule)
    # a lower limit far below is rounded to -1, a ratio of 0
    good, bad = (math.log1p(end) if end > -1 else -math.inf for end in (verdict.low, verdict.high))
    if not lower:
        good, bad = -bad, -good
    for bound, want in ((0.0, "better"), (math.log1p(0.05), "not worse")):
        if abs(bad - bound) > 1e-9:
            p = gate_p(rounds, better, 0.05, want, rule)  # type: ignore[arg-type]
            assert (p <= 0.05) == (bad < bound)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=8))
def test_the_interval_at_any_time_holds_the_fixed_one(rounds: list[tuple[float, float]]) -> None:
    """It is never narrower, and the fixed-n interval stands beside it as it is when asked for alone."""
    fixed, any_time, drawn = (judge(rounds, "lower", 0.05, rule) for rule in RULES)
    assert any_time.low <= drawn.low <= fixed.low <= fixed.high <= drawn.high <= any_time.high
    for verdict in (any_time, drawn, fixed):
        assert (verdict.fixed_low, verdict.fixed_high) == (fixed.low, fixed.high)
    assert any_time.p >= drawn.p >= fixed.p
    assert (any_time.effect, any_time.p_sign_flip) == (fixed.effect, fixed.p_sign_flip)


def test_too_few_rounds_for_looks_are_undecided() -> None:
    """A hundredfold with hardly any spread: where each round may be the last three do not decide, four do."""
    three = judge(pairs(100.0)[:3], "lower", 0.05, "any time")
    assert (three.outcome, three.low, three.high) == ("undecided", -1.0, math.inf)
    assert three.reason == "3 rounds cannot decide yet under looks after every round; 4 is the fewest"
    assert three.smallest_detectable is None
    assert three.underpowered
    assert 0.05 < three.p < 1
    assert three.fixed_low > 0
    assert judge(pairs(100.0)[:4], "lower", 0.05, "any time").outcome == "worse"
    assert "more rounds" in judge([(1.0, 2.0)], "lower", 0.05, "any time").reason


def test_equal_pairs_are_decided_by_their_number() -> None:
    """Without any spread a fixed number decides at two; where each may be the last, p is 1 / 96 at four."""
    for n, fixed, any_time in ((2, "worse", "undecided"), (4, "worse", "worse")):
        rounds = [(1.0, 2.0)] * n
        assert judge(rounds, "lower", 0.05).outcome == fixed
        assert judge(rounds, "lower", 0.05, "any time").outcome == any_time
    assert judge([(1.0, 2.0)] * 4, "lower", 0.05, "any time").p == pytest.approx(1 / 21**1.5)
    assert judge([(1.0, 2.0)] * 4, "lower", 0.05).p == 0
    assert gate_p([(1.0, 1.0)] * 4, "lower", 0.05, "better", "any time") == 1
    assert gate_p([(1.0, 1.0)] * 4, "lower", 0.05, "not worse", "any time") == pytest.approx(1 / 21**1.5)


def test_a_verdict_at_any_time_by_hand() -> None:
    """Log-ratios 0.10, 0.12, 0.08, 0.10: se = 0.00816; rho = -1/2 + 2/4 = 0, so it stays; b(4) = 6.88."""
    rounds = [(1.0, math.exp(ratio)) for ratio in (0.10, 0.12, 0.08, 0.10)]
    verdict = judge(rounds, "lower", 0.05, "any time")
    error = math.sqrt(0.0008 / 3 / 4)
    assert math.log1p(verdict.low) == pytest.approx(0.1 - 6.8753 * error, abs=1e-5)
    assert math.log1p(verdict.high) == pytest.approx(0.1 + 6.8753 * error, abs=1e-5)
    assert verdict.p == pytest.approx(1 / (math.sqrt(1 / 21) * (51 * 21 / 71) ** 2))
    assert verdict.smallest_detectable == pytest.approx(math.expm1((6.8753 + 0.9785) * error), abs=1e-5)


def test_the_order_of_rounds_counts_at_any_time() -> None:
    """The same pairs, in an order in which neighbours are alike, tell less; a fixed n knows no order."""
    alternating = pairs(1.1, (0.97, 1.03, 0.98, 1.02, 0.97, 1.03))
    sorted_pairs = sorted(alternating, key=lambda pair: pair[1] / pair[0])
    for rule in RULES:
        first, second = (judge(each, "lower", 0.01, rule) for each in (alternating, sorted_pairs))
        assert (second.high > first.high + 0.01) == (rule == "any time")


def test_rounds_needed_takes_mean_and_spread_as_they_are() -> None:
    """Nothing is said of one round; else more than were made, and more where each may be the last."""
    noisy = pairs(1.1, (0.9, 1.1, 0.95, 1.05))
    assert rounds_needed([(1.0, 1.1)], 0.05, "any time") is None
    fixed, any_time, drawn = (rounds_needed(noisy, 0.05, rule) for rule in RULES)
    assert drawn is not None
    assert fixed is not None
    assert any_time is not None
    assert 4 < fixed < drawn <= any_time  # these neighbours are no more alike than chance
    assert judge(noisy, "lower", 0.05).outcome == "undecided"
    assert rounds_needed(pairs(2.0), 0.05, "any time") == 6


@pytest.mark.parametrize(
    ("ratios", "p"),
    [
        ([0.1] * 6, 2 / 64),
        ([-0.1] * 5, 2 / 32),
        ([0.1, -0.1], 1.0),
        ([0.0, 0.0], 1.0),
        ([3.0, 2.0, -1.0], 4 / 8),  # |sum| 4; as far: +++ 6, ++- 4 and their mirrors
        ([1.0], 1.0),
    ],
)
def test_sign_flips_are_counted(ratios: list[float], p: float) -> None:
    """All ways to turn the signs, and how many of them lie as far from 0."""
    assert sign_flip_p(ratios) == pytest.approx(p)


def test_holm_corrects_a_family() -> None:
    """The textbook case; order of the input does not matter, and adjusted values never fall."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_raw_p_and_bonferroni(p_values: list[float]) -> None:
    """Never below the raw value, never above that times the size of the family, and in the same order."""
    adjusted = holm(p_values)
    for raw, after in zip(p_values, adjusted, strict=True):
        assert raw <= after <= min(1.0, len(p_values) * raw) + 1e-12
    assert sorted(adjusted) == [adjusted[i] for i in sorted(range(len(p_values)), key=lambda i: p_values[i])]


def test_a_family_of_identical_arms_rarely_alarms() -> None:
    """Of 200 simulated A/A experiments with four gates each, at most 8 % call any of the four a win."""
    source = random.Random(5)
    alarms = 0
    for _ in range(200):
        family = [
            [(source.lognormvariate(0, 0.1), source.lognormvariate(0, 0.1)) for _ in range(6)]
            for _ in range(4)
        ]
        adjusted = holm([gate_p(rounds, "lower", 0.001, "better") for rounds in family])
        alarms += any(
            passes(judge(rounds, "lower", 0.001), "better", p)
            for rounds, p in zip(family, adjusted, strict=True)
        )
    assert alarms / 200 <= 0.08


def test_a_slowdown_of_a_fifth_is_found() -> None:
    """With 5 % of noise a round and six rounds, +20 % is called worse in at least 95 of 100 experiments."""
    source = random.Random(3)
    found = 0
    for _ in range(100):
        rounds = [(source.lognormvariate(0, 0.05), 1.2 * source.lognormvariate(0, 0.05)) for _ in range(6)]
        found += judge(rounds, "lower", 0.05).outcome == "worse"
    assert found >= 95


def test_the_noise_floor_is_half_the_interval() -> None:
    """Two identical arms that differ by 1 % from round to round: the floor is that of Student's t."""
    rounds = [(1.0, 1.01), (1.0, 1 / 1.01), (1.0, 1.01), (1.0, 1 / 1.01)]
    spread = math.log(1.01) * math.sqrt(4 / 3)
    floor = noise_floor(rounds)
    assert floor.ratio == pytest.approx(math.expm1(3.182446 * spread / 2), rel=1e-5)
    assert floor.note == ""
    assert noise_floor([(1.0, 1.0)]) == NoiseFloor(None, "one round")


def test_equal_pairs_are_no_floor_of_zero() -> None:
    """Times that are all equal show no spread; one miss of 24 in every run shows less than a request."""
    assert noise_floor([(1.0, 1.0), (2.0, 2.0)]) == NoiseFloor(None, "every pair equal")
    share = METRICS["slo_attainment"]
    value = share.comparable(23 / 24, 24)
    step = share.step(value, 24)
    assert step == pytest.approx(share.comparable(24 / 24, 24) / value - 1) == pytest.approx(1 / 23.5)
    assert noise_floor([(value, value)] * 5, step) == NoiseFloor(step, "one request")
    more = share.comparable(24 / 24, 24)
    rare = noise_floor([(value, value)] * 20 + [(value, more)], step)
    assert rare == NoiseFloor(step, "one request"), "less than a step"
    wide = noise_floor([(value, more), (more, value), (more, value)], step)
    assert wide.ratio is not None
    assert wide.ratio > step
    assert wide.note == ""
    assert METRICS["ttft_p50"].step(1.0, 24) == 0


def test_reading_a_verdict_loads_no_distributions() -> None:
    """Student's t comes from scipy.special, and is the one of scipy.stats, which takes seconds to load."""
    for freedom in (1, 2, 5, 40):
        assert special.stdtrit(freedom, 0.975) == stats.t.ppf(0.975, freedom)
        assert special.stdtr(freedom, -1.3) == stats.t.cdf(-1.3, freedom)
    program = "import sys, disagglab.results.history; print('scipy.stats' in sys.modules)"
    argv = [sys.executable, "-c", program]
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_the_correction_holds_back_is_said() -> None:
    """Both p and the family, only where it is the correction that decides."""
    assert held_back("better", 0.03, 0.066, 12) == "better at p 0.03, 0.066 after 12 gates"
    assert held_back("better", 0.03, 0.04, 12) == held_back("better", 0.06, 0.6, 12) == ""


def test_the_smallest_detectable_difference_is_the_published_one() -> None:
    """SD of pair log-ratios 5 %, n = 6: 7.4 %; n = 10: 5.1 % (table of the method)."""
    for n, expected in ((6, 0.074), (10, 0.051)):
        size = 0.05 * math.sqrt((n - 1) / n)
        rounds = [(1.0, math.exp(size if number % 2 else -size)) for number in range(n)]
        detectable = judge(rounds, "lower", 0.5).smallest_detectable
        assert detectable == pytest.approx(expected, abs=0.0006)

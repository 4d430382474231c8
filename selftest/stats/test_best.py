"""The best of several baselines: limits worked out by hand, level and coverage on simulated sessions.

The oracle of the simulations is the level that the interval promises; that it can be missed is shown by the
naive way, which picks the baseline that looks best and judges as if it had been the only one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from disagglab.errors import InvalidRun
from disagglab.stats.best import best_gate_p, judge_best
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import Rule, Want, gate_p, judge

RULES: tuple[Rule, ...] = ("fixed-n", "any time", "any time, order drawn")
SEED = 11
SESSIONS = 2000
# Three standard errors above 2.5 % of so many sessions: where that is the rate, 1 in 700 seeds shows more.
MOST = 0.025 + 3 * math.sqrt(0.025 * 0.975 / SESSIONS)

Pairs = list[tuple[float, float]]


def paired(logs: Sequence[float]) -> Pairs:
    """Pairs with these log-ratios of candidate and baseline."""
    return [(1.0, math.exp(log)) for log in logs]


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("rule", RULES)
def test_the_best_of_one_is_a_verdict(better: Direction, rule: Rule) -> None:
    """With one baseline every field is that of judge(), to the last bit, whatever the number of rounds."""
    generator = np.random.default_rng(SEED)
    for rounds, shift in itertools.product((1, 2, 3, 4, 7, 20), (-0.3, 0.0, 0.02)):
        pairs = paired(list(shift + 0.05 * generator.standard_normal(rounds)))
        found = judge_best({"replicated": pairs}, better, 0.05, rule)
        assert found.verdict == judge(pairs, better, 0.05, rule)
        assert (found.baseline, found.k) == ("replicated", 1)
        for want in ("better", "not worse"):
            own = gate_p(pairs, better, 0.05, want, rule)
            assert best_gate_p({"replicated": pairs}, better, 0.05, want, rule) == own
    equal = judge_best({"single": paired([0.0, 0.0])}, better, 0.05, rule)
    assert equal.verdict == judge(paired([0.0, 0.0]), better, 0.05, rule)


def test_the_limits_by_hand() -> None:
    """Three rounds, higher is better, two baselines with a standard error of 0.1 / sqrt(3) each.

    t(0.975, 2) = 4.302653 below, t(0.9875, 2) = 6.205347 above, from tables.
    """
    near, far = [0.4, 0.5, 0.6], [0.9, 1.0, 1.1]
    found = judge_best({"far": paired(far), "near": paired(near)}, "higher", 0.05)
    error = 0.1 / math.sqrt(3)
    verdict = found.verdict
    assert found.baseline == "near"
    assert found.among == ("far", "near")
    assert math.log1p(verdict.effect) == pytest.approx(0.5)
    assert math.log1p(verdict.low) == pytest.approx(0.5 - 4.302653 * error)
    assert math.log1p(verdict.high) == pytest.approx(0.5 + 6.205347 * error)
    assert verdict.outcome == "better"
    assert verdict.rounds == 3
    assert "the best of 2 other ways (near, far)" in verdict.reason
    # the larger of the two p; of t = 0.5 / error with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2)
    t = 0.5 / error
    assert verdict.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_lower_is_the_mirror_of_higher() -> None:
    """The limits of 1 / ratio in the other direction, with the same outcome and p."""
    logs = {"a": [0.1, 0.3, 0.15, 0.2], "b": [0.05, 0.02, 0.2, 0.12], "c": [0.6, 0.4, 0.5, 0.7]}
    for rule in RULES:
        up = judge_best({name: paired(row) for name, row in logs.items()}, "higher", 0.05, rule)
        down = judge_best(
            {name: paired([-one for one in row]) for name, row in logs.items()}, "lower", 0.05, rule
        )
        assert up.baseline == down.baseline == "b"
        assert up.verdict.outcome == down.verdict.outcome
        assert up.verdict.p == pytest.approx(down.verdict.p)
        if math.isfinite(up.verdict.high) and up.verdict.low > -1:
            assert math.log1p(up.verdict.low) == pytest.approx(-math.log1p(down.verdict.high))
            assert math.log1p(up.verdict.high) == pytest.approx(-math.log1p(down.verdict.low))


def test_worse_than_one_is_worse_than_the_best() -> None:
    """Far better than two and worse than the third: worse, and the third is named; p is k times its own."""
    bad = paired([-0.5, -0.52, -0.48, -0.51])
    good = paired([1.0, 1.1, 0.9, 1.0])
    found = judge_best({"a": good, "b": bad, "c": good}, "higher", 0.05)
    assert (found.verdict.outcome, found.baseline) == ("worse", "b")
    assert found.verdict.p == pytest.approx(3 * judge(bad, "higher", 0.05).p)
    assert found.verdict.p_sign_flip == pytest.approx(3 * 2 / 2**4)
    assert best_gate_p({"a": good, "b": bad}, "higher", 0.05, "better") == 1.0


def test_as_good_as_the_best_is_equivalent() -> None:
    """Equal to one and far better than another: the interval lies within the margin."""
    equal, good = paired([0.001, -0.001, 0.0005, 0.0]), paired([1.0, 1.1, 0.9, 1.0])
    found = judge_best({"a": good, "b": equal}, "higher", 0.05)
    assert (found.verdict.outcome, found.baseline) == ("equivalent", "b")


@pytest.mark.parametrize("want", ["better", "not worse"])
def test_the_p_of_a_gate_is_the_largest(want: Want) -> None:
    """Each of the others has to be beaten; a rival that is far behind adds nothing."""
    pairs = {"a": paired([0.1, 0.12, 0.08]), "b": paired([0.05, 0.1, 0.02]), "c": paired([2.0, 2.1, 1.9])}
    alone = {name: gate_p(found, "higher", 0.05, want) for name, found in pairs.items()}
    assert best_gate_p(pairs, "higher", 0.05, want) == max(alone.values()) == alone["b"]


def test_p_says_what_the_interval_says() -> None:
    """p is at most 5 % just where the interval excludes no difference, on either side, by every rule."""
    generator = np.random.default_rng(SEED)
    seen = set()
    for rule in RULES:
        for _ in range(300):
            shifts = generator.uniform(-2, 3, 3)
            logs = {str(i): list(shifts[i] + generator.standard_normal(8)) for i in range(3)}
            verdict = judge_best(
                {name: paired(row) for name, row in logs.items()}, "higher", 0.05, rule
            ).verdict
            excluded = verdict.low > 0 or verdict.high < 0
            assert excluded == (verdict.p <= 0.05)
            assert verdict.low <= verdict.effect <= verdict.high
            seen.add((verdict.outcome, rule))
    assert seen >= set(itertools.product(("better", "worse", "undecided"), RULES))


def test_too_few_rounds_for_the_wider_side() -> None:
    """By looks after every round four rounds give a lower limit at 5 % and no upper one at 5 % / 8."""
    logs = [0.5, 0.5001, 0.4999, 0.5]
    pairs = {str(i): paired([log + 0.01 * i for log in logs]) for i in range(8)}
    verdict = judge_best(pairs, "higher", 0.05, "any time, order drawn").verdict
    assert verdict.outcome == "better"
    assert 0 < verdict.low < verdict.high == math.inf
    assert verdict.smallest_detectable is None
    two = {name: found[:2] for name, found in pairs.items()}
    verdict = judge_best(two, "higher", 0.05, "any time, order drawn").verdict
    assert verdict.outcome == "undecided"
    assert "2 rounds cannot decide yet" in verdict.reason


def test_a_baseline_without_pairs_is_an_error_that_names_it() -> None:
    """Neither it nor a broken value is dropped in silence; pairs that differ in number are told."""
    good = paired([0.1, 0.2, 0.3])
    with pytest.raises(InvalidRun, match=r"baseline sharded: no pair"):
        judge_best({"single": good, "sharded": []}, "higher", 0.05)
    with pytest.raises(InvalidRun, match=r"baseline sharded: values must be positive"):
        best_gate_p({"single": good, "sharded": [(0.0, 1.0)]}, "higher", 0.05, "better")
    with pytest.raises(InvalidRun, match="no baseline"):
        judge_best({}, "higher", 0.05)
    found = judge_best({"single": good, "sharded": good[:2]}, "higher", 0.05).verdict
    assert found.rounds == 2
    assert "3 with single, 2 with sharded" in found.reason


@dataclass(frozen=True)
class Rates:
    """Shares of sessions whose interval was, at some look, above or below the true gain over the best, and
    whose interval against the picked baseline alone was below it.
    """

    above: float
    below: float
    naive_below: float


def simulated(
    gains: Sequence[float],
    rounds: int,
    rule: Rule = "fixed-n",
    sessions: int = SESSIONS,
    looks: Sequence[int] = (),
) -> Rates:
    """Sessions of normal noise; every run has a deviation of 5 %, those of the candidate stand in all pairs.

    Args:
        gains: true log-ratio over each baseline, in deviations of a run.
        looks: rounds after which the interval is looked at; absent: the last.
    """
    generator = np.random.default_rng(SEED)
    counts = np.zeros(3)
    for _ in range(sessions):
        candidate = generator.standard_normal(rounds)
        logs = {
            str(place): list(0.05 * (gain - min(gains) + candidate - generator.standard_normal(rounds)))
            for place, gain in enumerate(gains)
        }
        seen = np.zeros(3, dtype=bool)
        for look in looks or [rounds]:
            found = {name: paired(row[:look]) for name, row in logs.items()}
            best = judge_best(found, "higher", 0.05, rule)
            naive = judge(found[best.baseline], "higher", 0.05, rule)
            seen |= [best.verdict.low > 0, best.verdict.high < 0, naive.high < 0]
        counts += seen
    return Rates(*(counts / sessions))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_equal_ways_are_rarely_called_worse(k: int) -> None:
    """Candidate and k baselines are all equal, six rounds: "worse" in at most 2.5 % of sessions, as against
    one; and picking first, judging as if there had been no pick errs more often than that (the control).
    """
    found = simulated([0.0] * k, 6)
    assert found.below <= MOST
    assert found.naive_below > MOST
    assert found.above < 0.01, "to be above all of k equal ones takes luck k times"


def test_the_naive_pick_errs_in_more_than_one_session_of_twenty() -> None:
    """Of five equal ways the one that looks best looks better than an equal candidate too often."""
    assert simulated([0.0] * 5, 6).naive_below > 0.05 + 3 * math.sqrt(0.05 * 0.95 / SESSIONS)


@pytest.mark.parametrize("gains", [(0.0, 5.0, 5.0), (0.0, 1.0, 1.0), (2.0, 2.0, 2.5), (-1.0, -1.0, 3.0)])
@pytest.mark.parametrize("rounds", [3, 8])
def test_the_interval_holds_the_gain_over_the_best(gains: tuple[float, ...], rounds: int) -> None:
    """Whichever of the baselines is best, and by how much: each side is missed in at most 2.5 %."""
    found = simulated(gains, rounds)
    assert found.above <= MOST
    assert found.below <= MOST


def test_a_rival_that_is_out_of_the_question_costs_nothing_from_below() -> None:
    """With one baseline that counts the lower limit errs as often as it may, and no less."""
    assert 0.025 - (MOST - 0.025) <= simulated([0.0, 50.0], 6).above <= MOST


@pytest.mark.parametrize("gains", [(0.0, 0.0, 0.0), (0.0, 5.0, 5.0)])
def test_looks_after_every_round_hold_it_too(gains: tuple[float, ...]) -> None:
    """A look after each of 15 rounds, by the rule that is made for it; with Student's t they do not."""
    looks = range(2, 16)
    held = simulated(gains, 15, "any time", 400, looks)
    assert held.above + held.below <= 0.05
    wrong = simulated(gains, 15, "fixed-n", 400, looks)
    assert wrong.above + wrong.below > 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)

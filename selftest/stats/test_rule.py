"""Multipliers and forecasts of both rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagglab.stats.rule import MOST_ROUNDS, Rule, fewest_rounds, multiplier, p_value, rounds_to_decide

RULES: tuple[Rule, ...] = ("fixed-n", "any time", "any time, order drawn")


def decides(rule: Rule, mean: float, deviation: float, rounds: int, margin: float, alpha: float) -> bool:
    """Whether the interval of so many rounds excludes 0 or lies within the margin."""
    factor = multiplier(rounds, alpha, rule)
    if math.isinf(factor):
        return False
    low, high = (mean + sign * factor * deviation / math.sqrt(rounds) for sign in (-1, 1))
    bound = math.log1p(margin)
    return low > 0 or high < 0 or (-bound <= low and high <= bound)


def test_multipliers_of_the_fixed_rule_are_those_of_the_table() -> None:
    """t(0.975, n - 1) as any table has it; nothing with one round."""
    found = [multiplier(n, 0.05, "fixed-n") for n in (2, 3, 4, 6, 10)]
    assert found == pytest.approx([12.706, 4.303, 3.182, 2.571, 2.262], abs=0.0005)
    assert multiplier(1, 0.05, "fixed-n") == math.inf
    assert (fewest_rounds(0.05, "fixed-n"), fewest_rounds(0.05, "any time")) == (2, 4)


@given(st.integers(2, 60), st.floats(0.001, 0.5))
def test_a_look_at_any_time_is_wider_than_a_fixed_one(n: int, alpha: float) -> None:
    """What holds at every look cannot be narrower than what holds at one."""
    assert multiplier(n, alpha, "any time") > multiplier(n, alpha, "fixed-n")


@pytest.mark.parametrize("rule", RULES)
def test_p_and_multiplier_say_the_same(rule: Rule) -> None:
    """At the multiplier p is alpha, in both directions; one round says nothing."""
    for n in (5, 8, 30):
        for sign in (-1, 1):
            assert p_value(sign * multiplier(n, 0.05, rule), n, rule) == pytest.approx(0.05)
    assert p_value(math.inf, 1, rule) == 1
    assert p_value(math.inf, 5, rule) <= 0.01
    assert p_value(0.0, 5, rule) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("mean", "margin"), [(0.1, 0.05), (-0.03, 0.01), (0.0, 0.05), (0.02, 0.1)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_forecast_is_the_first_number_that_decides(
    rule: Rule, mean: float, margin: float, alpha: float
) -> None:
    """At the forecast the interval decides; one round earlier it does not."""
    found = rounds_to_decide(mean, 0.1, 3, margin, rule, alpha)
    assert found is not None
    assert found > 3
    assert decides(rule, mean, 0.1, found, margin, alpha)
    assert not decides(rule, mean, 0.1, found - 1, margin, alpha)


@pytest.mark.parametrize("rule", RULES)
def test_a_forecast_has_ends(rule: Rule) -> None:
    """Never fewer rounds than were made or than the rule takes; none where a thousand would not do."""
    assert rounds_to_decide(3.0, 0.01, 9, 0.05, rule) == 9
    assert rounds_to_decide(3.0, 0.0, 1, 0.05, rule) == fewest_rounds(0.05, rule)
    assert rounds_to_decide(0.001, 1.0, 6, 0.0001, rule) is None
    exact = math.log1p(0.05)  # a mean at the margin excludes 0, if anything
    assert rounds_to_decide(exact, 3.0, 6, 0.05, rule) is None
    assert MOST_ROUNDS == 1000


def test_looks_cost_rounds() -> None:
    """The same mean and spread take more rounds where each may be the last, and more at a smaller alpha."""
    fixed, any_time, drawn = (rounds_to_decide(0.1, 0.1, 3, 0.05, rule) for rule in RULES)
    assert any_time == drawn, "what is wider is the standard error, which the caller gives"
    strict = rounds_to_decide(0.1, 0.1, 3, 0.05, "any time", 0.01)
    assert fixed is not None
    assert any_time is not None
    assert strict is not None
    assert fixed < any_time < strict

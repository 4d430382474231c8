"""Variance components of made-up tables, by hand and against noise that was put in."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from disagglab.errors import InvalidRun
from disagglab.stats.components import (
    RunCost,
    Spread,
    best_length,
    spread,
    upper_sd,
    variance_of_a_run,
    within,
)

E = math.e


def test_what_arms_and_rounds_explain_is_no_spread_between_runs() -> None:
    """Arms that differ by a factor and rounds that differ by another leave nothing over."""
    found = spread([[1.0, E, E**2], [2.0, 2 * E, 2 * E**2]])
    assert found.between_runs == pytest.approx(0.0, abs=1e-12)
    assert found.between_rounds == pytest.approx(1.0)
    assert found.freedom == 2


def test_a_table_by_hand() -> None:
    """Logarithms 0 1 / 0 -1: residuals are a half each, so 4 x 1/4 over one degree of freedom."""
    found = spread([[1.0, E], [1.0, 1 / E]])
    assert found.between_runs == pytest.approx(1.0)
    assert found.of_a_pair == pytest.approx(math.sqrt(2))
    assert found.between_rounds == 0.0, "a negative estimate is none"


def test_the_noise_that_was_put_in_is_found() -> None:
    """3 % between runs and 10 % between rounds, from 4 arms and 400 rounds, within a tenth."""
    source = random.Random(5)
    rounds = [source.gauss(0, 0.10) for _ in range(400)]
    table = [[math.exp(arm + common + source.gauss(0, 0.03)) for common in rounds] for arm in range(4)]
    found = spread(table)
    assert math.sqrt(found.between_runs) == pytest.approx(0.03, rel=0.1)
    assert math.sqrt(found.between_rounds) == pytest.approx(0.10, rel=0.1)


@pytest.mark.parametrize(
    "table", [[], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 0.0], [1.0, 1.0]], [[1.0, math.nan], [1, 1]]]
)
def test_a_table_that_has_no_spread_is_refused(table: list[list[float]]) -> None:
    """One arm, one round, or a value without a logarithm."""
    with pytest.raises(InvalidRun):
        spread(table)


def test_spread_within_runs_is_pooled() -> None:
    """Runs of one request tell nothing; the others weigh by their degrees of freedom."""
    assert within([[1.0], [2.0]]) is None
    assert within([]) is None
    assert within([[1.0, E], [3.0, 3.0, 3.0]]) == pytest.approx(0.5 / 3)


def test_a_longer_run_shrinks_only_what_lies_within_it() -> None:
    found = Spread(between_runs=0.04, freedom=9, between_rounds=0.0)
    assert variance_of_a_run(found, inside=0.03, measured=3, requests=3) == pytest.approx(0.04)
    assert variance_of_a_run(found, inside=0.03, measured=3, requests=1) == pytest.approx(0.06)
    assert variance_of_a_run(found, inside=0.03, measured=3, requests=3000) == pytest.approx(0.03, rel=1e-3)


def normal(_: int) -> float:
    """A multiplier that does not depend on the number of rounds."""
    return 2.0


def test_the_best_length_is_that_of_the_textbook() -> None:
    """sqrt(variance within / variance between x fixed cost / cost of a request) = sqrt(9 x 4) = 6 requests.

    Kalibera and Jones (2013), for one level of repetition below the top; here the candidates around it.
    """
    found = Spread(between_runs=0.01 + 0.09 / 3, freedom=99, between_rounds=0.0)
    best = best_length(found, 0.09, 3, RunCost(4.0, 1.0), range(1, 40), 1e6, normal)
    assert best == 6


def test_runs_get_short_where_all_noise_lies_between_them() -> None:
    found = Spread(0.01, 99, 0.0)
    assert best_length(found, 0.0, 3, RunCost(1.0, 1.0), [1, 3, 12], 600.0, normal) == 1


def test_few_rounds_widen_the_interval_themselves() -> None:
    """With time for two long runs, shorter ones win though each costs more for what it tells."""

    def student(rounds: int) -> float:
        return {2: 12.7, 3: 4.3}.get(rounds, 2.5)

    found = Spread(0.09 / 3, 99, 0.0)
    asked = (found, 0.09, 3, RunCost(1.0, 1.0))
    assert best_length(*asked, [3, 12], 26.0, normal) == 12
    assert best_length(*asked, [3, 12], 26.0, student) == 3


def test_no_length_fits_into_no_time() -> None:
    """The shortest is then as good as any: no plan has a round of it."""
    assert best_length(Spread(0.01, 9, 0.0), 0.01, 1, RunCost(1.0, 1.0), [4, 2], 0.0, normal) == 2


def test_pooled_spread_is_that_of_a_pair() -> None:
    """A pair of independent runs varies by the root of two of one run."""
    source = random.Random(6)
    a, b = ([math.exp(source.gauss(0, 0.05)) for _ in range(500)] for _ in range(2))
    seen = statistics.stdev(math.log(y / x) for x, y in zip(a, b, strict=True))
    assert spread([a, b]).of_a_pair == pytest.approx(seen)


def test_few_rounds_may_show_too_small_a_spread() -> None:
    """The true deviation lies below the upper limit in so many of a hundred sets of rounds.

    Oracle: simulation; and the table of chi-square (0.2 quantile of 2 degrees of freedom: 0.446).
    """
    assert upper_sd(1.0, 2, 0.8) == pytest.approx(math.sqrt(2 / 0.446), rel=1e-3)
    source = random.Random(7)
    below = 0
    for _ in range(2000):
        found = statistics.stdev(source.gauss(0, 1) for _ in range(4))
        below += upper_sd(found, 3, 0.8) >= 1.0
    assert below / 2000 == pytest.approx(0.8, abs=0.03)

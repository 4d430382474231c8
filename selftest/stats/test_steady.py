"""Warm-up, growth and Little's law: worked out by hand, and against definitions written down anew.

Oracles: the formula of MSER in exact fractions, all orders of six values, the time of every request within a
window added up in whole numbers.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagglab.stats import steady

unhurried = settings(deadline=None)  # a busy machine is no finding
NOISE = (0.1, -0.1, 0.05, -0.05, 0.0)


def test_a_warm_up_is_left_out() -> None:
    """Two batches on the way up, twelve on the level: 10 values go, and what is behind the last whole batch
    is not looked at.
    """
    values = [0.0] * 5 + [4.0] * 5 + [9 + NOISE[i % 3] for i in range(60)]
    assert steady.left_out(values) == 10
    assert steady.left_out([*values, 1e6]) == 10


def test_nothing_is_left_out_of_a_level() -> None:
    """Where all values are equal the error is 0 for each d, and the smallest d counts."""
    assert steady.left_out([2.0] * 50) == 0
    assert steady.left_out([7 + NOISE[i % 5] for i in range(75)]) == 0


def test_a_run_too_short_for_the_rule_has_no_warm_up() -> None:
    """Fewer than ten batches; or values that rise to the end: the least error lies in the second half."""
    assert steady.left_out([2.0] * 49) is None
    assert steady.left_out([float(i) for i in range(100)]) is None
    assert steady.left_out([float(i) for i in range(50)]) is None, "half of it is the second half"
    assert steady.left_out([0.0] * 50 + [9 + NOISE[i % 3] for i in range(50)]) is None


def squared_error(means: list[Fraction], d: int) -> Fraction:
    """Of the mean of what is left without the first d batches, by the published formula."""
    left = means[d:]
    mean = sum(left, Fraction(0)) / len(left)
    return sum(((one - mean) ** 2 for one in left), Fraction(0)) / len(left) ** 2


@unhurried
@given(st.lists(st.integers(0, 9), min_size=50, max_size=80))
def test_the_least_squared_error_decides(values: list[int]) -> None:
    """The first d of the least error, among all that leave five batches."""
    count = len(values) // 5
    means = [Fraction(sum(values[5 * i : 5 * i + 5]), 5) for i in range(count)]
    errors = [squared_error(means, d) for d in range(count - 4)]
    found = steady.left_out([float(value) for value in values])
    if found is not None:
        assert found % 5 == 0
        assert 2 * (found // 5) < count
        assert float(errors[found // 5]) == pytest.approx(float(min(errors)), abs=1e-12)
    else:
        late = min(error for d, error in enumerate(errors) if 2 * d >= count)
        assert float(late) == pytest.approx(float(min(errors)), abs=1e-12)


def test_what_arrivals_find() -> None:
    """The third comes when the first one leaves; the fourth finds the second and the third."""
    assert steady.found_in_system([0, 1, 2, 3], [2, 9, 9, 1]) == [0, 1, 1, 2]
    assert steady.found_in_system([0, 0, 0], [0, 0, 0]) == [0, 0, 0]
    assert steady.found_in_system([], []) == []


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=12))
def test_every_earlier_request_that_is_not_over_is_found(requests: list[tuple[int, int]]) -> None:
    requests.sort(key=lambda one: one[0])
    starts, times = [start for start, _ in requests], [time for _, time in requests]
    expected = [sum(s + t > at for s, t in requests[:place]) for place, at in enumerate(starts)]
    assert steady.found_in_system(starts, times) == expected


def test_p_of_growth_by_hand() -> None:
    """Of 720 orders of six means one only rises, and five more have one pair that falls."""
    rising = [float(i) for i in range(24)]
    assert steady.growth_p(rising) == pytest.approx(1 / 720)
    swapped = [0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 5, 5]
    assert steady.growth_p(swapped) == pytest.approx(6 / 720)
    assert steady.growth_p(rising[::-1]) == pytest.approx(1)
    assert steady.growth_p([3.0] * 24) == pytest.approx(1), "no growth, so no pair counts as a rise"
    assert steady.growth_p(rising[:11]) is None


def test_p_of_growth_is_exact() -> None:
    """Over all orders of six different values, a share of at most p has that p or less."""
    found = sorted(
        steady.growth_p([float(value) for value in order for _ in range(2)]) or 0.0
        for order in itertools.permutations(range(6))
    )
    assert len(found) == 720
    for place, p in enumerate(found):
        if place == 719 or found[place + 1] > p:
            assert p == pytest.approx((place + 1) / 720)


def test_little_by_hand() -> None:
    """Arrivals at 0, 2, 4 and 6 s, up to the last one: 1 + 4 + 2 request seconds within 6 s."""
    found = steady.balance([0.0, 2.0, 4.0, 6.0], [1.0, 6.0, 2.0, 5.0])
    assert found is not None
    assert (found.window_s, found.rate_per_s, found.e2e_s) == (6.0, 0.5, 3.0)
    assert found.in_system == pytest.approx(7 / 6)
    assert found.ratio == pytest.approx(7 / 9)


def test_little_behind_a_warm_up_counts_what_is_still_there() -> None:
    """From the arrival at 4 s on the second request is still under way: 2 + 2 request seconds within 2 s."""
    found = steady.balance([0.0, 2.0, 4.0, 6.0], [1.0, 6.0, 2.0, 5.0], first=2)
    assert found is not None
    assert (found.in_system, found.rate_per_s, found.e2e_s) == (2.0, 0.5, 2.0)


@pytest.mark.parametrize(
    "requests", [([], []), ([1.0], [1.0]), ([1.0, 1.0], [1.0, 1.0]), ([0.0, 1.0], [0.0, 1.0])]
)
def test_without_time_there_is_no_balance(requests: tuple[list[float], list[float]]) -> None:
    assert steady.balance(*requests) is None


def test_the_ratio_of_a_queue_that_grows_is_service_over_arrivals() -> None:
    """An arrival every second, one served in 1.25 s: the ratio tends to 0.8. Served in 0.5 s it is 1."""
    count = 1000
    starts = [float(i) for i in range(count)]
    behind = steady.balance(starts, [1.25 * (i + 1) - i for i in range(count)])
    ahead = steady.balance(starts, [0.5] * count)
    assert behind is not None
    assert ahead is not None
    assert behind.ratio == pytest.approx(0.8, abs=0.01)
    assert ahead.ratio == pytest.approx(1)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 15)), min_size=2, max_size=12),
    st.integers(0, 10),
)
def test_number_and_time_differ_by_what_crosses_the_edges(
    requests: list[tuple[int, int]], first: int
) -> None:
    """L x window = lambda x W x window + time of earlier requests within - time of its requests behind it."""
    requests.sort(key=lambda one: one[0])
    first = min(first, len(requests) - 2)
    begin, end = requests[first][0], requests[-1][0]
    found = steady.balance([float(s) for s, _ in requests], [float(t) for _, t in requests], first)
    if begin == end:
        assert found is None
        return
    assert found is not None
    brought = sum(max(0, min(s + t, end) - begin) for s, t in requests[:first])
    left = sum(max(0, s + t - end) for s, t in requests[first:-1])
    within = found.rate_per_s * found.e2e_s * found.window_s
    assert found.in_system * found.window_s == pytest.approx(within + brought - left)

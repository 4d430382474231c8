"""Change points: how often one is shown where nothing changed, and how often a step is found.

Oracle: series made here from a seeded generator, so that what is in them is known; Student's t of scipy where
only one split is possible; an exhaustive search for the segmentation. Noise has a standard deviation of 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from disagglab.errors import InvalidRun
from disagglab.stats import changepoint
from disagglab.stats.changepoint import MIN_SIDE, NULL_DRAWS, PENALTY, find, propose, segments

NOISE = 0.05
RUNS = 20
SERIES = 200
NOMINAL = 0.05
STEP = 1.2
STEPS = 100


def normal(generator: np.random.Generator, n: int) -> Any:
    """Normal noise on a logarithmic scale."""
    return NOISE * generator.standard_normal(n)


def heavy(generator: np.random.Generator, n: int) -> Any:
    """Noise of Student's t with 3 degrees of freedom, scaled to the same standard deviation."""
    return NOISE / math.sqrt(3) * generator.standard_t(3, n)


def false_alarms(noise: Callable[[np.random.Generator, int], Any]) -> int:
    """How many of 200 series of 20 values around one level show a change point."""
    generator = np.random.default_rng(2)
    return sum(bool(find(list(np.exp(noise(generator, RUNS))))) for _ in range(SERIES))


@pytest.mark.parametrize("noise", [normal, heavy])
def test_a_constant_series_shows_none(noise: Callable[[np.random.Generator, int], Any]) -> None:
    """At most the nominal 5 % of constant series show a change point, under normal and heavy-tailed noise."""
    assert false_alarms(noise) <= NOMINAL * SERIES


def test_a_low_penalty_and_a_plain_test_raise_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the penalty of BIC and Welch's t at the chosen place, more than twice 5 % show one."""

    def welch(logs: Any, left: int) -> float:
        return float(stats.ttest_ind(logs[:left], logs[left:], equal_var=False).pvalue)

    monkeypatch.setattr(changepoint, "PENALTY", 2.0)
    monkeypatch.setattr(changepoint, "_p", welch)
    assert false_alarms(normal) > 2 * NOMINAL * SERIES


def test_a_step_is_found_at_its_place() -> None:
    """A step of 20 % in the middle of 20 values is found at its place or one beside it, in 95 of 100."""
    generator = np.random.default_rng(3)
    hits, ratios = 0, []
    for _ in range(STEPS):
        logs = normal(generator, RUNS)
        logs[RUNS // 2 :] += math.log(STEP)
        near = [change for change in find(list(np.exp(logs))) if abs(change.index - RUNS // 2) <= 1]
        hits += len(near) == 1
        ratios += [change.change for change in near]
    assert hits >= 0.95 * STEPS
    assert float(np.mean(ratios)) == pytest.approx(STEP - 1, abs=0.02)


def test_two_steps_have_three_levels() -> None:
    """Up by a half and back: two change points, with the geometric means of their neighbours."""
    generator = np.random.default_rng(4)
    logs = normal(generator, 24)
    logs[8:16] += math.log(1.5)
    values = list(np.exp(logs))
    up, down = find(values)
    assert (up.index, down.index) == (8, 16)
    assert up.after == down.before == pytest.approx(stats.gmean(values[8:16]))
    assert up.before == pytest.approx(stats.gmean(values[:8]))
    assert down.after == pytest.approx(stats.gmean(values[16:]))
    assert up.change > 0 > down.change


def test_with_one_possible_split_p_is_that_of_student() -> None:
    """Six values can be split in one place alone, so p is that of the t test, but for the draws."""
    for shift in (0.02, 0.1, 0.2):
        logs = normal(np.random.default_rng(5), 6) + np.array([0, 0, 0, shift, shift, shift])
        exact = float(stats.ttest_ind(logs[:3], logs[3:]).pvalue)
        assert changepoint._p(logs, 3) == pytest.approx(exact, abs=4 * math.sqrt(exact / NULL_DRAWS))


def exhaustive(logs: Any, penalty: float) -> list[int]:
    """The cheapest segmentation by dynamic programming over all of them."""
    n = len(logs)
    best: list[tuple[float, list[int]]] = [(-penalty, []), *((math.inf, []) for _ in range(n))]
    for stop in range(MIN_SIDE, n + 1):
        for start in range(stop - MIN_SIDE + 1):
            cost, places = best[start]
            cost += penalty + float(np.sum((logs[start:stop] - np.mean(logs[start:stop])) ** 2))
            if cost < best[stop][0] - 1e-12:
                best[stop] = (cost, [*places, start] if start else places)
    return best[n][1]


def test_proposals_are_the_best_segmentation() -> None:
    """PELT with a least length of segments may miss the optimum; at this penalty it does not here."""
    generator = np.random.default_rng(6)
    proposed = 0
    for number in range(60):
        logs = normal(generator, RUNS)
        logs[7:] += 0.1 * (number % 3)
        penalty = PENALTY * changepoint._noise(logs) ** 2 * math.log(RUNS)
        assert propose(logs) == exhaustive(logs, penalty)
        proposed += bool(propose(logs))
    assert 20 < proposed < 60


def test_the_unit_does_not_matter() -> None:
    """In milliseconds instead of seconds the same points have the same p."""
    logs = normal(np.random.default_rng(7), RUNS)
    logs[5:] -= 0.3
    in_s, in_ms = find(list(np.exp(logs))), find(list(1000 * np.exp(logs)))
    assert [(c.index, c.p) for c in in_s] == [(c.index, c.p) for c in in_ms]
    assert [c.index for c in in_s] == [5]


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([2.0] * 8, []),
        ([1.0, 1.0, 1.0, 1.2, 1.2, 1.2], [3]),
        ([1.0] * 9 + [1.2] * 3, [9]),
        ([1.0] * 10 + [1.2] * 2, [9]),
        ([1.0] * 11 + [1.2], []),
        ([1.0] * 5 + [3.0] + [1.0] * 6, []),
    ],
    ids=[
        "constant",
        "three and three",
        "near the end",
        "two after, placed one early",
        "one after",
        "one outlier",
    ],
)
def test_values_without_noise(values: list[float], places: list[int]) -> None:
    """Equal values have no noise to divide by; each side has three values, so a clear step with only two
    after it is placed one early.
    """
    assert [change.index for change in find(values)] == places


@pytest.mark.parametrize(
    "values", [[1.0] * 5, [], [1.0] * 6 + [0.0], [1.0] * 6 + [-1.0], [1.0] * 6 + [math.nan]]
)
def test_what_has_no_logarithm_or_is_too_short_is_refused(values: list[float]) -> None:
    """Never a change point from fewer than six values, nor from a value without a logarithm."""
    with pytest.raises(InvalidRun, match="values"):
        find(values)


def test_segments_cover_the_series() -> None:
    """Pieces meet at the given places, each with its geometric mean."""
    first, second = segments([1.0, 4.0, 9.0], [2])
    assert (first.start, first.stop, second.start, second.stop) == (0, 2, 2, 3)
    assert [first.level, second.level] == pytest.approx([2.0, 9.0])

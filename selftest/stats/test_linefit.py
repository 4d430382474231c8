"""The fitted line on transfers whose constants are known."""

from __future__ import annotations

import random

import pytest

from disagglab.errors import InvalidRun
from disagglab.stats import linefit

LATENCY_S, BYTES_PER_S = 0.004, 2e9
SIZES = [size * 2**20 for size in (3, 11, 22, 45, 68)]


def exact(size: float) -> float:
    """Time of a transfer without noise, s."""
    return LATENCY_S + size / BYTES_PER_S


def test_both_constants_come_back() -> None:
    """Without noise the line is the one that the times were made with, and predicts between its points."""
    line = linefit.fit(SIZES, [exact(size) for size in SIZES])
    assert line.latency_s == pytest.approx(LATENCY_S)
    assert line.bytes_per_s == pytest.approx(BYTES_PER_S)
    assert line.r_squared == pytest.approx(1)
    assert line.time_s(5e6) == pytest.approx(exact(5e6))


def test_the_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Of 400 noisy experiments, 95 % intervals hold the true constants in 92 % to 98 %."""
    noise = random.Random(7)
    covered = {"latency": 0, "bandwidth": 0}
    for _ in range(400):
        sizes = SIZES * 5
        line = linefit.fit(sizes, [exact(size) + noise.gauss(0, 0.002) for size in sizes])
        covered["latency"] += line.latency_ci_s[0] <= LATENCY_S <= line.latency_ci_s[1]
        covered["bandwidth"] += line.bytes_per_s_ci[0] <= BYTES_PER_S <= line.bytes_per_s_ci[1]
    assert all(0.92 * 400 <= count <= 0.98 * 400 for count in covered.values()), covered


def test_noise_larger_than_the_effect_leaves_the_bandwidth_open() -> None:
    """Where a flat line is not excluded, the interval has no upper end."""
    times = [0.010, 0.002, 0.011, 0.003, 0.012]
    assert linefit.fit(SIZES, times).bytes_per_s_ci[1] == float("inf")


@pytest.mark.parametrize(
    ("sizes", "times"), [([], []), ([1, 2], [1, 2]), ([5, 5, 5], [1, 2, 3]), ([1, 2, 3], [3, 2, 1])]
)
def test_what_decides_no_line_is_refused(sizes: list[float], times: list[float]) -> None:
    """Too few points, one size, or times that fall with size."""
    with pytest.raises(InvalidRun, match=r"points|grow"):
        linefit.fit(sizes, times)

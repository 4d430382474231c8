"""Whether requests that arrive by themselves meet a steady state: warm-up, a queue that grows, Little's law.

All functions take the requests of one run in the order of their arrival; times are seconds from any one
moment. docs/reference/metrics.md has the rates of false alarms and of finds, a selftest holds them.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MSER_BATCH = 5  # values; S. Spratt's MSER-5
MSER_LEAST_LEFT = 5  # batches; of fewer the squared error says nothing (Hoad, Robinson and Davies)
MSER_LEAST = 2 * MSER_LEAST_LEFT  # batches; with fewer the rule could not look at all of the first half
GROWTH_BATCHES = 6  # more are less independent and give more false alarms, fewer have no p below 1 %
GROWTH_LEAST = 2 * GROWTH_BATCHES  # arrivals; one of a batch alone is no mean


def left_out(values: Sequence[float], batch: int = MSER_BATCH) -> int | None:
    """How many of the first values belong to the warm-up, by the rule MSER-m; a multiple of ``batch``.

    Of k means Z of ``batch`` values each, the first d are left out for which

        sum over j > d of (Z_j - mean of those Z)^2 / (k - d)^2

    is smallest: the squared standard error of the mean of what is left. Values behind the last whole batch
    are not looked at.

    Returns:
        None if the run is too short for the rule: it has fewer than ``MSER_LEAST`` batches, or the smallest
        error lies in the second half (d >= k / 2).

    Source: K. P. White, An effective truncation heuristic for bias reduction in simulation output, Simulation
    69 (1997); batches of 5: S. Spratt (1998), and White, Cobb and Spratt, Proc. Winter Simulation Conference
    2000. That d leaves ``MSER_LEAST_LEFT`` batches at least: Hoad, Robinson and Davies, Automating warm-up
    length estimation, Proc. Winter Simulation Conference 2008.
    """
    count = len(values) // batch
    if count < MSER_LEAST:
        return None
    means = [math.fsum(values[i * batch : (i + 1) * batch]) / batch for i in range(count)]

    def error(d: int) -> float:
        kept = means[d:]
        mean = math.fsum(kept) / len(kept)
        return math.fsum((value - mean) ** 2 for value in kept) / len(kept) ** 2

    best = min(range(count - MSER_LEAST_LEFT + 1), key=error)
    return None if 2 * best >= count else best * batch


def found_in_system(start_s: Sequence[float], e2e_s: Sequence[float]) -> list[int]:
    """How many requests each arrival finds under way, itself not counted."""
    under_way: list[float] = []
    found = []
    for start, e2e in zip(start_s, e2e_s, strict=True):
        while under_way and under_way[0] <= start:
            heapq.heappop(under_way)
        found.append(len(under_way))
        heapq.heappush(under_way, start + e2e)
    return found


def growth_p(numbers: Sequence[float]) -> float | None:
    """p that the numbers do not grow from the first to the last; None with fewer than ``GROWTH_LEAST``.

    One-sided Mann-Kendall over the means of ``GROWTH_BATCHES`` equal parts: p is the share of all orders of
    so many values in which no more pairs fall. Neighbouring arrivals see nearly the same queue; means of
    parts depend on each other less. Equal means count as a fall, so that p is rather too large.

    Source: H. B. Mann, Nonparametric tests against trend, Econometrica 13 (1945); of the distribution: M.
    Kendall, Rank correlation methods.
    """
    if len(numbers) < GROWTH_LEAST:
        return None
    edges = [len(numbers) * part // GROWTH_BATCHES for part in range(GROWTH_BATCHES + 1)]
    means = [statistics.fmean(numbers[a:b]) for a, b in itertools.pairwise(edges)]
    fall = sum(later <= earlier for i, earlier in enumerate(means) for later in means[i + 1 :])
    return _tail(GROWTH_BATCHES)[fall]


@functools.cache
def _tail(count: int) -> list[float]:
    """By number of pairs that fall: the share of all orders of ``count`` different values with no more."""
    shares = [Fraction(1)]
    for size in range(2, count + 1):
        longer = [Fraction(0)] * (len(shares) + size - 1)
        for inversions, share in enumerate(shares):
            for more in range(size):
                longer[inversions + more] += share / size
        shares = longer
    return [float(sum(shares[: place + 1])) for place in range(len(shares))]


@dataclass(frozen=True)
class Balance:
    """Little's law over a window: mean number in system, arrivals per second, mean E2E of those that arrive.

    The law says in_system = rate_per_s x e2e_s of a system in steady state. Within a window they differ by
    what crosses its edges, exactly:

        in_system x window = rate x e2e x window + time of earlier arrivals within - time of these behind it
    """

    window_s: float
    in_system: float
    rate_per_s: float
    e2e_s: float

    @property
    def ratio(self) -> float:
        """L / (lambda W). Where a queue grows evenly it tends to rate of service over rate of arrivals."""
        return self.in_system / (self.rate_per_s * self.e2e_s)


def balance(start_s: Sequence[float], e2e_s: Sequence[float], first: int = 0) -> Balance | None:
    """Little's law from arrival number ``first`` up to the last arrival, which is no longer within.

    Returns:
        None where nothing arrives or no time passes.

    Source: J. D. C. Little, A proof for the queuing formula L = lambda W, Operations Research 9 (1961); of
    finite windows: S.-H. Kim and W. Whitt, Statistical analysis with Little's law, Operations Research 61
    (2013).
    """
    within = e2e_s[first:-1]
    spent = math.fsum(within)
    if not within or spent <= 0:
        return None
    begin, end = start_s[first], start_s[-1]
    window = end - begin
    if window <= 0:
        return None
    inside = math.fsum(
        max(0.0, min(start + e2e, end) - max(start, begin)) for start, e2e in zip(start_s, e2e_s, strict=True)
    )
    return Balance(window, inside / window, len(within) / window, spent / len(within))

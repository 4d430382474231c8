"""Where the level of a series changes for good: proposed by a segmentation, shown after a test.

All is computed on logarithms, so a change is a ratio. PELT (``ruptures``, squared error) proposes change
points; its penalty per change point is ``PENALTY`` x variance x ln(n), with the variance from the median of
the differences between neighbours, which a few steps do not move. Each proposal is then tested between its
two neighbouring segments: two-sided, Student's t with a common variance, held against the largest t over all
places where the two segments could have been split, because the place was chosen for being the most extreme
one; a plain t test would forget that choice. Holm's correction is over the proposals of the series.

Its selftest holds the rates of false alarms and of finds; docs/explanation/history.md has figures.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disagglab.errors import InvalidRun
from disagglab.stats.verdict import CONFIDENCE, holm

MIN_SIDE = 3  # values on each side of a change point
MIN_VALUES = 2 * MIN_SIDE
PENALTY = 5.0  # at 4, false alarms of 12 values reach the nominal 5 %; at 6, more late steps are missed
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
NULL_DRAWS = 10_000
NULL_CHUNKS = 10  # keeps memory low where a series is long
NULL_SEED = 20_260_101  # the same series gives the same p on every machine
SLACK = 1e-12  # of floating-point sums in another order


@dataclass(frozen=True)
class ChangePoint:
    """The series has one level before and another from value ``index`` on.

    ``before``, ``after``: geometric means of the neighbouring segments, in the unit of the values. ``p``:
    two-sided, of no change, after Holm.
    """

    index: int
    before: float
    after: float
    p: float

    @property
    def change(self) -> float:
        """after / before - 1."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Segment:
    """Values ``start`` to ``stop`` - 1 of a series, and their geometric mean."""

    start: int
    stop: int
    level: float


def find(values: Sequence[float]) -> tuple[ChangePoint, ...]:
    """The confirmed change points of a series, in order.

    Raises:
        InvalidRun: if there are fewer than ``MIN_VALUES`` values, or one is not positive and finite.
    """
    if len(values) < MIN_VALUES:
        raise InvalidRun(f"{len(values)} values are too few for a change point; {MIN_VALUES} are needed")
    logs = np.array(_logs(values))
    proposed = propose(logs)
    edges = [0, *proposed, len(logs)]
    adjusted = holm([_p(logs[a:c], b - a) for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)])
    confirmed = [(index, p) for index, p in zip(proposed, adjusted, strict=True) if p <= 1 - CONFIDENCE]
    levels = segments(values, [index for index, _ in confirmed])
    return tuple(
        ChangePoint(index, left.level, right.level, p)
        for (index, p), (left, right) in zip(confirmed, itertools.pairwise(levels), strict=True)
    )


def segments(values: Sequence[float], indices: Sequence[int]) -> list[Segment]:
    """The pieces between change points at ``indices``.

    Raises:
        InvalidRun: if a value is not positive and finite.
    """
    logs = _logs(values)
    edges = [0, *indices, len(logs)]
    return [Segment(a, b, math.exp(math.fsum(logs[a:b]) / (b - a))) for a, b in itertools.pairwise(edges)]


def propose(logs: Any) -> list[int]:
    """Where PELT would split an array of logarithms; candidates only.

    PELT of ruptures 1.1.10 may miss the best segmentation where segments have a least length
    (deepcharles/ruptures#383). At this penalty the selftests find no difference from an exact search.
    """
    import ruptures

    variance = _noise(logs) ** 2
    if variance == 0:
        return []
    penalty = PENALTY * variance * math.log(len(logs))
    model = ruptures.Pelt(model="l2", min_size=MIN_SIDE, jump=1).fit(logs)
    return [int(index) for index in model.predict(pen=penalty)[:-1]]


def _logs(values: Sequence[float]) -> list[float]:
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise InvalidRun(f"values must be positive and finite: {list(values)}")
    return [math.log(value) for value in values]


def _noise(logs: Any) -> float:
    """Standard deviation of the noise, from differences of neighbours; 0 only if all values are equal.

    Where more than half of the differences are equal their median deviation is 0; then their standard
    deviation is taken.
    """
    steps = np.diff(logs)
    robust = MAD_TO_DEVIATION * float(np.median(np.abs(steps - np.median(steps))))
    return (robust or float(np.std(steps))) / math.sqrt(2)


def _shares(rows: Any) -> Any:
    """For each row, and each place where it may be split: the share of the sum of squares that two levels
    explain instead of one. It grows with the absolute t of the two sides.
    """
    n = rows.shape[1]
    left = np.arange(MIN_SIDE, n - MIN_SIDE + 1)
    centred = rows - rows.mean(axis=1, keepdims=True)
    sums = np.cumsum(centred, axis=1)[:, left - 1]
    return sums**2 * (1 / left + 1 / (n - left)) / np.sum(centred**2, axis=1, keepdims=True)


@functools.lru_cache(maxsize=1024)
def _null(n: int) -> Any:
    """Sorted largest shares of ``NULL_DRAWS`` series of n normal values without any change."""
    generator = np.random.default_rng(NULL_SEED)
    size = (NULL_DRAWS // NULL_CHUNKS, n)
    draws = [_shares(generator.standard_normal(size)).max(axis=1) for _ in range(NULL_CHUNKS)]
    return np.sort(np.concatenate(draws))


def _p(logs: Any, left: int) -> float:
    """p of no change at ``left`` within these values; the smallest possible is 1 / (NULL_DRAWS + 1)."""
    share = float(_shares(logs[np.newaxis])[0, left - MIN_SIDE])
    as_large = NULL_DRAWS - int(np.searchsorted(_null(len(logs)), share - SLACK))
    return (1 + as_large) / (1 + NULL_DRAWS)

"""A series of equal runs: how alike neighbours are, and how far two equal arms would seem to lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from disagglab.errors import InvalidRun


def autocorrelation(values: Sequence[float], lag: int = 1) -> float:
    """Of a series at a lag; its mean is its own. 0 for a series without any spread.

    Raises:
        InvalidRun: with fewer than two values beyond the lag.
    """
    if len(values) < lag + 2:
        raise InvalidRun(f"{len(values)} values have no autocorrelation at lag {lag}")
    mean = math.fsum(values) / len(values)
    around = [value - mean for value in values]
    spread = math.fsum(value * value for value in around)
    both = zip(around, around[lag:], strict=False)
    return math.fsum(first * second for first, second in both) / spread if spread else 0.0


def _pairs(window: Sequence[float]) -> list[float]:
    return [second - first for first, second in zip(window[::2], window[1::2], strict=True)]


def _mirrored(window: Sequence[float]) -> float:
    return statistics.fmean(one if number % 2 == 0 else -one for number, one in enumerate(_pairs(window)))


def _by_lot(window: Sequence[float]) -> float:
    """The root of what is expected over all ways to draw who is first."""
    found = _pairs(window)
    return math.sqrt(math.fsum(one * one for one in found)) / len(found)


def _blocks(window: Sequence[float]) -> float:
    half = len(window) // 2
    return statistics.fmean(window[half:]) - statistics.fmean(window[:half])


DESIGNS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mirrored pairs": _mirrored,
    "pairs by lot": _by_lot,
    "pairs in one order": lambda window: statistics.fmean(_pairs(window)),
    "one arm after the other": _blocks,
}


def design_errors(values: Sequence[float], pairs: int) -> dict[str, float]:
    """Root mean square of what each order of two arms would call their difference, all runs being of one.

    Every stretch of the series that holds so many pairs is cut into arms A and B as the design would have
    them. Stretches overlap, so the figures are steadier than one stretch and not independent of each other.

    Args:
        values: logarithms of a run's figure, in the order of measuring.

    Raises:
        InvalidRun: if the series holds no such stretch.
    """
    length = 2 * pairs
    windows = [values[start : start + length] for start in range(len(values) - length + 1)]
    if pairs < 1 or not windows:
        raise InvalidRun(f"{len(values)} values hold no {pairs} pairs")
    return {
        name: math.sqrt(statistics.fmean(design(window) ** 2 for window in windows))
        for name, design in DESIGNS.items()
    }

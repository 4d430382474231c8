"""Transfer time as a line: latency + bytes / bandwidth, fitted to measured transfers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.errors import InvalidRun

CONFIDENCE = 0.95


@dataclass(frozen=True)
class LineFit:
    """Both constants with their 95 % intervals (Student t, least squares over all points).

    Seconds, and bytes per second. An interval of the bandwidth that has no upper end is infinite there.
    """

    latency_s: float
    latency_ci_s: tuple[float, float]
    bytes_per_s: float
    bytes_per_s_ci: tuple[float, float]
    r_squared: float
    points: int

    def time_s(self, size_bytes: float) -> float:
        """Predicted time of a transfer of ``size_bytes``."""
        return self.latency_s + size_bytes / self.bytes_per_s


def fit(sizes: Sequence[float], times_s: Sequence[float]) -> LineFit:
    """Least squares through (bytes, seconds).

    Raises:
        InvalidRun: with fewer than three points, with one size only, if a figure is not a finite number or
            too large or small for a line, or if time does not grow with size.
    """
    import numpy as np
    import scipy.stats

    if len(sizes) < 3 or len(set(sizes)) < 2:
        raise InvalidRun(
            f"{len(sizes)} points of {len(set(sizes))} sizes decide no line; three of two are needed"
        )
    if not all(math.isfinite(value) for value in (*sizes, *times_s)):
        raise InvalidRun(f"a line needs finite sizes and times: {list(zip(sizes, times_s, strict=True))}")
    with np.errstate(all="ignore"):
        line = scipy.stats.linregress(sizes, times_s)
    constants = (line.slope, line.intercept, line.stderr, line.intercept_stderr, line.rvalue)
    if not all(map(math.isfinite, constants)):
        raise InvalidRun(f"sizes from {min(sizes):g} to {max(sizes):g} B decide no line: {constants}")
    if line.slope <= 1 / sys.float_info.max:
        raise InvalidRun(f"time does not grow with size: slope {line.slope:g} s/B")
    width = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(sizes) - 2))
    low, high = line.slope - width * line.stderr, line.slope + width * line.stderr
    spread = width * line.intercept_stderr
    return LineFit(
        latency_s=float(line.intercept),
        latency_ci_s=(float(line.intercept - spread), float(line.intercept + spread)),
        bytes_per_s=float(1 / line.slope),
        bytes_per_s_ci=(float(1 / high), float(1 / low) if low > 0 else float("inf")),
        r_squared=float(line.rvalue**2),
        points=len(sizes),
    )

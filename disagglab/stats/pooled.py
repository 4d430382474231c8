"""Log-ratios of two ways at several points (rates), with one variance for all points.

Few rounds a point tell little of their spread; the points together tell more. The assumption is that the
log-ratios of all points have the same variance, whatever their means; or, where more is known of a point
(:class:`Expected`), the same multiple of what is expected. It is looked at by Bartlett's test; where that
speaks against it, or cannot be made, each point is left with a variance of its own.

A look is no proof: variances that differ are not always found out. Simulated, three rounds at each of five
points, one of them 3 times as noisy as the others: its band of nominally 95 % holds the truth in 84 % of the
sets; with one variance whatever the look says in 71 %; with its own always in 95 %, and is then 1.5 times as
wide where all are equal. Equal variances: 93, 95 and 95 %. ``own`` asks for the last
(selftest/stats/test_pooled.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from disagglab.stats.rule import CONFIDENCE, quantile

ALPHA = 1 - CONFIDENCE
# p of Bartlett's test from which on variances are not taken to be equal. It is no claim that they differ, but
# a choice between two bands, for which 0.05 finds out too little (compare T. Bancroft, Biometrics 20, 1964).
REFUTED_AT = 0.25


@dataclass(frozen=True)
class Band:
    """A log-ratio with its limits; without a spread (one round) the limits are infinite."""

    mean: float
    low: float
    high: float

    @property
    def limited(self) -> bool:
        """Whether there is a band at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def turned(self) -> Band:
        """Of the inverse ratio."""
        return Band(-self.mean, -self.high, -self.low)


@dataclass(frozen=True)
class Expected:
    """What is known beforehand of a point's rounds. ``weight``: their variance relative to that of the other
    points; ``resolution``: a variance below which none can be, because a figure counts whole requests;
    ``tells``: whether their spread says anything of the variance.
    """

    weight: float = 1.0
    resolution: float = 0.0
    tells: bool = True


PLAIN = Expected()


@dataclass(frozen=True)
class Pooled:
    """``points``: the log-ratios of the rounds, a point each; a point has one round at the least. ``own``:
    whether each point has its own variance, whatever the look at all of them says. ``expected``: of each
    point; empty where nothing is known, so that all should have one variance.
    """

    points: tuple[tuple[float, ...], ...]
    own: bool = False
    expected: tuple[Expected, ...] = ()

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the pooled variance: the sum of (rounds - 1) of points that tell of it."""
        return sum(len(self.points[point]) - 1 for point in self._telling)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a round's log-ratio about the mean of its point, pooled, at a weight of 1;
        None if no point has two rounds that tell.
        """
        if self.freedom == 0:
            return None
        parts = [(len(self.points[point]) - 1) * self._scaled(point) for point in self._telling]
        return math.sqrt(math.fsum(parts) / self.freedom)

    @property
    def equal_p(self) -> float | None:
        """p of equal variances, once divided by their weights, by Bartlett's test over the points that tell;
        None with fewer than two of these. A point without any spread beside one with some gives 0.

        Source: M. Bartlett, Properties of sufficiency and statistical tests, Proc. R. Soc. A 160 (1937). It
        takes the log-ratios to be normal; with two or three rounds a point it finds large differences alone.
        """
        if len(self._telling) < 2:
            return None
        freedom = [len(self.points[point]) - 1 for point in self._telling]
        variances = [self._scaled(point) for point in self._telling]
        if max(variances) == 0:
            return 1.0
        if min(variances) == 0:
            return 0.0
        all_df = sum(freedom)
        total = math.fsum(df * v for df, v in zip(freedom, variances, strict=True))
        logs = math.fsum(df * math.log(v) for df, v in zip(freedom, variances, strict=True))
        correction = 1 + (sum(1 / df for df in freedom) - 1 / all_df) / (3 * (len(freedom) - 1))
        statistic = (all_df * math.log(total / all_df) - logs) / correction
        return float(special.chdtrc(len(freedom) - 1, max(statistic, 0.0)))

    @property
    def equal(self) -> bool:
        """Whether one variance is taken for all points: looked at, not refuted, and not asked against."""
        return not self.own and self.equal_p is not None and self.equal_p > REFUTED_AT

    def band(self, point: int, alpha: float = ALPHA) -> Band:
        """Student's t limits of a point's mean, each at ``alpha / 2``: of the pooled variance where equal
        variances stand, else of the point's own.
        """
        rounds = self.points[point]
        mean = math.fsum(rounds) / len(rounds)
        freedom = self.freedom if self.equal else len(rounds) - 1
        if freedom == 0:
            return Band(mean, -math.inf, math.inf)
        deviation = self.deviation
        if self.equal and deviation is not None:
            variance = deviation**2 * self._expected(point).weight
        else:
            variance = self._variance(point)
        half = quantile(1 - alpha / 2, freedom) * math.sqrt(variance / len(rounds))
        return Band(mean, mean - half, mean + half)

    @property
    def _telling(self) -> list[int]:
        numbers = range(len(self.points))
        return [point for point in numbers if len(self.points[point]) > 1 and self._expected(point).tells]

    def _expected(self, point: int) -> Expected:
        return self.expected[point] if self.expected else PLAIN

    def _variance(self, point: int) -> float:
        """Of a round at a point, by its own rounds."""
        rounds = self.points[point]
        return max(_squares(rounds) / (len(rounds) - 1), self._expected(point).resolution)

    def _scaled(self, point: int) -> float:
        return self._variance(point) / self._expected(point).weight


def _squares(values: Sequence[float]) -> float:
    """Sum of squares about the mean."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)

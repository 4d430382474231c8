"""The sample that a verdict is made of: log-ratios of pairs of runs, one a round, in their order."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.errors import InvalidRun
from disagglab.stats import sequential
from disagglab.stats.rule import ANY_TIME, Rule, multiplier, p_value

LARGEST_LOG = math.log(sys.float_info.max)
Limits = tuple[float, float]  # of an interval, log scale; infinite where so few rounds decide nothing


@dataclass(frozen=True)
class Sample:
    """Log-ratios of the rounds: mean, standard error (0 without any spread), how many, and by how much the
    error is too small where neighbours hang together.
    """

    mean: float
    error: float
    n: int
    inflation: float

    def error_of(self, rule: Rule) -> float:
        """The standard error that a rule takes."""
        return self.error * self.inflation if rule == ANY_TIME else self.error

    def limits(self, rule: Rule, alpha: float) -> Limits:
        """Confidence limits, log scale; infinite where so few rounds decide nothing.

        Args:
            alpha: of both sides together; each of the limits alone has half of it.
        """
        factor = multiplier(self.n, alpha, rule)
        if factor == math.inf:
            return -math.inf, math.inf
        half = factor * self.error_of(rule)
        return self.mean - half, self.mean + half

    def p(self, rule: Rule, bound: float = 0.0) -> float:
        """Two-sided p of the hypothesis that the true mean is ``bound``."""
        if self.mean == bound:
            return 1.0
        away, error = self.mean - bound, self.error_of(rule)
        return p_value(away / error if error else math.inf, self.n, rule)

    def p_above(self, bound: float, rule: Rule) -> float:
        """p, on the scale of a two-sided test, of the hypothesis that the true mean is ``bound`` or above.

        Of all means that it holds, ``bound`` is refuted last.
        """
        return self.p(rule, bound) if self.mean < bound else 1.0


def log_ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """ln(candidate / baseline) of each (baseline, candidate).

    Raises:
        InvalidRun: if there is no pair, or a value is not a positive finite number.
    """
    if not pairs:
        raise InvalidRun("no pair of valid runs to compare")
    if not all(math.isfinite(value) and value > 0 for pair in pairs for value in pair):
        raise InvalidRun(f"values must be positive and finite: {pairs}")
    return [_log_ratio(candidate, baseline) for baseline, candidate in pairs]


def _log_ratio(candidate: float, baseline: float) -> float:
    quotient = candidate / baseline
    exact = 0 < quotient < math.inf  # else it is too small or too large for a number, its logarithm is not
    return math.log(quotient) if exact else math.log(candidate) - math.log(baseline)


def ratio_of(log: float) -> float:
    """Ratio - 1 of a log-ratio; infinite where that is too large for a number."""
    return math.expm1(log) if log < LARGEST_LOG else math.inf


def sample_of(ratios: Sequence[float]) -> Sample:
    """The sample of log-ratios, of which there is at least one."""
    n = len(ratios)
    mean = math.fsum(ratios) / n
    spread = math.fsum((ratio - mean) ** 2 for ratio in ratios)
    error = math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0
    return Sample(mean, error, n, sequential.inflation(ratios))

"""Looks after every round: a t test that keeps its level however often it is asked, and stops when it likes.

Over the log-ratios d(1) ... d(n) of a session, in the order of measuring, with t = mean / (s / sqrt(n)):

    r    = G / (G + n)
    E(n) = sqrt(r) x ((1 + t^2 / (n - 1)) / (1 + r t^2 / (n - 1)))^(n / 2)

is the likelihood ratio of what the log-ratios say beside their scale: a true mean drawn from a normal
distribution with a deviation of sigma / sqrt(G), against a mean of 0. For independent normal noise of
whatever sigma it is a nonnegative martingale that begins with 1, so the chance that it ever reaches 1 / alpha
is at most alpha (J. Ville, 1939). The interval holds all means that it has not refuted.

Sources: T. Lai, On confidence sequences, Ann. Statist. 4 (1976); H. Wang and A. Ramdas, Anytime-valid t-tests
and confidence sequences for Gaussian means with unknown variance, arXiv 2310.03722 (2024);
M. Perez-Ortiz, T. Lardy, R. de Heide and P. Gruenwald, E-statistics, group invariance and anytime-valid
testing, Ann. Statist. 52 (2024). What noise of other kinds does to it is in docs/explanation/sequential.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

G = 0.2  # looks for effects of some 2 standard deviations of a log-ratio; chosen by simulation, see the page
MOST_AUTOCORRELATION = 0.6  # which makes the interval twice as wide; few rounds tell no more of it than that
# Added to the autocorrelation that n rounds show, over n: 1 for its bias, where the mean is unknown too, and
# 1 for what so short a series misses; with 1 alone false alarms of the simulations pass 5 % within 20 looks.
SHORTFALL = 2.0
FEWEST_CORRELATED = 3  # log-ratios below which nothing can be said of what neighbours have in common
MOST_ROUNDS = 1000  # up to here the fewest rounds are looked for


def log_e(t: float, n: int, g: float = G) -> float:
    """Logarithm of E(n) at a t statistic, which may be infinite (no spread); 0 with one round."""
    if n < 2:
        return 0.0
    r = g / (g + n)
    x = t * t / (n - 1)
    # (1 + r x) / (1 + x), which stays exact for the largest x
    return 0.5 * math.log(r) - n / 2 * math.log(r + (1 - r) / (1 + x))


def p_value(t: float, n: int, g: float = G) -> float:
    """p of a mean of 0, two-sided: its chance of ever falling to a value is at most that value."""
    return min(1.0, math.exp(-log_e(t, n, g)))


def multiplier(n: int, alpha: float, g: float = G) -> float:
    """The t statistic at which E(n) = 1 / alpha: half of the interval's width, in standard errors.

    Infinite where so few rounds cannot refute anything, however far from 0 they lie.
    """
    if n < 2:
        return math.inf
    r = g / (g + n)
    k = (alpha * math.sqrt(r)) ** (2 / n)
    return math.sqrt((n - 1) * (1 - k) / (k - r)) if k > r else math.inf


def fewest_rounds(alpha: float) -> int:
    """Rounds from which on the interval is finite."""
    return next(n for n in range(2, MOST_ROUNDS) if multiplier(n, alpha) < math.inf)


def inflation(ratios: Sequence[float]) -> float:
    """By how much the standard error is too small where successive log-ratios hang together, at least 1.

    sqrt((1 + rho) / (1 - rho)), the long-run error of an autoregressive series of order 1 (M. Bartlett,
    On the theoretical specification and sampling properties of autocorrelated time-series, J. R. Statist.
    Soc. Suppl. 8, 1946). rho is the autocorrelation of neighbours plus ``SHORTFALL`` / n, from 0 to
    ``MOST_AUTOCORRELATION``; around a mean that is estimated too the autocorrelation of independent values is
    -1 / n on average (F. Marriott and J. Pope, Bias in the estimation of autocorrelations, Biometrika 41,
    1954). It only ever widens, so what holds for independent noise goes on to hold.
    """
    n = len(ratios)
    mean = math.fsum(ratios) / n
    around = [ratio - mean for ratio in ratios]
    spread = math.fsum(value * value for value in around)
    if n < FEWEST_CORRELATED or spread == 0:
        return 1.0
    found = math.fsum(a * b for a, b in itertools.pairwise(around)) / spread
    rho = min(MOST_AUTOCORRELATION, max(0.0, found + SHORTFALL / n))
    return math.sqrt((1 + rho) / (1 - rho))

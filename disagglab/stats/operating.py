"""How often rules err, and how soon they decide, on simulated sessions of many kinds of noise.

A session is a row of log-ratios, one a round, in the order of measuring; an array of them is (sessions x
rounds). Noise has a mean of 0, so a rule that excludes 0 at any look has given a false alarm. With an effect
added to the same noise the interval misses the effect in just those sessions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from disagglab.stats import sequential
from disagglab.stats.rule import multiplier

CORRELATION = 0.3  # of neighbours
STRONGER = 0.5  # the same, as a control
DRIFT = 10.0  # over a session, in standard deviations of a run
STEP = 0.5  # of the random walk from run to run, in standard deviations of a run
TAILS = 3  # degrees of freedom of heavy tails
FIRST_LOOK = 3  # rounds before which the repeated t test and the spending one do not look

Array = Any  # of floats


def _chained(
    generator: np.random.Generator, sessions: int, length: int, correlation: float = CORRELATION
) -> Array:
    """Normal noise of deviation 1, each value correlated with the one before."""
    found = generator.standard_normal((sessions, length))
    for place in range(1, length):
        found[:, place] *= math.sqrt(1 - correlation**2)
        found[:, place] += correlation * found[:, place - 1]
    return found


def _drifting(generator: np.random.Generator, sessions: int, length: int) -> Array:
    return np.linspace(0, DRIFT, length) + generator.standard_normal((sessions, length))


def _walking(generator: np.random.Generator, sessions: int, length: int) -> Array:
    steps = STEP * generator.standard_normal((sessions, length))
    return np.cumsum(steps, axis=1) + generator.standard_normal((sessions, length))


def _skewed(generator: np.random.Generator, sessions: int, rounds: int) -> Array:
    return generator.standard_exponential((sessions, rounds)) - 1


Runs = Callable[[np.random.Generator, int, int], Array]


def _mirrored(runs: Runs, arms: int = 2) -> Runs:
    """Log-ratios of the first and the last of some arms, whose order is turned round every other round."""

    def ratios(generator: np.random.Generator, sessions: int, rounds: int) -> Array:
        by_round = runs(generator, sessions, rounds * arms).reshape(sessions, rounds, arms)
        return (by_round[:, :, -1] - by_round[:, :, 0]) * np.where(np.arange(rounds) % 2, -1, 1)

    return ratios


def _random_order(runs: Runs) -> Runs:
    """Log-ratios of two arms, the first of which is drawn anew every round."""

    def ratios(generator: np.random.Generator, sessions: int, rounds: int) -> Array:
        by_round = runs(generator, sessions, rounds * 2).reshape(sessions, rounds, 2)
        return (by_round[:, :, 1] - by_round[:, :, 0]) * generator.choice((-1, 1), (sessions, rounds))

    return ratios


def _by_coin(ratios: Runs) -> Runs:
    """Log-ratios of two equal arms whose order is drawn: what one run has more than the other keeps its size
    from round to round as it was, and a coin says whose it is.
    """

    def found(generator: np.random.Generator, sessions: int, rounds: int) -> Array:
        return ratios(generator, sessions, rounds) * generator.choice((-1, 1), (sessions, rounds))

    return found


NOISES: dict[str, Runs] = {
    "normal": lambda generator, sessions, rounds: generator.standard_normal((sessions, rounds)),
    "heavy tails": lambda generator, sessions, rounds: generator.standard_t(TAILS, (sessions, rounds)),
    "rounds that hang together": _chained,
    "rounds that hang together, random order": _by_coin(_chained),
    "runs that hang together, mirrored": _mirrored(_chained),
    "runs that hang together, four arms mirrored": _mirrored(_chained, 4),
    "runs that hang together, random order": _random_order(_chained),
    "drift, mirrored": _mirrored(_drifting),
    "drift, random order": _random_order(_drifting),
    "random walk, mirrored": _mirrored(_walking),
    "random walk, random order": _random_order(_walking),
    "rounds that hang together more": functools.partial(_chained, correlation=STRONGER),
    "skewed": _skewed,
}


@dataclass(frozen=True)
class Looks:
    """What is seen after each round of each session: (sessions x rounds) of mean, standard error (0 in the
    first round), and inflation of the error (see :func:`disagglab.stats.sequential.inflation`).
    """

    mean: Array
    error: Array
    inflation: Array


def simulate(noise: str, sessions: int, rounds: int, seed: int) -> Looks:
    """Looks at sessions of a kind of noise, named in ``NOISES``."""
    return look(NOISES[noise](np.random.default_rng(seed), sessions, rounds))


def look(ratios: Array) -> Looks:
    """Looks after every round, of (sessions x rounds) log-ratios."""
    rounds = ratios.shape[1]
    mean, error, inflation = np.empty(ratios.shape), np.zeros(ratios.shape), np.ones(ratios.shape)
    for n in range(1, rounds + 1):
        mean[:, n - 1] = ratios[:, :n].mean(axis=1)
        around = ratios[:, :n] - mean[:, n - 1, np.newaxis]
        spread = (around**2).sum(axis=1)
        if n > 1:
            error[:, n - 1] = np.sqrt(spread / (n - 1) / n)
        if n >= sequential.FEWEST_CORRELATED:
            rho = (around[:, 1:] * around[:, :-1]).sum(axis=1) / spread
            rho = np.clip(rho + sequential.SHORTFALL / n, 0, sequential.MOST_AUTOCORRELATION)
            inflation[:, n - 1] = np.sqrt((1 + rho) / (1 - rho))
    return Looks(mean, error, inflation)


@dataclass(frozen=True)
class Boundary:
    """A rule as its half widths at each look, in standard errors; infinite where it does not look.

    ``inflated``: whether the standard errors are.
    """

    multipliers: tuple[float, ...]
    inflated: bool = False

    def half_widths(self, looks: Looks) -> Array:
        """(sessions x rounds) of half widths of the interval; infinite where nothing is decided."""
        factors = np.array(self.multipliers)
        error = looks.error * looks.inflation if self.inflated else looks.error
        return np.where(np.isinf(factors), np.inf, np.where(np.isinf(factors), 0, factors) * error)


def repeated_t(rounds: int, alpha: float, first: int = FIRST_LOOK) -> Boundary:
    """Student's t at the whole level after every round from ``first`` on; one look if that is the last."""
    return Boundary(
        tuple(multiplier(n, alpha, "fixed-n") if n >= first else math.inf for n in range(1, rounds + 1))
    )


def any_time(rounds: int, alpha: float, g: float = sequential.G, order_drawn: bool = False) -> Boundary:
    """The rule of :mod:`disagglab.stats.sequential`, looked at after every round."""
    multipliers = tuple(sequential.multiplier(n, alpha, g) for n in range(1, rounds + 1))
    return Boundary(multipliers, inflated=not order_drawn)


def spending(
    rounds: int, alpha: float, normal: Looks, power: float = 2.0, first: int = FIRST_LOOK
) -> Boundary:
    """Group-sequential t: alpha x (n / rounds)^power is spent by look n, however it falls.

    Source: K. Lan and D. DeMets, Discrete sequential boundaries for clinical trials, Biometrika 70 (1983);
    the power family is that of K. Kim and D. DeMets, Biometrika 74 (1987).

    Args:
        normal: sessions of normal noise, of at least so many rounds, from which the boundary is made: at each
            look the quantile of abs(t) of the sessions that are left.
    """
    left = np.ones(len(normal.mean), dtype=bool)
    multipliers = [math.inf] * rounds
    for n in range(first, rounds + 1):
        t = np.abs(normal.mean[:, n - 1]) / normal.error[:, n - 1]
        budget = alpha * (n / rounds) ** power * len(left) - np.sum(~left)  # sessions that may still end here
        share = max(0.0, float(budget)) / np.sum(left)
        multipliers[n - 1] = float(np.quantile(t[left], 1 - share))
        left &= t <= multipliers[n - 1]
    return Boundary(tuple(multipliers))


def excluded_by(looks: Looks, boundary: Boundary, effect: float = 0.0) -> Array:
    """Share of sessions whose interval has excluded no difference by each round, at a true effect.

    Without an effect they are false alarms, and 1 less that is the share of sessions whose interval has held
    the truth at every look so far.
    """
    crossed = np.abs(looks.mean + effect) > boundary.half_widths(looks)
    return np.logical_or.accumulate(crossed, axis=1).mean(axis=0)


def equivalent_by(looks: Looks, boundary: Boundary, margin: float) -> Array:
    """Share of sessions whose interval has lain within the margin (log scale) by some look, by each round."""
    within = np.abs(looks.mean) + boundary.half_widths(looks) <= margin
    return np.logical_or.accumulate(within, axis=1).mean(axis=0)


def rounds_until(shares: Array, share: float) -> int | None:
    """Rounds after which so large a share of sessions has decided; None if it never does."""
    reached = np.flatnonzero(shares >= share)
    return int(reached[0]) + 1 if len(reached) else None

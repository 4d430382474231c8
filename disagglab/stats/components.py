"""Where a figure's spread comes from: within a run, between runs, between rounds; and what a longer run buys.

All variances are of logarithms, so they are relative and do not depend on the unit. Sources: T. Kalibera and
R. Jones, Rigorous benchmarking in reasonable time, ISMM (2013), on repetitions at several levels and what
each costs; G. Snedecor and W. Cochran, Statistical Methods, on two-way tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import special

from disagglab.errors import InvalidRun


@dataclass(frozen=True)
class Spread:
    """Variance of the logarithm of one run's figure, from a table of arms and rounds.

    ``between_runs``: what neither arm nor round explains; a pair of arms differs by twice that. ``freedom``:
    its degrees of freedom. ``between_rounds``: what all arms of a round have in common, which pairs cancel.
    """

    between_runs: float
    freedom: int
    between_rounds: float

    @property
    def of_a_pair(self) -> float:
        """Standard deviation of the log-ratio of two arms in one round."""
        return math.sqrt(2 * self.between_runs)


def spread(table: Sequence[Sequence[float]]) -> Spread:
    """The spread of positive figures, a row an arm and a column a round; every arm was measured in each.

    Raises:
        InvalidRun: with fewer than two arms or two rounds, or a value that has no logarithm.
    """
    arms, rounds = len(table), min(map(len, table), default=0)
    if arms < 2 or rounds < 2:
        raise InvalidRun(f"{arms} arms and {rounds} rounds: a spread takes two of each")
    if any(not (math.isfinite(value) and value > 0) for row in table for value in row):
        raise InvalidRun("values must be positive and finite")
    logs = [[math.log(value) for value in row[:rounds]] for row in table]
    whole = statistics.fmean(value for row in logs for value in row)
    of_arm = [statistics.fmean(row) for row in logs]
    of_round = [statistics.fmean(row[number] for row in logs) for number in range(rounds)]
    rest = math.fsum(
        (logs[arm][number] - of_arm[arm] - of_round[number] + whole) ** 2
        for arm in range(arms)
        for number in range(rounds)
    )
    freedom = (arms - 1) * (rounds - 1)
    between_runs = rest / freedom
    of_rounds = arms * math.fsum((mean - whole) ** 2 for mean in of_round) / (rounds - 1)
    return Spread(between_runs, freedom, max(0.0, (of_rounds - between_runs) / arms))


def within(runs: Sequence[Sequence[float]]) -> float | None:
    """Variance of the logarithm of one request's figure within its run, pooled over runs; each has a list of
    positive values, one a request. None if no run has two requests.
    """
    logs = [[math.log(value) for value in run] for run in runs if len(run) > 1]
    freedom = sum(len(run) - 1 for run in logs)
    if not freedom:
        return None
    return math.fsum((value - statistics.fmean(run)) ** 2 for run in logs for value in run) / freedom


@dataclass(frozen=True)
class RunCost:
    """What a run takes: ``fixed_s`` whatever its length, and ``request_s`` for each request, s."""

    fixed_s: float
    request_s: float

    def of(self, requests: int) -> float:
        """Seconds of a run of so many requests."""
        return self.fixed_s + self.request_s * requests


def variance_of_a_run(found: Spread, inside: float, measured: int, requests: int) -> float:
    """Variance of the logarithm of a run's figure if runs had another length.

    Args:
        found: of runs as they were measured, with ``measured`` requests each.
        inside: variance within a run, of one request: see :func:`within`.
        requests: of the runs that are asked about.
    """
    beyond = max(0.0, found.between_runs - inside / measured)
    return beyond + inside / requests


def best_length(
    found: Spread,
    inside: float,
    measured: int,
    cost: RunCost,
    candidates: Sequence[int],
    seconds: float,
    multiplier: Callable[[int], float],
) -> int:
    """The number of requests a run that makes the interval narrowest in the time given.

    Longer runs are each more precise, shorter ones are more, and few runs widen the interval themselves.

    Args:
        found, inside, measured: see :func:`variance_of_a_run`.
        seconds: for all runs of one arm.
        multiplier: half of the interval's width after so many rounds, in standard errors.
    """

    def width(requests: int) -> float:
        rounds = int(seconds / cost.of(requests))
        if rounds < 2:
            return math.inf
        variance = variance_of_a_run(found, inside, measured, requests)
        return multiplier(rounds) * math.sqrt(variance / rounds)

    return min(sorted(candidates), key=width)


def upper_sd(sd: float, freedom: int, confidence: float) -> float:
    """What a standard deviation that was estimated with so many degrees of freedom lies below, by the
    chi-square distribution of its square.
    """
    return sd * math.sqrt(freedom / float(special.chdtri(freedom, confidence)))

"""Where an arm of a frontier stands at one rate: against the best of the ways of other kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from disagglab.config.arms import AGAIN
from disagglab.errors import InvalidRun
from disagglab.results.frontier import Frontier
from disagglab.results.rated_run import RatedRun
from disagglab.stats import counts
from disagglab.stats.metric import Direction
from disagglab.stats.pooled import Expected, Pooled
from disagglab.stats.rivals import against_best

MARGIN = 0.05


@dataclass(frozen=True)
class Terms:
    """On which ways are told apart. ``margin``: differences below it count as none. ``own_spread``: the band
    of a rate is made of its own rounds alone, see :mod:`disagglab.stats.pooled`.
    """

    margin: float = MARGIN
    own_spread: bool = False


USUAL = Terms()


class Place(StrEnum):
    """What the band of an arm's ratio to the best other way says."""

    AHEAD = "ahead"
    BEHIND = "behind"
    LEVEL = "level"
    OPEN = "not told apart"


@dataclass(frozen=True)
class Figure:
    """What is compared: a figure of a run, positive; None where the run does not have it. ``under``: the
    promise that it depends on, in words. ``counted``: the requests of a run that it counts, where it does.
    """

    name: str
    better: Direction
    of: Callable[[RatedRun], float | None]
    under: str = ""
    counted: Callable[[RatedRun], int] | None = None


@dataclass(frozen=True)
class Standing:
    """An arm at a rate. ``best``: of its rivals, by what was measured. ``ratio``, ``low``, ``high``: how many
    times the figure of the best, above 1 where the arm is better; limits of 95 % for this one rate, which are
    0 and infinity with one round.

    ``pooled``: whether the band against ``best`` takes one variance for all rates. ``good_share``: of the
    arm's requests, by the frontier's promise. ``absent``: rivals that have no run here.
    """

    arm: str
    rate_per_s: float
    best: str
    ratio: float
    low: float
    high: float
    rounds: int
    place: Place
    pooled: bool
    good_share: float
    absent: tuple[str, ...] = ()


def goodput(frontier: Frontier) -> Figure:
    """Good requests per second under the frontier's promise."""
    promise = frontier.promise
    return Figure(
        "goodput",
        "higher",
        lambda run: run.comparable_per_s(promise),
        str(promise),
        lambda run: run.good(promise),
    )


ITL_P99 = Figure("p99 ITL", "lower", lambda run: run.itl_p99_s)


def place_of(low: float, high: float, margin: float) -> Place:
    """By limits on the log scale, in the order in which :func:`disagglab.stats.verdict.judge` decides."""
    bound = math.log1p(margin)
    if -bound <= low and high <= bound:
        return Place.LEVEL
    if low > 0:
        return Place.AHEAD
    return Place.BEHIND if high < 0 else Place.OPEN


def standings(frontier: Frontier, figure: Figure | None = None, terms: Terms = USUAL) -> tuple[Standing, ...]:
    """Every arm but the twins at every rate at which it and a rival have common rounds, by rate.

    Args:
        figure: goodput if it is None.

    Raises:
        InvalidRun: if a figure is not positive and finite.
    """
    met = pairs(frontier, figure, terms)
    return tuple(found for rate in frontier.rates for found in _at(frontier, rate, met, terms.margin))


@dataclass(frozen=True)
class Pair:
    """Two arms: their log-ratios, above 0 where the first is better, and which point of ``pooled`` is that of
    a rate; rates without a common round have none.
    """

    pooled: Pooled
    place: Mapping[float, int]

    @classmethod
    def of(cls, frontier: Frontier, figure: Figure, arm: str, rival: str, own_spread: bool) -> Pair:
        points: dict[float, tuple[float, ...]] = {}
        expected: list[Expected] = []
        for rate in frontier.rates:
            ours, theirs = (
                {run.round: run for run in frontier.at(one, rate) if figure.of(run) is not None}
                for one in (arm, rival)
            )
            common = sorted(ours.keys() & theirs.keys())
            if not common:
                continue
            points[rate] = tuple(_better_log(figure, ours[n], theirs[n]) for n in common)
            if figure.counted is not None:
                of, sides = figure.counted, (ours, theirs)
                expected.append(counts.expected(*([(of(s[n]), s[n].sent) for n in common] for s in sides)))
        pooled = Pooled(tuple(points.values()), own_spread, tuple(expected))
        return cls(pooled, {rate: place for place, rate in enumerate(points)})


def pairs(
    frontier: Frontier, figure: Figure | None = None, terms: Terms = USUAL
) -> dict[tuple[str, str], Pair]:
    """Every arm but the twins with each of its rivals. ``figure``: goodput if it is None.

    Raises:
        InvalidRun: see :func:`standings`.
    """
    asked = figure or goodput(frontier)
    arms = [arm for arm in frontier.arms if not arm.endswith(AGAIN)]
    return {
        (arm, rival): Pair.of(frontier, asked, arm, rival, terms.own_spread)
        for arm in arms
        for rival in frontier.rivals(arm)
    }


def _better_log(figure: Figure, ours: RatedRun, theirs: RatedRun) -> float:
    own, other = (figure.of(run) or 0.0 for run in (ours, theirs))
    if not all(math.isfinite(value) and value > 0 for value in (own, other)):
        raise InvalidRun(f"{figure.name} of round {ours.round} must be positive and finite: {own}, {other}")
    log = math.log(own / other)
    return log if figure.better == "higher" else -log


def _at(
    frontier: Frontier, rate: float, every: Mapping[tuple[str, str], Pair], margin: float
) -> Iterator[Standing]:
    for arm in dict.fromkeys(arm for arm, _ in every):
        rivals = frontier.rivals(arm)
        met = {rival: every[arm, rival] for rival in rivals if rate in every[arm, rival].place}
        if not met:
            continue
        found = against_best({rival: (pair.pooled, pair.place[rate]) for rival, pair in met.items()})
        pair = met[found.best]
        runs = frontier.at(arm, rate)
        yield Standing(
            arm=arm,
            rate_per_s=rate,
            best=found.best,
            ratio=_exp(found.band.mean),
            low=_exp(found.band.low),
            high=_exp(found.band.high),
            rounds=min(len(one.pooled.points[one.place[rate]]) for one in met.values()),
            place=place_of(found.band.low, found.band.high, margin),
            pooled=pair.pooled.equal,
            good_share=sum(run.good(frontier.promise) for run in runs) / sum(run.sent for run in runs),
            absent=tuple(rival for rival in rivals if rival not in met),
        )


def _exp(log: float) -> float:
    return math.exp(log) if log < 700 else math.inf

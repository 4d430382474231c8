"""Goodput under an objective: which topology gives more good requests per second, predicted for every
request, and at which points most clearly.

A mean cannot tell it, because a limit divides requests, not means. So the break-even model is advanced step
by step (predict/simulation.py) through arrivals that are drawn as the load draws them, each request is held
against the limits, and what the seeds say is judged like rounds that were measured.
docs/explanation/break-even.md.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from disagglab.config.arrivals import arrivals
from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.predict import breakeven, breakeven_points, simulation
from disagglab.predict.breakeven import Cluster, Point
from disagglab.predict.breakeven_points import MOST_REQUESTS, MOST_USE, Budget
from disagglab.predict.simulation import Served
from disagglab.results import metrics
from disagglab.results.records import Run
from disagglab.stats.metric import METRICS
from disagglab.stats.verdict import Verdict, judge

MARGIN = 0.05  # differences of goodput below it count as equivalent
USEFUL = 0.9  # share of good requests below which nobody would run the better topology either
SLACK = 1.1  # between predicted and measured time, in both arms at once and in opposite directions
LIMITS = 24  # TPOT limits of a curve
KINDS = ("win", "loss")  # of disaggregated serving


@dataclass(frozen=True)
class Goodput:
    """Good requests of one run, of those sent, and the time until its last answer."""

    good: int
    sent: int
    duration_s: float

    @property
    def attainment(self) -> float:
        """Share of sent."""
        return self.good / self.sent

    @property
    def per_s(self) -> float:
        """Good requests per second of the run."""
        return self.good / self.duration_s

    @property
    def comparable_per_s(self) -> float:
        """As a verdict takes it: positive even where no request was good (disagglab/stats/metric.py)."""
        share = METRICS["slo_attainment"].comparable(self.attainment, self.sent)
        return share * self.sent / self.duration_s


def seen(run: Run) -> Served:
    """The requests of a measured run.

    Raises:
        InvalidRun: if there is none, or an answer has one token and so no time per token.
    """
    tpot = metrics.tpot_s(run)
    if not tpot or len(tpot) < len(run.ttft_s):
        raise InvalidRun(f"{run.topology}: {len(tpot)} of {len(run.ttft_s)} answers have two tokens or more")
    gaps = tuple(tuple((gap, 1) for gap in one) for one in run.itl_s)
    return Served(run.ttft_s, tuple(tpot), run.e2e_s, run.duration_s, gaps)


def goodput(run: Served, slo: SloSection, slack: float = 1.0) -> Goodput:
    """A run under an objective. ``slack``: factor on all of its times before they meet the limits."""
    good = sum(
        slack * ttft <= slo.ttft_s and slack * tpot <= slo.tpot_s
        for ttft, tpot in zip(run.ttft_s, run.tpot_s, strict=True)
    )
    return Goodput(good, len(run.ttft_s), run.duration_s)


@dataclass(frozen=True)
class Arms:
    """Runs of both topologies with the same arrivals, predicted or measured; a pair has the same place."""

    replicated: tuple[Served, ...]
    disaggregated: tuple[Served, ...]

    def verdict(self, slo: SloSection, slack: float = 1.0) -> Verdict:
        """Goodput per second, disaggregated against replicated. ``slack``: factor on the times of
        disaggregated serving, and divisor of the replicas'.
        """
        pairs = [
            (
                goodput(theirs, slo, 1 / slack).comparable_per_s,
                goodput(ours, slo, slack).comparable_per_s,
            )
            for theirs, ours in zip(self.replicated, self.disaggregated, strict=True)
        ]
        return judge(pairs, "higher", MARGIN)

    @property
    def longest_s(self) -> float:
        """Time of the slowest request of all runs."""
        return max(max(run.e2e_s) for run in (*self.replicated, *self.disaggregated))

    def attainment(self, slo: SloSection) -> tuple[float, float]:
        """Mean share of good requests: replicated, disaggregated."""
        theirs, ours = (
            statistics.fmean(goodput(run, slo).attainment for run in runs)
            for runs in (self.replicated, self.disaggregated)
        )
        return theirs, ours

    def per_s(self, slo: SloSection) -> tuple[float, float]:
        """Mean number of good requests per second: replicated, disaggregated."""
        theirs, ours = (
            statistics.fmean(goodput(run, slo).per_s for run in runs)
            for runs in (self.replicated, self.disaggregated)
        )
        return theirs, ours

    def ratios(self, slos: Sequence[SloSection]) -> list[float]:
        """Goodput disaggregated / replicated under each objective, geometric mean over the runs."""
        return [1 + self.verdict(slo).effect for slo in slos]

    def tpot_limits(self) -> list[float]:
        """TPOT limits from where no request meets them to where all do, evenly spaced by ratio, s."""
        every = [tpot for run in (*self.replicated, *self.disaggregated) for tpot in run.tpot_s]
        low, high = min(every) / SLACK, max(every) * SLACK
        return [low * (high / low) ** (place / (LIMITS - 1)) for place in range(LIMITS)]


@dataclass(frozen=True)
class GoodputForecast:
    """Both topologies at a point under an objective, predicted; one run of each a seed.

    ``use``: the highest of a station, in equilibrium: replicated, disaggregated.
    """

    point: Point
    load: float
    window_s: float
    slo: SloSection
    arms: Arms
    use: tuple[float, float]

    @property
    def name(self) -> str:
        """Of the workload, and so of the point."""
        return f"goodput-{self.point.prompt_tokens}-{self.point.output_tokens}-{self.load:.2f}"

    @property
    def said(self) -> str:
        """How reports name the point."""
        point = self.point
        return f"{point.prompt_tokens} prompt, {point.output_tokens} output tokens, load {self.load:.2f}"

    @property
    def workload(self) -> Workload:
        """The run that measures it."""
        return breakeven_points.open_loop(self.name, self.point, self.window_s)

    @cached_property
    def verdict(self) -> Verdict:
        """What a measurement would be judged to be if the model were right."""
        return self.arms.verdict(self.slo)

    @property
    def ratio(self) -> float:
        """Goodput disaggregated / replicated."""
        return 1 + self.verdict.effect

    @property
    def wins(self) -> bool:
        """Whether disaggregated serving is to be ahead by more than the margin, keeps the objective for most
        requests, and is not so busy that a small error of a speed would change that.
        """
        return self.verdict.outcome == "better" and self.ratio > 1 + MARGIN and self._useful(1)

    @property
    def loses(self) -> bool:
        """The same of the replicas."""
        return self.verdict.outcome == "worse" and self.ratio < 1 / (1 + MARGIN) and self._useful(0)

    def _useful(self, arm: int) -> bool:
        return self.arms.attainment(self.slo)[arm] >= USEFUL and self.use[arm] <= MOST_USE

    @cached_property
    def surely_more(self) -> float:
        """Log of the lower limit of the ratio, were disaggregation SLACK slower and the replicas faster."""
        return math.log1p(self.arms.verdict(self.slo, SLACK).low)

    @cached_property
    def surely_less(self) -> float:
        """Minus the log of the upper limit, were disaggregation SLACK faster and the replicas slower."""
        return -math.log1p(self.arms.verdict(self.slo, 1 / SLACK).high)


def forecast(
    cluster: Cluster, point: Point, load: float, slo: SloSection, window_s: float, seeds: Sequence[int]
) -> GoodputForecast:
    """A point, predicted for the arrivals that the load would draw from these seeds."""
    asked = breakeven_points.open_loop("forecast", point, window_s)
    times = [[one.arrival_s for one in arrivals(asked, seed)] for seed in seeds]
    theirs = tuple(simulation.by_replicas(cluster, point, one) for one in times)
    ours = tuple(simulation.by_prefill_and_decode(cluster, point, one) for one in times)
    sides = (breakeven.replicated(cluster, point), breakeven.disaggregated(cluster, point))
    replicas, apart = (max(side.use.values()) for side in sides)
    return GoodputForecast(point, load, window_s, slo, Arms(theirs, ours), (replicas, apart))


def forecasts(
    cluster: Cluster,
    slo: SloSection,
    prompts: Sequence[int],
    outputs: Sequence[int],
    loads: Sequence[float],
    budget: Budget,
    least_requests: int,
    seeds: Sequence[int],
) -> Iterator[GoodputForecast]:
    """Every prompt length with every output length at every load that a run of this budget can show.

    A topology may fall behind: that is what an objective is there to tell. But no request may take longer
    than the budget says, or the run would not end in time.

    Args:
        loads: shares of what the replicas can bear.
        least_requests: of a run; the share of good ones is known to one in so many.
        seeds: two at least, for an interval.
    """
    for prompt, output, load in itertools.product(prompts, outputs, loads):
        rate = load * breakeven.capacity_per_s(cluster, prompt, output)
        requests = math.ceil(rate * budget.window_s)
        if prompt + output > budget.most_tokens or not least_requests <= requests <= MOST_REQUESTS:
            continue
        point = Point(prompt, output, rate)
        for some in (seeds[:1], seeds):  # the first seed tells of most points that they take too long
            found = forecast(cluster, point, load, slo, budget.window_s, some)
            if found.arms.longest_s > budget.most_e2e_s:
                break
        else:
            yield found


def clearest_win(found: Sequence[GoodputForecast]) -> GoodputForecast | None:
    """The point at which disaggregated serving is most surely ahead; None if it is so nowhere.

    "Most surely" is the lower limit of the ratio after an error of the model by SLACK in either arm. Of
    points where it is equal, the one with the higher rate.
    """
    return max(
        (one for one in found if one.wins),
        key=lambda one: (one.surely_more, one.point.rate_per_s),
        default=None,
    )


def clearest_loss(found: Sequence[GoodputForecast]) -> GoodputForecast | None:
    """The point at which the replicas are most surely ahead; None if they are so nowhere."""
    return max(
        (one for one in found if one.loses),
        key=lambda one: (one.surely_less, one.point.rate_per_s),
        default=None,
    )


@dataclass(frozen=True)
class Named:
    """What one search says of one kind: at how many points it looked, how many of them it calls so, and the
    clearest of these; None if there is none.
    """

    looked_at: int
    called: int
    clearest: GoodputForecast | None


def named(searches: Iterable[Sequence[GoodputForecast]]) -> dict[str, Named]:
    """By kind, what the first search that finds one says, or else the last; no search is made in vain.

    Args:
        searches: one at least.
    """
    kept: dict[str, Named] = {}
    for found in searches:
        says = {
            "win": Named(len(found), sum(one.wins for one in found), clearest_win(found)),
            "loss": Named(len(found), sum(one.loses for one in found), clearest_loss(found)),
        }
        kept = {kind: kept[kind] if kind in kept and kept[kind].called else says[kind] for kind in KINDS}
        if all(one.called for one in kept.values()):
            break
    return kept


def limits(slo: SloSection, ttft: Sequence[float], tpot: Sequence[float]) -> list[list[SloSection]]:
    """Objectives around one, as factors on its limits: a row for each TTFT limit, in it every TPOT limit."""
    return [
        [SloSection(ttft_s=slo.ttft_s * first, tpot_s=slo.tpot_s * each) for each in tpot] for first in ttft
    ]

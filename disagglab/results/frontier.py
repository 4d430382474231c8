"""A frontier: each way at several offered rates, measured in rounds, and the figures of each of these points.

All of it is recomputed from what is kept of each request, so that another promise or price needs no new run.
docs/explanation/frontier.md says how to read it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from disagglab.config.arms import AGAIN
from disagglab.errors import InvalidRun
from disagglab.results import open_loop
from disagglab.results.arm import Arm
from disagglab.results.footprint import Footprint
from disagglab.results.price import Price
from disagglab.results.promise import NOTHING, Promise
from disagglab.results.rated_run import RatedRun
from disagglab.results.records import Run
from disagglab.stats.metric import percentile

MILLION = 1_000_000


@dataclass(frozen=True)
class Point:
    """One arm at one offered rate: means over its rounds. None: there is nothing to tell it from.

    ``tokens_per_s``: output tokens; ``_node``, ``_gpu``: over all nodes or GPUs of the way; ``_decode_gpu``:
    over those that decode. ``prompt_tokens_per_s_prefill_gpu``: over those that prefill.
    ``tokens_per_s_user``: 1 / median TPOT. ``ttft_p99_s``: of the requests of all rounds together.
    ``gaps_above``: share of gaps longer than the promise's ITL limit, else than its TPOT limit. ``kept_up``:
    rounds that kept up with their arrivals. ``energy_j_token``: of all nodes with their idle power, per
    output token; ``prefill_j_token``, ``decode_j_token``: of the nodes of a role, where roles are apart.
    """

    arm: str
    rate_per_s: float
    rounds: int
    kept_up: int
    tokens_per_s: float
    tokens_per_s_node: float
    tokens_per_s_gpu: float | None
    tokens_per_s_decode_gpu: float | None
    prompt_tokens_per_s_prefill_gpu: float | None
    tokens_per_s_user: float | None
    ttft_p50_s: float
    ttft_p99_s: float | None
    itl_p99_s: float | None
    gaps_above: float | None
    good_per_s: float
    good_share: float
    energy_j_token: float | None
    prefill_j_token: float | None
    decode_j_token: float | None
    cost_per_million_tokens: float | None
    cost_per_good_request: float | None

    @property
    def density(self) -> float:
        """Output tokens/s per GPU; per node where the way has no GPU."""
        return self.tokens_per_s_node if self.tokens_per_s_gpu is None else self.tokens_per_s_gpu


@dataclass(frozen=True)
class Frontier:
    """``promise``, ``price``: what its figures are computed for. ``left_out``: runs that do not count, and
    why. ``origin``: of what session, for titles.
    """

    workload: str
    footprints: Mapping[str, Footprint]
    runs: tuple[RatedRun, ...]
    promise: Promise = NOTHING
    price: Price | None = None
    stream: str = ""
    left_out: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """In the order of the footprints; those with a run."""
        seen = {run.arm for run in self.runs}
        return tuple(arm for arm in self.footprints if arm in seen)

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """Every offered rate, 1/s, ascending."""
        return tuple(sorted({run.rate_per_s for run in self.runs}))

    @cached_property
    def _by_point(self) -> Mapping[tuple[str, float], tuple[RatedRun, ...]]:
        found: dict[tuple[str, float], list[RatedRun]] = {}
        for run in sorted(self.runs, key=lambda one: one.round):
            found.setdefault((run.arm, run.rate_per_s), []).append(run)
        return {key: tuple(runs) for key, runs in found.items()}

    def at(self, arm: str, rate_per_s: float) -> tuple[RatedRun, ...]:
        """The runs of a point in the order of rounds; empty where there is none."""
        return self._by_point.get((arm, rate_per_s), ())

    def rivals(self, arm: str) -> tuple[str, ...]:
        """What an arm is compared with: the ways of other kinds, without twins."""
        kind = Arm.parse(arm).name
        return tuple(one for one in self.arms if Arm.parse(one).name != kind and not one.endswith(AGAIN))

    def points(self) -> tuple[Point, ...]:
        """Every point, by arm and then by rate."""
        return tuple(self._point(arm, rate) for arm in self.arms for rate in self.rates if self.at(arm, rate))

    @property
    def goodput_per_s(self) -> dict[tuple[str, float], tuple[float, ...]]:
        """Good requests per second of each round, by arm and offered rate, 1/s."""
        return {
            key: tuple(run.good_per_s(self.promise) for run in runs) for key, runs in self._by_point.items()
        }

    def promising(self, promise: Promise) -> Frontier:
        """The same runs under another promise."""
        return replace(self, promise=promise)

    def _point(self, arm: str, rate: float) -> Point:
        runs, place, promise = self.at(arm, rate), self.footprints[arm], self.promise

        def mean(of: Callable[[RatedRun], float | None]) -> float | None:
            values = [of(run) for run in runs]
            known = [value for value in values if value is not None]
            return statistics.fmean(known) if len(known) == len(values) else None

        tokens = statistics.fmean(run.output_tokens / run.duration_s for run in runs)
        prompts = statistics.fmean(run.prompt_tokens / run.duration_s for run in runs)
        good = statistics.fmean(run.good_per_s(promise) for run in runs)
        late = promise.itl_s if promise.itl_s is not None else promise.tpot_s
        hourly = self.price.of(place) if self.price else None
        return Point(
            arm=arm,
            rate_per_s=rate,
            rounds=len(runs),
            kept_up=sum(run.keeps_up == open_loop.KeepsUp.YES for run in runs),
            tokens_per_s=tokens,
            tokens_per_s_node=tokens / place.nodes,
            tokens_per_s_gpu=_over(tokens, place.gpus),
            tokens_per_s_decode_gpu=_over(tokens, place.decode_gpus),
            prompt_tokens_per_s_prefill_gpu=_over(prompts, place.prefill_gpus),
            tokens_per_s_user=mean(lambda run: run.per_user),
            ttft_p50_s=statistics.fmean(statistics.median(run.ttft_s) for run in runs),
            ttft_p99_s=percentile([ttft for run in runs for ttft in run.ttft_s], 99),
            itl_p99_s=mean(lambda run: run.itl_p99_s),
            gaps_above=None if late is None else mean(lambda run: run.gaps_above(late)),
            good_per_s=good,
            good_share=sum(run.good(promise) for run in runs) / sum(run.sent for run in runs),
            energy_j_token=mean(lambda run: _joules(run, {*place.prefill, *place.decode})),
            prefill_j_token=mean(lambda run: _joules(run, place.prefill)) if place.apart else None,
            decode_j_token=mean(lambda run: _joules(run, place.decode)) if place.apart else None,
            cost_per_million_tokens=_cost(hourly, tokens / MILLION),
            cost_per_good_request=_cost(hourly, good),
        )


def collect(
    runs: Iterable[Run],
    footprints: Mapping[str, Footprint],
    promise: Promise = NOTHING,
    price: Price | None = None,
    stream: str = "",
    origin: Mapping[str, str] | None = None,
) -> Frontier:
    """The frontier of measured runs, one a round at each arm and rate; an invalid run is left out, and said.

    Args:
        footprints: by arm, in the order in which they are shown.

    Raises:
        InvalidRun: if there is no valid run, they are of several workloads, an arm has no footprint, a round
            has two runs of one point, or one seed in one arm and another in another.
    """
    kept: list[RatedRun] = []
    left_out: list[str] = []
    names: set[str] = set()
    for run in runs:
        names.add(run.workload.name)
        if run.topology not in footprints:
            raise InvalidRun(f"{run.topology}: a run, and no footprint of such an arm")
        if run.invalid is not None:
            at = f"{run.workload.rate_per_s:.4g}/s" if run.workload.rate_per_s else "a closed loop"
            left_out.append(f"{run.topology} at {at}, round {run.round}: {run.invalid}")
        else:
            kept.append(RatedRun.of(run, stream))
    if not kept or len(names) != 1:
        raise InvalidRun(f"a frontier is of valid runs of one workload, here {len(kept)} of {sorted(names)}")
    twice = [key for key, n in Counter((r.arm, r.rate_per_s, r.round) for r in kept).items() if n > 1]
    seeds: dict[tuple[float, int], set[int]] = {}
    for one in kept:
        seeds.setdefault((one.rate_per_s, one.round), set()).add(one.seed)
    mixed = [key for key, found in seeds.items() if len(found) > 1]
    if twice or mixed:
        raise InvalidRun(
            f"rounds do not pair: runs that are there twice {twice}, rounds of two seeds {mixed}"
        )
    return Frontier(
        names.pop(),
        dict(footprints),
        tuple(kept),
        promise,
        price,
        stream,
        tuple(left_out),
        dict(origin or {}),
    )


def pareto(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no point of another way beats in both, tokens/s per user and per GPU (per node without
    GPUs), or in one with the other equal; points without a TPOT are none.
    """
    known = [(point, point.tokens_per_s_user) for point in points]
    placed = [(point, user, point.density) for point, user in known if user is not None]
    return tuple(
        point
        for point, user, density in placed
        if not any(
            other.arm != point.arm and x >= user and y >= density and (x > user or y > density)
            for other, x, y in placed
        )
    )


def _joules(run: RatedRun, nodes: Collection[str]) -> float | None:
    """Of some nodes, for an output token; None where one of them was not read."""
    if run.energy_j is None or not nodes or any(name not in run.energy_j for name in nodes):
        return None
    return math.fsum(run.energy_j[name] for name in nodes) / run.output_tokens if run.output_tokens else None


def _over(value: float, count: int) -> float | None:
    return value / count if count else None


def _cost(hourly: float | None, per_s: float) -> float | None:
    return hourly / 3600 / per_s if hourly is not None and per_s > 0 else None

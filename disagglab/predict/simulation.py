"""The break-even model step by step, for one list of arrivals.

The formulas of predict/breakeven.py hold in equilibrium, and a run of seconds never gets there: it begins
with idle nodes. Here the same engine is advanced from step to step through the very arrivals of a run. That
also checks the formulas (a selftest): both say the same of a run that is long. And it tells
what each request gets, of which the formulas know the mean only: also the gaps between its tokens, which is
where a chunk budget shows (predict/engine.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from disagglab.predict import engine
from disagglab.predict.breakeven import Cluster, Point
from disagglab.predict.engine import Engine, Gap, Request
from disagglab.stats.metric import PERCENTILE_SAMPLES


@dataclass(frozen=True)
class Means:
    """Means over the requests of a run, s."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclass(frozen=True)
class Served:
    """Every request of a run, in the order in which they were given; s.

    ``duration_s``: until the last answer. ``gaps``: by request, the times between its tokens, equal ones that
    follow one another together.
    """

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    duration_s: float
    gaps: tuple[tuple[Gap, ...], ...] = ()

    @property
    def means(self) -> Means:
        """Over the requests."""
        return Means(*(statistics.fmean(each) for each in (self.ttft_s, self.tpot_s, self.e2e_s)))

    def itl_s(self, p: int, chosen: Collection[int] | None = None) -> float | None:
        """The ``p``-th percentile of the gaps of all requests, or of those at some places, pooled; None with
        fewer gaps than it takes to know it. As stats.metric.percentile has it of the same gaps one by one.
        """
        ordered = sorted(self._pooled(chosen))
        many = sum(count for _, count in ordered)
        if many < PERCENTILE_SAMPLES[p]:
            return None
        rank = (many - 1) * p / 100
        low, high = (_at(ordered, place) for place in (int(rank), min(int(rank) + 1, many - 1)))
        return low + (high - low) * (rank - int(rank))

    def gaps_above(self, limit_s: float, chosen: Collection[int] | None = None) -> float | None:
        """Share of these gaps that are longer than a limit; None where there is no gap."""
        pooled = list(self._pooled(chosen))
        many = sum(count for _, count in pooled)
        return sum(count for gap, count in pooled if gap > limit_s) / many if many else None

    def _pooled(self, chosen: Collection[int] | None) -> Iterator[Gap]:
        for place, gaps in enumerate(self.gaps):
            if chosen is None or place in chosen:
                yield from gaps


def _at(ordered: Sequence[Gap], place: int) -> float:
    """The value at a place of a list of which equal values are kept together."""
    for value, count in ordered:
        if place < count:
            return value
        place -= count
    raise IndexError(place)


def _dealt(arrivals_s: Sequence[float], nodes: int) -> list[list[int]]:
    """Requests by node, round robin in the order of arrival."""
    order = sorted(range(len(arrivals_s)), key=lambda number: arrivals_s[number])
    return [order[node::nodes] for node in range(nodes)]


def replicated(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Means:
    """What the replicas make of these arrivals; the point's rate is not looked at."""
    return by_replicas(cluster, point, arrivals_s).means


def disaggregated(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Means:
    """What prefill and decode nodes make of these arrivals; the point's rate is not looked at."""
    return by_prefill_and_decode(cluster, point, arrivals_s).means


def by_replicas(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Served:
    """Each request that the replicas serve; the point's rate is not looked at."""
    return by_equals(cluster, cluster.replicas, alike(point, arrivals_s))


def by_prefill_and_decode(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Served:
    """Each request that prefill and decode nodes serve; the point's rate is not looked at."""
    return by_roles(cluster, alike(point, arrivals_s))


def alike(point: Point, arrivals_s: Sequence[float]) -> list[Request]:
    """Requests of one shape."""
    return [Request(at, point.prompt_tokens, point.output_tokens) for at in arrivals_s]


def by_equals(cluster: Cluster, engines: int, requests: Sequence[Request]) -> Served:
    """What so many equal engines of a cluster's speeds and limits make of requests, dealt in turn."""
    done = _Done()
    for numbers in _dealt([one.at_s for one in requests], engines):
        done.add(numbers, engine.serve(cluster.speeds, cluster.limits, [requests[i] for i in numbers]))
    return done.served(cluster, requests)


def by_roles(cluster: Cluster, requests: Sequence[Request]) -> Served:
    """What prefill and decode nodes of a cluster make of requests, dealt in turn on arrival to one of either
    role.
    """
    speeds, arrivals_s = cluster.speeds, [one.at_s for one in requests]
    handed: dict[int, Request] = {}
    for numbers in _dealt(arrivals_s, cluster.prefill_nodes):
        found = engine.serve(speeds, cluster.limits, [requests[i] for i in numbers], 1)
        for place, number in enumerate(numbers):
            handed[number] = replace(requests[number], at_s=found.last_s[place] + speeds.handoff_s)
    lengths = {one.prompt_tokens for one in requests}
    transfers_s = {length: cluster.transfer_s(length) for length in lengths}
    done = _Done()
    for dealt in _dealt(arrivals_s, cluster.decode_nodes):
        numbers = sorted(dealt, key=lambda number: handed[number].at_s)
        there = [handed[number] for number in numbers]
        moved_s = [transfers_s[one.prompt_tokens] for one in there]
        done.add(numbers, engine.fetch_and_serve(speeds, cluster.decode_limits, there, moved_s))
    return done.served(cluster, requests)


@dataclass
class _Done:
    """What engines did, by number of the request."""

    first_s: dict[int, float] = field(default_factory=dict)
    last_s: dict[int, float] = field(default_factory=dict)
    gaps: dict[int, list[Gap]] = field(default_factory=dict)

    def add(self, numbers: Sequence[int], found: Engine) -> None:
        """Take over what an engine did with requests of these numbers."""
        for place, number in enumerate(numbers):
            self.first_s[number] = found.first_s[place]
            self.last_s[number] = found.last_s[place]
            self.gaps[number] = found.gaps[place]

    def served(self, cluster: Cluster, requests: Sequence[Request]) -> Served:
        """All requests as their client sees them."""
        outside = cluster.speeds.request_s
        each = [(one, self.first_s[number], self.last_s[number]) for number, one in enumerate(requests)]
        return Served(
            tuple(first - one.at_s + outside for one, first, _ in each),
            tuple((last - first) / max(1, one.output_tokens - 1) for one, first, last in each),
            tuple(last - one.at_s + outside for one, _, last in each),
            max(self.last_s.values()) + outside,
            tuple(tuple(self.gaps[number]) for number in range(len(requests))),
        )

"""The break-even model step by step, for one list of arrivals.

The formulas of predict/breakeven.py hold in equilibrium, and a run of seconds never gets there: it begins
with idle nodes. Here the same engine is advanced from step to step through the very arrivals of a run. That
also checks the formulas (a selftest): both say the same of a run that is long. And it tells
what each request gets, of which the formulas know the mean only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagglab.predict.breakeven import Cluster, Point, Speeds


@dataclass(frozen=True)
class Means:
    """Means over the requests of a run, s."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclass(frozen=True)
class Served:
    """Every request of a run, in the order of its arrivals; s. ``duration_s``: until the last answer."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    duration_s: float

    @property
    def means(self) -> Means:
        """Over the requests."""
        return Means(*(statistics.fmean(each) for each in (self.ttft_s, self.tpot_s, self.e2e_s)))


@dataclass
class _Engine:
    """One engine between two steps. By request: ``under_way``, tokens that it still wants; ``first_s``,
    ``last_s``, when it had its first and its last one.
    """

    speeds: Speeds
    context_tokens: float
    now_s: float = 0.0
    under_way: dict[int, int] = field(default_factory=dict)
    first_s: dict[int, float] = field(default_factory=dict)
    last_s: dict[int, float] = field(default_factory=dict)

    def step(self, alone_s: float, count: int = 1) -> None:
        """Equal steps that take ``alone_s`` each beside what their sequences cost, and give each of these a
        token.
        """
        each = self._each_s(alone_s)
        for number in self.under_way:
            self.first_s.setdefault(number, self.now_s + each)
        self.now_s += each * count
        self.under_way = {number: wanted - count for number, wanted in self.under_way.items()}
        for number, wanted in self.under_way.items():
            if wanted == 0:
                self.last_s[number] = self.now_s
        self.under_way = {number: wanted for number, wanted in self.under_way.items() if wanted}

    def decode(self, until_s: float) -> None:
        """Steps without a prompt, until a sequence has its last token or ``until_s`` has come."""
        alone = self.speeds.step.base_s
        count = min(self.under_way.values())
        if until_s < self.now_s + count * self._each_s(alone):
            count = max(1, math.ceil((until_s - self.now_s) / self._each_s(alone)))
        self.step(alone, count)

    def _each_s(self, alone_s: float) -> float:
        return alone_s + self.speeds.step.sequence_s(self.context_tokens) * len(self.under_way)


def _serve(cluster: Cluster, point: Point, arrivals_s: Sequence[float], tokens: int) -> _Engine:
    """An engine that prefills, in the order of arrival and before it decodes; ``tokens`` of each request."""
    speeds = cluster.speeds
    engine = _Engine(speeds, point.context_tokens)
    waiting = list(enumerate(arrivals_s))
    together = max(1, cluster.step_tokens // point.prompt_tokens)
    work = speeds.prefill.work_s(point.prompt_tokens)
    while waiting or engine.under_way:
        if waiting and not engine.under_way:
            engine.now_s = max(engine.now_s, waiting[0][1])
        if waiting and waiting[0][1] <= engine.now_s:
            taken = [number for number, at in waiting[:together] if at <= engine.now_s]
            waiting = waiting[len(taken) :]
            engine.step(speeds.prefill.base_s + work * len(taken))
            for number in taken:
                engine.first_s[number] = engine.now_s
                if tokens > 1:
                    engine.under_way[number] = tokens - 1
                else:
                    engine.last_s[number] = engine.now_s
        else:
            engine.decode(waiting[0][1] if waiting else math.inf)
    return engine


def _fetch_and_serve(
    speeds: Speeds, point: Point, handed_s: Sequence[float], transfer_s: float, tokens: int
) -> _Engine:
    """An engine that fetches KV and decodes. Between two steps it starts transfers, one after another on the
    link, and takes up requests whose transfer has ended.
    """
    engine = _Engine(speeds, point.context_tokens)
    waiting = list(enumerate(handed_s))
    moving: list[tuple[int, float]] = []
    link_free_s = 0.0
    while waiting or moving or engine.under_way:
        if not engine.under_way:
            events = [at for _, at in (*waiting[:1], *moving[:1])]
            engine.now_s = max(engine.now_s, min(events))
        while waiting and waiting[0][1] <= engine.now_s:
            number, _ = waiting.pop(0)
            link_free_s = max(link_free_s, engine.now_s) + transfer_s
            moving.append((number, link_free_s))
        while moving and moving[0][1] <= engine.now_s:
            engine.under_way[moving.pop(0)[0]] = tokens
        if engine.under_way:
            engine.decode(min((at for _, at in (*waiting[:1], *moving[:1])), default=math.inf))
    return engine


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
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for numbers in _dealt(arrivals_s, cluster.replicas):
        found = _serve(cluster, point, [arrivals_s[i] for i in numbers], point.output_tokens)
        first |= {number: found.first_s[place] for place, number in enumerate(numbers)}
        last |= {number: found.last_s[place] for place, number in enumerate(numbers)}
    return _served(cluster, point, arrivals_s, first, last)


def by_prefill_and_decode(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Served:
    """Each request that prefill and decode nodes serve; the point's rate is not looked at."""
    speeds = cluster.speeds
    ended: dict[int, float] = {}
    for numbers in _dealt(arrivals_s, cluster.prefill_nodes):
        found = _serve(cluster, point, [arrivals_s[i] for i in numbers], 1)
        ended |= {number: found.last_s[place] for place, number in enumerate(numbers)}
    handed = [ended[number] + speeds.handoff_s for number in range(len(arrivals_s))]
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    transfer = cluster.transfer_s(point.prompt_tokens)
    for dealt in _dealt(arrivals_s, cluster.decode_nodes):  # the router chooses both nodes on arrival
        numbers = sorted(dealt, key=lambda number: handed[number])
        times = [handed[number] for number in numbers]
        found = _fetch_and_serve(speeds, point, times, transfer, point.output_tokens)
        first |= {number: found.first_s[place] for place, number in enumerate(numbers)}
        last |= {number: found.last_s[place] for place, number in enumerate(numbers)}
    return _served(cluster, point, arrivals_s, first, last)


def _served(
    cluster: Cluster,
    point: Point,
    arrivals_s: Sequence[float],
    first_s: dict[int, float],
    last_s: dict[int, float],
) -> Served:
    outside = cluster.speeds.request_s
    numbers = range(len(arrivals_s))
    ttft = tuple(first_s[i] - arrivals_s[i] + outside for i in numbers)
    tpot = tuple((last_s[i] - first_s[i]) / (point.output_tokens - 1) for i in numbers)
    e2e = tuple(last_s[i] - arrivals_s[i] + outside for i in numbers)
    return Served(ttft, tpot, e2e, max(last_s.values()) + outside)

"""The break-even model step by step, for one list of arrivals.

The formulas of disagglab/breakeven.py hold in equilibrium, and a run of seconds never gets there: it begins
with idle nodes. Here the same engine is advanced from step to step through the very arrivals of a run. That
also checks the formulas (selftest/test_breakeven.py): both say the same of a run that is long.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagglab.breakeven import Cluster, Point, Speeds


@dataclass(frozen=True)
class Means:
    """Means over the requests of a run, s."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


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

    def step(self, alone_s: float) -> None:
        """A step that takes ``alone_s`` beside what its sequences cost, and gives each of them a token."""
        own = self.speeds.step.sequence_s(self.context_tokens)
        self.now_s += alone_s + own * len(self.under_way)
        self.under_way = {number: wanted - 1 for number, wanted in self.under_way.items()}
        for number, wanted in self.under_way.items():
            self.first_s.setdefault(number, self.now_s)
            if wanted == 0:
                self.last_s[number] = self.now_s
        self.under_way = {number: wanted for number, wanted in self.under_way.items() if wanted}


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
            engine.step(speeds.step.base_s)
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
            engine.step(speeds.step.base_s)
    return engine


def _dealt(arrivals_s: Sequence[float], nodes: int) -> list[list[int]]:
    """Requests by node, round robin in the order of arrival."""
    order = sorted(range(len(arrivals_s)), key=lambda number: arrivals_s[number])
    return [order[node::nodes] for node in range(nodes)]


def replicated(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Means:
    """What the replicas make of these arrivals; the point's rate is not looked at."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for numbers in _dealt(arrivals_s, cluster.replicas):
        found = _serve(cluster, point, [arrivals_s[i] for i in numbers], point.output_tokens)
        first |= {number: found.first_s[place] for place, number in enumerate(numbers)}
        last |= {number: found.last_s[place] for place, number in enumerate(numbers)}
    return _means(cluster, point, arrivals_s, first, last)


def disaggregated(cluster: Cluster, point: Point, arrivals_s: Sequence[float]) -> Means:
    """What prefill and decode nodes make of these arrivals; the point's rate is not looked at."""
    speeds = cluster.speeds
    ended: dict[int, float] = {}
    for numbers in _dealt(arrivals_s, cluster.prefill_nodes):
        found = _serve(cluster, point, [arrivals_s[i] for i in numbers], 1)
        ended |= {number: found.last_s[place] for place, number in enumerate(numbers)}
    handed = [ended[number] + speeds.handoff_s for number in range(len(arrivals_s))]
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    transfer = cluster.transfer_s(point.prompt_tokens)
    for numbers in _dealt(handed, cluster.decode_nodes):
        times = [handed[number] for number in numbers]
        found = _fetch_and_serve(speeds, point, times, transfer, point.output_tokens)
        first |= {number: found.first_s[place] for place, number in enumerate(numbers)}
        last |= {number: found.last_s[place] for place, number in enumerate(numbers)}
    return _means(cluster, point, arrivals_s, first, last)


def _means(
    cluster: Cluster,
    point: Point,
    arrivals_s: Sequence[float],
    first_s: dict[int, float],
    last_s: dict[int, float],
) -> Means:
    outside = cluster.speeds.request_s
    numbers = range(len(arrivals_s))
    ttft = statistics.fmean(first_s[i] - arrivals_s[i] for i in numbers) + outside
    decode = statistics.fmean(last_s[i] - first_s[i] for i in numbers)
    return Means(ttft, decode / (point.output_tokens - 1), ttft + decode)

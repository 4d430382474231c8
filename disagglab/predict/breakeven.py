"""Where disaggregated serving answers sooner than as many replicas: the break-even map, from measured or
assumed speeds.

The model is a few lines of queueing theory on the speeds of one engine; docs/explanation/break-even.md
derives each of them. An engine works in steps. A step costs something by itself (reading the weights), and
more for each sequence that gets a token in it and for each prompt that is computed in it. All times are
means.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagglab.kv.layout import KvLayout
from disagglab.kv.shape import transfer_time_s
from disagglab.predict.speeds import Limits
from disagglab.predict.speeds import Prefill as Prefill  # these three are words of the model as well
from disagglab.predict.speeds import Speeds as Speeds
from disagglab.predict.speeds import Step as Step

UNSTABLE = 1.0  # utilisation from which on a queue grows without end
FINE = 1.04  # ratio of neighbouring lengths on the boundary


@dataclass(frozen=True)
class Cluster:
    """As many equal nodes as there are prefill and decode nodes; the replicas are all of them.

    ``step_tokens``, ``sequences``: what a step holds at most, as Limits has it; ``decode_step_tokens`` and
    ``decode_sequences`` on decode nodes, 0: the same. The formulas of this module know ``step_tokens`` alone.
    """

    speeds: Speeds
    layout: KvLayout
    vllm_version: str
    step_tokens: int
    prefill_nodes: int = 1
    decode_nodes: int = 1
    sequences: int = 0
    decode_step_tokens: int = 0
    decode_sequences: int = 0

    @property
    def limits(self) -> Limits:
        """Of a replica and of a prefill node."""
        return Limits(self.step_tokens, self.sequences)

    @property
    def decode_limits(self) -> Limits:
        """Of a decode node."""
        return Limits(self.decode_step_tokens or self.step_tokens, self.decode_sequences or self.sequences)

    @property
    def replicas(self) -> int:
        """Nodes in all."""
        return self.prefill_nodes + self.decode_nodes

    @property
    def links(self) -> int:
        """Transfers that can be under way at full rate: a node has one link, so the smaller role decides."""
        return min(self.prefill_nodes, self.decode_nodes)

    def prompt_costs_s(self, prompt_tokens: int) -> tuple[float, float]:
        """What prompts of this length that wait together share, and what each of them adds.

        Where a step does not take two of them, nothing is shared.
        """
        prefill = self.speeds.prefill
        if 2 * prompt_tokens > self.step_tokens:
            return 0.0, self.prefill_s(prompt_tokens)
        return prefill.base_s, prefill.work_s(prompt_tokens)

    def pieces(self, prompt_tokens: int) -> int:
        """Steps that a prompt takes on an engine that does nothing else: as many as it is cut into. Beside
        sequences that decode, each of which has a token of the budget, it can be a few more.
        """
        return -(-prompt_tokens // self.step_tokens) if self.step_tokens else 1

    def prefill_s(self, prompt_tokens: int) -> float:
        """Time of a prompt alone on a node, in all its pieces."""
        return self.speeds.prefill.time_s(prompt_tokens, self.pieces(prompt_tokens))

    def stop_s(self, prompt_tokens: int) -> float:
        """How long a prefill stops the sequences that decode on the same engine, in all: the time of its
        steps less that of those that they replace, because each of its pieces yields a token to them too.
        """
        longer_s = self.speeds.mixed_base_s - self.speeds.step.base_s
        return self.pieces(prompt_tokens) * longer_s + self.speeds.prefill.work_s(prompt_tokens)

    def transfer_s(self, prompt_tokens: int) -> float:
        """Time to move a prompt's KV blocks over an idle link."""
        size = self.layout.bytes_to_move(prompt_tokens, self.vllm_version)
        return transfer_time_s(size, self.speeds.link_bytes_per_s, self.speeds.link_latency_s)


@dataclass(frozen=True)
class Point:
    """A load: requests of one shape that arrive as a Poisson process."""

    prompt_tokens: int
    output_tokens: int
    rate_per_s: float

    @property
    def context_tokens(self) -> float:
        """Mean number of tokens behind a sequence while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True)
class Side:
    """One topology under one load; means, s.

    ``queue_s``: wait for the engine that prefills. ``handover_s``: from the end of prefill to the first
    token of the client; 0 with replicas. ``batch``: other sequences that a decoding one finds beside it.
    ``use``: utilisation by station; from 1 on the station falls behind, and all times are infinite.
    """

    queue_s: float
    prefill_s: float
    handover_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    batch: float
    use: Mapping[str, float]

    @property
    def stable(self) -> bool:
        """Whether every station keeps up."""
        return max(self.use.values()) < UNSTABLE


@dataclass(frozen=True)
class Outcome:
    """Both topologies at one point. ``load``: its rate as a share of what the replicas can bear.

    ``parts_s``: what adds up to the difference of the two E2E, disaggregated - replicated; empty where one
    of them is unstable.
    """

    point: Point
    load: float
    replicated: Side
    disaggregated: Side
    parts_s: Mapping[str, float]

    def ratio(self, figure: str = "e2e_s") -> float:
        """Disaggregated / replicated; infinite where only disaggregation falls behind, nan where both do."""
        ours, theirs = getattr(self.disaggregated, figure), getattr(self.replicated, figure)
        if math.isinf(theirs):
            return math.nan if math.isinf(ours) else 0.0
        return float(ours / theirs)

    @property
    def wins(self) -> bool:
        """Whether a request is answered sooner by disaggregated serving, on average."""
        return self.ratio() < 1

    @property
    def decided_by(self) -> str:
        """What contributes most to the outcome; the station that falls behind where there is one."""
        for side in (self.disaggregated, self.replicated):
            if not side.stable:
                return f"{max(side.use, key=lambda name: side.use[name])} falls behind"
        sign = -1 if self.wins else 1
        return max(self.parts_s, key=lambda name: sign * self.parts_s[name])


def queue_s(rate_per_s: float, each_s: float, shared_s: float = 0.0, arrivals_scv: float = 1.0) -> float:
    """Mean time that others cost in front of a server with constant service times.

    ``shared_s`` of 0: one is served after the other. Exact for Poisson arrivals (M/D/1, Pollaczek and
    Khinchine), Kingman's approximation otherwise. Above 0: all who wait are served together, in shared + each
    x how many they are, and are done at the same time. That is a gated reservation system (D. Bertsekas, R.
    Gallager, Data Networks, 3.5.2) with a reservation only where somebody waits; an approximation that
    selftest/predict/test_breakeven.py holds against the steps themselves.

    Args:
        arrivals_scv: squared coefficient of variation of the gaps between arrivals: 1 for a Poisson process,
            1/n where a round robin sends every n-th request of one.
    """
    use = rate_per_s * each_s
    if use >= UNSTABLE:
        return math.inf
    alone = arrivals_scv * use * each_s / (2 * (1 - use))
    if shared_s == 0:
        return alone
    busy = rate_per_s * (shared_s + each_s) / (1 + rate_per_s * shared_s)
    done_together = alone * use / (1 + use)
    return alone + done_together + busy * shared_s * (1 + 2 * use) / (2 * (1 - use))


def decoding_share(rate_per_s: float, tokens: float, base_s: float, sequence_s: float) -> float:
    """Share of time in which at least one sequence is under way on an engine that only decodes.

    Sequences share the engine: with k of them each gets a token in base + sequence x k. That is a queue
    whose equilibrium is a negative binomial distribution (a Poisson one if more sequences cost nothing).
    """
    busy = rate_per_s * tokens * sequence_s
    if busy >= UNSTABLE:
        return 1.0
    if busy == 0:
        return -math.expm1(-rate_per_s * tokens * base_s)
    return -math.expm1((1 + base_s / sequence_s) * math.log1p(-busy))


def capacity_per_s(cluster: Cluster, prompt_tokens: int, output_tokens: int) -> float:
    """Requests per second that all replicas together bear: each costs its prefill, and its own part of its
    decode steps. The part that all sequences share is amortised by large batches.
    """
    point = Point(prompt_tokens, output_tokens, 0.0)
    own = cluster.speeds.step.sequence_s(point.context_tokens)
    return cluster.replicas / (cluster.stop_s(prompt_tokens) + (output_tokens - 1) * own)


def disaggregated_capacity_per_s(cluster: Cluster, prompt_tokens: int, output_tokens: int) -> float:
    """Requests per second that the slowest of prefill, decode and link bears."""
    point = Point(prompt_tokens, output_tokens, 1.0)
    return 1 / max(_disaggregated_use(cluster, point).values())


def replicated(cluster: Cluster, point: Point) -> Side:
    """Every node takes every n-th request and does all of it: prefills stop the sequences that decode."""
    speeds, rate = cluster.speeds, point.rate_per_s / cluster.replicas
    own = speeds.step.sequence_s(point.context_tokens)
    stops = rate * cluster.stop_s(point.prompt_tokens)
    steps = point.output_tokens - 1
    use = {"replica": stops + rate * steps * own}
    prefill = cluster.prefill_s(point.prompt_tokens)
    if use["replica"] >= UNSTABLE:
        return _overloaded(prefill, use)
    tpot = (speeds.step.base_s + own) / (1 - use["replica"])
    batch = rate * steps * tpot
    shared, each = cluster.prompt_costs_s(point.prompt_tokens)
    beside = own * batch * cluster.pieces(point.prompt_tokens)  # sequences that decode in the same steps
    shared, each = (shared + beside, each) if shared else (0.0, each + beside)
    use["replica's prefill"] = rate * each
    if rate * each >= UNSTABLE:
        return _overloaded(prefill, use)
    decoding = decoding_share(rate / (1 - stops), steps, speeds.step.base_s, own) * (1 - stops)
    running = decoding * speeds.step.time_s(batch, point.context_tokens) / 2
    queue = queue_s(rate, each, shared, 1 / cluster.replicas) + running / (1 - rate * each)
    ttft = speeds.request_s + queue + prefill + beside
    return Side(queue, prefill + beside, 0.0, ttft, tpot, ttft + steps * tpot, batch, use)


def disaggregated(cluster: Cluster, point: Point) -> Side:
    """Prefill nodes queue prompts alone; then KV crosses the link; then a decode node yields every token."""
    speeds = cluster.speeds
    use = _disaggregated_use(cluster, point)
    prefill = cluster.prefill_s(point.prompt_tokens)
    if max(use.values()) >= UNSTABLE:
        return _overloaded(prefill, use)
    shared, each = cluster.prompt_costs_s(point.prompt_tokens)
    queue = queue_s(point.rate_per_s / cluster.prefill_nodes, each, shared, 1 / cluster.prefill_nodes)
    own = speeds.step.sequence_s(point.context_tokens)
    tpot = (speeds.step.base_s + own) / (1 - use["decode"])
    rate = point.rate_per_s / cluster.decode_nodes
    batch = rate * point.output_tokens * tpot
    busy = decoding_share(rate, point.output_tokens, speeds.step.base_s, own)
    step = speeds.step.time_s(batch, point.context_tokens)
    transfer = cluster.transfer_s(point.prompt_tokens)
    transfer += queue_s(point.rate_per_s / cluster.links, transfer)
    # The scheduler looks once a step: for the request, and for the end of its transfer.
    waiting = busy * (step / 2 + max(step, transfer + step / 2)) + (1 - busy) * transfer
    handover = speeds.handoff_s + waiting + step + own
    ttft = speeds.request_s + queue + prefill + handover
    e2e = ttft + (point.output_tokens - 1) * tpot
    return Side(queue, prefill, handover, ttft, tpot, e2e, batch, use)


def _disaggregated_use(cluster: Cluster, point: Point) -> dict[str, float]:
    speeds, rate = cluster.speeds, point.rate_per_s
    own = speeds.step.sequence_s(point.context_tokens)
    return {
        "prefill": rate / cluster.prefill_nodes * cluster.prompt_costs_s(point.prompt_tokens)[1],
        "decode": rate / cluster.decode_nodes * point.output_tokens * own,
        "link": rate / cluster.links * cluster.transfer_s(point.prompt_tokens),
    }


def _overloaded(prefill_s: float, use: Mapping[str, float]) -> Side:
    never = math.inf
    return Side(never, prefill_s, never, never, never, never, never, use)


def outcome(cluster: Cluster, point: Point) -> Outcome:
    """Both topologies at a point, and what their difference is made of."""
    theirs, ours = replicated(cluster, point), disaggregated(cluster, point)
    load = point.rate_per_s / capacity_per_s(cluster, point.prompt_tokens, point.output_tokens)
    parts: dict[str, float] = {}
    if theirs.stable and ours.stable:
        own = cluster.speeds.step.sequence_s(point.context_tokens)
        steps = point.output_tokens - 1
        undisturbed = (cluster.speeds.step.base_s + own) / (
            1 - point.rate_per_s / cluster.replicas * steps * own
        )
        parts = {
            "prefill queue": ours.queue_s - theirs.queue_s,
            "transfer": ours.handover_s,
            "decode batch": steps * (ours.tpot_s - undisturbed),
            "interference": -steps * (theirs.tpot_s - undisturbed) - (theirs.prefill_s - ours.prefill_s),
        }
    return Outcome(point, load, theirs, ours, parts)


def at_load(cluster: Cluster, prompt_tokens: int, output_tokens: int, load: float) -> Outcome:
    """The outcome at a rate that is a share of what the replicas can bear."""
    rate = load * capacity_per_s(cluster, prompt_tokens, output_tokens)
    return outcome(cluster, Point(prompt_tokens, output_tokens, rate))


def grid(
    cluster: Cluster, prompts: Sequence[int], outputs: Sequence[int], loads: Sequence[float]
) -> list[Outcome]:
    """The map: every prompt length with every output length at every load."""
    return [at_load(cluster, *cell) for cell in itertools.product(prompts, outputs, loads)]


def lengths(least: int, most: int, ratio: float = 2.0) -> list[int]:
    """Whole numbers from least to most, each about ``ratio`` times the one before."""
    count = max(0, math.floor(math.log(most / least) / math.log(ratio) + 1e-9))
    return sorted({round(least * ratio**power) for power in range(count + 1)})


def boundary(
    cluster: Cluster, prompts: Sequence[int], outputs: tuple[int, int], load: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The edge of the region in which disaggregation wins at a load, as a closed curve (prompt, output).

    For each prompt length the shortest and the longest output, between the two of ``outputs``, at which the
    ratio of E2E is below 1; prompts without one are left out.
    """
    edges = []
    for prompt in prompts:
        won = [m for m in lengths(*outputs, FINE) if at_load(cluster, prompt, m, load).wins]
        if won:
            edges.append((prompt, min(won), max(won)))
    xs = [edge[0] for edge in edges] + [edge[0] for edge in reversed(edges)]
    ys = [edge[1] for edge in edges] + [edge[2] for edge in reversed(edges)]
    return tuple(map(float, [*xs, *xs[:1]])), tuple(map(float, [*ys, *ys[:1]]))

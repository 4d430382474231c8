"""One engine, advanced from step to step through requests that are known beforehand.

What a step computes follows vLLM's scheduler (vllm/v1/core/sched/scheduler.py, ``schedule``): a budget of
max-num-batched-tokens tokens goes to the sequences under way, one each, then to the prompt that was cut in an
earlier step, then to waiting prompts in the order of arrival, each as much as is left; at most max-num-seqs
sequences are under way, cut prompts among them. A prompt yields its first token at the end of the step that
computes its last piece. Left out: prefix caching, preemption for lack of KV memory, speculation,
asynchronous scheduling.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagglab.predict.speeds import Limits, Speeds

Gap = tuple[float, int]  # time between two tokens of a request, s, and how often it came in a row


@dataclass(frozen=True)
class Request:
    """One request: when the engine may take it up, and its lengths in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def context_tokens(self) -> float:
        """Mean number of tokens behind it while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass
class Engine:
    """An engine between two steps, and when each request of it had its tokens, by place in its requests, s.

    ``under_way``: a heap of (number of the step that yields the last token, place). ``blocks``: steps so
    far, equal ones as (s, how many).
    """

    speeds: Speeds
    now_s: float = 0.0
    first_s: dict[int, float] = field(default_factory=dict)
    last_s: dict[int, float] = field(default_factory=dict)
    gaps: dict[int, list[Gap]] = field(default_factory=dict)
    blocks: list[Gap] = field(default_factory=list)
    under_way: list[tuple[int, int]] = field(default_factory=list)
    _steps: int = 0
    _sequences_s: float = 0.0  # what the sequences under way add to a step
    _own_s: dict[int, float] = field(default_factory=dict)
    _first_block: dict[int, int] = field(default_factory=dict)

    def take_up(self, place: int, request: Request, tokens: int) -> None:
        """Let a request decode from the next step on until it has so many more tokens; none: it is done."""
        if tokens == 0:
            self.last_s[place] = self.now_s
            self.gaps[place] = []
            return
        own = self.speeds.step.sequence_s(request.context_tokens)
        self._own_s[place] = own
        self._sequences_s += own
        heapq.heappush(self.under_way, (self._steps + tokens, place))

    def first_token(self, place: int) -> None:
        """Note that the step that has just ended yielded a request's first token."""
        self.first_s[place] = self.now_s
        self._first_block[place] = len(self.blocks)

    def advance(self, alone_s: float, count: int = 1) -> None:
        """Equal steps that take ``alone_s`` each beside what their sequences cost, and give each of these a
        token.
        """
        each = alone_s + self._sequences_s
        self.now_s += each * count
        self._steps += count
        self.blocks.append((each, count))
        while self.under_way and self.under_way[0][0] <= self._steps:
            _, place = heapq.heappop(self.under_way)
            self.last_s[place] = self.now_s
            self.gaps[place] = self.blocks[self._first_block.get(place, len(self.blocks)) :]
            self._sequences_s -= self._own_s.pop(place)
        if not self.under_way:
            self._sequences_s = 0.0

    def decode(self, until_s: float) -> None:
        """Steps without a prompt, until a sequence has its last token or ``until_s`` has come."""
        each = self.speeds.step.base_s + self._sequences_s
        count = self.under_way[0][0] - self._steps
        if until_s < self.now_s + count * each:
            count = max(1, math.ceil((until_s - self.now_s) / each))
        self.advance(self.speeds.step.base_s, count)


def serve(speeds: Speeds, limits: Limits, requests: Sequence[Request], tokens: int | None = None) -> Engine:
    """An engine that prefills and decodes.

    Args:
        requests: in the order of arrival.
        tokens: of each answer that are made here, 1 on a prefill node; all if absent.
    """
    engine = Engine(speeds)
    prefill, most = speeds.prefill, limits.most_sequences
    cut: tuple[int, int] | None = None  # place of the prompt that was begun, tokens of it that are computed
    coming = 0  # place of the first request that is not taken up
    while coming < len(requests) or cut or engine.under_way:
        if coming < len(requests) and not cut and not engine.under_way:
            engine.now_s = max(engine.now_s, requests[coming].at_s)
        room = limits.step_tokens - len(engine.under_way) if limits.step_tokens else sys.maxsize
        running = len(engine.under_way) + (cut is not None)
        work, computed = 0.0, False
        whole: list[int] = []  # places of the prompts of which the step computes the last piece
        while room > 0:
            if cut is None:
                if coming == len(requests) or requests[coming].at_s > engine.now_s or running == most:
                    break
                if whole and not limits.step_tokens:
                    break
                cut, coming, running = (coming, 0), coming + 1, running + 1
            place, done = cut
            length = requests[place].prompt_tokens
            upto = min(length, done + room)
            work += prefill.work_s(upto) - prefill.work_s(done)
            room, computed = room - (upto - done), True
            cut = (place, upto) if upto < length else None
            if cut is None:
                whole.append(place)
        if computed:
            engine.advance((speeds.mixed_base_s if engine.under_way else prefill.base_s) + work)
            for place in whole:
                engine.first_token(place)
                wanted = requests[place].output_tokens if tokens is None else tokens
                engine.take_up(place, requests[place], wanted - 1)
        else:
            waits = coming < len(requests) and len(engine.under_way) < most
            engine.decode(requests[coming].at_s if waits else math.inf)
    return engine


def fetch_and_serve(
    speeds: Speeds, limits: Limits, requests: Sequence[Request], transfers_s: Sequence[float]
) -> Engine:
    """An engine that fetches KV and decodes. Between two steps it starts transfers, one after another on the
    link, and takes up requests whose transfer has ended, as many as may be under way.

    Args:
        requests: in the order in which they are handed over.
        transfers_s: of each, alone on the link.
    """
    engine = Engine(speeds)
    most = limits.most_sequences
    coming, moving = 0, 0  # places of the first request whose transfer has not begun, and not been used
    ends_s: list[float] = []

    def next_s() -> float:
        """When the next transfer ends or the next request is handed over."""
        ends = ends_s[moving] if moving < len(ends_s) else math.inf
        return min(ends, requests[coming].at_s if coming < len(requests) else math.inf)

    while moving < len(requests) or engine.under_way:
        if not engine.under_way:
            engine.now_s = max(engine.now_s, next_s())
        full = len(engine.under_way) >= most  # then vLLM's scheduler does not look at its queue
        while not full and coming < len(requests) and requests[coming].at_s <= engine.now_s:
            ends_s.append(max(ends_s[-1] if ends_s else 0.0, engine.now_s) + transfers_s[coming])
            coming += 1
        fresh = []
        while moving < coming and ends_s[moving] <= engine.now_s and len(engine.under_way) < most:
            engine.take_up(moving, requests[moving], requests[moving].output_tokens)
            fresh.append(moving)
            moving += 1
        if fresh:  # a step by itself: the time until a first token is no gap
            engine.advance(speeds.step.base_s)
            for place in fresh:
                engine.first_token(place)
        elif engine.under_way:
            engine.decode(math.inf if len(engine.under_way) >= most else next_s())
    return engine

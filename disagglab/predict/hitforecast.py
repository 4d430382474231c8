"""Which share of the prompts' tokens servers find in their prefix caches, before anything has run.

Requests are replayed one at a time on models of the servers' caches (kv/prefixcache.py), placed as
a strategy would place them (:mod:`disagglab.predict.strategies`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagglab.kv.prefixcache import PrefixCache
from disagglab.kv.prefixcache import Request as Request
from disagglab.predict.strategies import Strategy

SEEDS = 1000
TAIL = 0.005  # left out at each end: the central 99 %


@dataclass(frozen=True)
class HitForecast:
    """Hit rate = hit tokens / prompt tokens, all requests together, with the interval it should lie in.

    ``how``: in words.
    """

    rate: float
    low: float
    high: float
    how: str


def replay(requests: Sequence[Request], servers: Sequence[int], blocks: int, block_size: int) -> list[int]:
    """Hit tokens of each request, one after the other.

    Args:
        requests: in the order in which they were served.
        servers: which server took each, counted from 0.
        blocks: ``num_gpu_blocks`` of each server.
        block_size: tokens per block.

    Raises:
        InvalidRun: if a request needs more blocks than a server has.
        ValueError: if there are not as many servers as requests.
    """
    caches: dict[int, PrefixCache] = {}
    hits = []
    for request, server in zip(requests, servers, strict=True):
        cache = caches.setdefault(server, PrefixCache(blocks, block_size))
        hits.append(cache.run(request.chain(block_size)))
    return hits


def forecast(
    strategy: Strategy,
    requests: Sequence[Request],
    workers: int,
    blocks: int,
    block_size: int,
    homes: Mapping[int, int] | None = None,
) -> HitForecast:
    """Hit rate that a strategy leads to.

    Where chance decides, the rate is the mean of 1,000 replays, and the interval is their central 99 %;
    otherwise both are the one replay's. Then the interval is widened on both sides by one block for every
    request after the first of its conversation: such a prompt holds an answer, the text of a real answer need
    not turn into the tokens that were sampled, and one block or the other may be found less or more.

    Args:
        strategy: one of :data:`disagglab.predict.strategies.STRATEGIES`.
        requests: in the order in which they will be sent, one at a time.
        workers: number of equal servers.
        blocks: ``num_gpu_blocks`` of each.
        block_size: tokens per block.
        homes: worker of each conversation, where the strategy goes by session and the hash is known; else
            they are drawn.

    Raises:
        InvalidRun: if a request needs more blocks than a worker has.
        ValueError: without requests.
    """
    prompts = sum(len(request.prompt_ids) for request in requests)
    if not prompts:
        raise ValueError("nothing to forecast: no request has a prompt")
    chances = strategy.draws or (strategy.session_header and homes is None)
    conversations = sorted({request.conversation for request in requests})
    rates = []
    for seed in range(SEEDS if chances else 1):
        rng = random.Random(seed)
        drawn = homes if homes is not None else {one: rng.randrange(workers) for one in conversations}
        choose = strategy.chooser()
        caches = [PrefixCache(blocks, block_size) for _ in range(workers)]
        found = 0
        for index, request in enumerate(requests):
            found += caches[choose(index, request, caches, rng, drawn)].run(request.chain(block_size))
        rates.append(found / prompts)
    rates.sort()
    out = int(TAIL * len(rates))
    margin = block_size * (len(requests) - len(conversations)) / prompts
    spread = f"central 99 % of {SEEDS:,} replays" if chances else "one replay"
    return HitForecast(
        rate=sum(rates) / len(rates),
        low=max(0.0, rates[out] - margin),
        high=min(1.0, rates[-1 - out] + margin),
        how=f"{spread}, widened by one block of {block_size} tokens for each turn after the first",
    )

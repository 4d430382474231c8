"""A pool of KV blocks under traffic: workloads that fit into it, and when traffic has aged it.

On a fresh server a prompt's blocks lie side by side, and NIXL merges neighbours into few descriptors. Traffic
changes that, and figures that are taken meanwhile are a trend, no replicates.

Long prompts with short answers settle it slowly, if at all. A free list is a queue, and a request gives its
blocks back last one first; so each pass turns the order round within what one prompt took, and neighbours
merge again in every other pass. Long answers settle it: while requests decode, each takes its next block from
the front of the queue in turn with all others under way, so neighbours go to different requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.kv.shape import blocks
from disagglab.measure import ledger
from disagglab.serving.topology import Topology

PASSES = 2.0  # times that traffic goes through a pool before anything counts
MOST_AGEING_RUNS, SHORT_AGEING_RUNS = 12, 2
STILL = 0.10  # two probes that differ by less are the same
SHORT, LONG = 1 / 8, 1 / 2  # of max_model_len: 2,048 and 8,192 tokens of 16,384
BUSY, SHORT_BUSY = 16, 4  # requests under way at once
USE = 0.8  # of a pool, by all requests under way
AGEING_PROMPTS = (1 / 16, 1 / 8, 1 / 4)  # of the short prompts
AGEING_ANSWERS, AGEING_AT_ONCE = 4, 4  # times those of many short prompts at once
AGEING_WAVES = 2
PROBE_REQUESTS, PROBE_BLOCKS = 2, 4  # with fewer blocks a prompt has no neighbours to lose


@dataclass
class Ageing:
    """A pool under ageing traffic. ``fresh`` and ``probes``: descriptors of a few single prompts, as a share
    of the worst possible, before any ageing run and after each. ``passes``: how often traffic went through
    the pool.
    """

    fresh: float
    probes: list[float] = field(default_factory=list)
    passes: float = 0.0

    @property
    def still(self) -> bool:
        """Whether the last two probes, both after traffic, differ by less than STILL of the larger."""
        if len(self.probes) < 2:
            return False
        less, more = sorted(self.probes[-2:])
        return more - less < STILL * more

    @property
    def settled(self) -> bool:
        """Whether the pool has been passed through often enough and does not change any more."""
        return self.still and self.passes >= PASSES

    def over(self, most: int) -> bool:
        """Whether ageing ends: it has settled, or ``most`` runs were made."""
        return self.settled or len(self.probes) >= most

    def __str__(self) -> str:
        runs, passes = f"{len(self.probes)} runs", f"{self.passes:.1f} passes"
        if self.settled:
            return f"settled after {runs}, {passes}"
        why = f"{passes} of {PASSES:g}" if self.still else f"still changing, {passes}"
        return f"not settled after {runs}: {why}"


def tokens_of(topology: Topology) -> int:
    """Tokens that the smallest pool of KV blocks of a topology holds.

    Raises:
        InvalidRun: if a server does not report the size of its pool.
    """
    configs = [ledger.cache_config(server.metrics()) for server in topology.servers]
    return min(int(one["num_gpu_blocks"]) * int(one["block_size"]) for one in configs)


def workloads(lab: Lab, tokens: int, short: bool) -> list[Workload]:
    """Short prompts one at a time, then many at once; long ones likewise.

    Args:
        tokens: of the smallest pool; what is under way at once fits into it.
        short: fewer requests, and fewer at once.
    """
    most = SHORT_BUSY if short else BUSY
    found = []
    for what, share, alone, waves, output in (("short", SHORT, 8, 3, 64), ("long", LONG, 4, 2, 16)):
        prompt = int(share * lab.model.max_model_len) - (output if share == LONG else 0)
        answer = max(2, round(output * lab.scale.output))
        at_once = max(1, min(most, int(USE * tokens / (prompt + answer))))
        shape = {"prompt_tokens": prompt, "output_tokens": answer}
        requests = max(2, round(alone / (4 if short else 1)))
        found.append(Workload(name=f"alone-{what}", requests=requests, concurrency=1, **shape))
        name = f"{at_once}-at-once-{what}"
        found.append(Workload(name=name, requests=waves * at_once, concurrency=at_once, **shape))
    return found


def traffic(measured: Sequence[Workload], tokens: int) -> list[Workload]:
    """Ageing runs to make in turn: prompts of several lengths, all short, with long answers, many at once.

    Args:
        measured: what :func:`workloads` returns.
        tokens: of the smallest pool.
    """
    _, short, _, long = measured
    answer = min(AGEING_ANSWERS * short.output_tokens, long.tokens)
    found = []
    for share in AGEING_PROMPTS:
        prompt = max(1, round(share * short.prompt_tokens))
        fit = int(USE * tokens / (prompt + answer))
        at_once = max(1, min(AGEING_AT_ONCE * short.most_under_way, fit))
        found.append(
            Workload(
                name=f"ageing-{prompt}",
                prompt_tokens=prompt,
                output_tokens=answer,
                requests=AGEING_WAVES * at_once,
                concurrency=at_once,
            )
        )
    return found


def probe(measured: Sequence[Workload], block: int) -> Workload:
    """Two single prompts: the short ones, or the long ones where those fill fewer than PROBE_BLOCKS blocks.

    Args:
        measured: what :func:`workloads` returns.
        block: tokens per KV cache block.
    """
    short, _, long, _ = measured
    taken = short if blocks(short.prompt_tokens, block) >= PROBE_BLOCKS else long
    return taken.model_copy(update={"name": "probe", "requests": PROBE_REQUESTS})


def age(
    each: Sequence[Workload],
    tokens: int,
    most: int,
    send: Callable[[Workload], object],
    probed: Callable[[], float],
) -> Ageing:
    """Send ageing runs in turn, a probe before the first and after each, until :meth:`Ageing.over`.

    Args:
        each: the runs to make, over and over; see :func:`traffic`.
        tokens: that the pool holds.
        most: ageing runs to make at most, settled or not.
        send: makes a run.
        probed: descriptors of a probe that it sends, as a share of the worst possible.
    """
    found = Ageing(fresh=probed())
    for one in itertools.cycle(each):
        if found.over(most):
            break
        send(one)
        found.passes += one.requests * one.tokens / tokens
        found.probes.append(probed())
    return found

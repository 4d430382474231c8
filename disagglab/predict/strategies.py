"""How vllm-router 0.1.17 chooses a worker: its arguments, and each rule as a function for forecasts.

No rule here sees load. ONE_AT_A_TIME has them as they are for requests one at a time: no worker has any load
when a request is placed, so every rule that goes by load meets a tie, and takes the first. In STRATEGIES such
a tie is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from disagglab.kv.prefixcache import PrefixCache, Request
from disagglab.kv.shape import common_prefix

SESSION_HEADER = "X-Session-ID"
CACHE_THRESHOLD = 0.3  # vllm-router's --cache-threshold

# (index of the request, the request, the workers' caches, source of chance, worker of each conversation)
Chooser = Callable[[int, Request, Sequence[PrefixCache], random.Random, Mapping[int, int]], int]


def at_random(
    _index: int,
    _request: Request,
    caches: Sequence[PrefixCache],
    rng: random.Random,
    _homes: Mapping[int, int],
) -> int:
    """Any worker."""
    return int(rng.random() * len(caches))


def in_turn(
    index: int,
    _request: Request,
    caches: Sequence[PrefixCache],
    _rng: random.Random,
    _homes: Mapping[int, int],
) -> int:
    """One worker after the other."""
    return index % len(caches)


def always_one(
    _index: int,
    _request: Request,
    _caches: Sequence[PrefixCache],
    _rng: random.Random,
    _homes: Mapping[int, int],
) -> int:
    """The same worker whatever is asked, as where the key of a hash is always the same."""
    return 0


def at_home(
    _index: int,
    request: Request,
    _caches: Sequence[PrefixCache],
    _rng: random.Random,
    homes: Mapping[int, int],
) -> int:
    """The worker of the request's conversation."""
    return homes[request.conversation]


class LargestMatch:
    """kv_aware's rule: the worker whose cache holds most of the prompt, even if that is nothing.

    Of equals vllm-router 0.1.17 takes the least loaded and, where none has any load, the first of its list,
    whose order differs from start to start. So requests one at a time all begin on one worker, and stay. With
    ``draws`` one of the equals is drawn, since which has the least load no forecast knows.
    """

    def __init__(self, draws: bool = False) -> None:
        self.draws = draws

    def __call__(
        self,
        _index: int,
        request: Request,
        caches: Sequence[PrefixCache],
        rng: random.Random,
        _homes: Mapping[int, int],
    ) -> int:
        """The worker."""
        matches = [cache.find(request.chain(cache.block_size)) for cache in caches]
        best = max(matches)
        ties = [worker for worker, match in enumerate(matches) if match == best]
        return ties[int(rng.random() * len(ties))] if self.draws and len(ties) > 1 else ties[0]


class OwnHistory:
    """cache_aware's rule: the worker with the longest prefix of the prompt among those sent there before.

    That worker is taken if the share of the prompt that is matched is more than ``threshold``; the first of
    equals. What matches less goes to the first worker, or with ``draws`` to any. The router's tree holds
    characters, this holds tokens; both grow with every prompt and no eviction by a worker is noticed.

    The rule is vllm-router's as published in its source, ``src/policies/cache_aware.rs``, where the least
    loaded worker takes what matches nowhere, and the first of equals is the least loaded. So requests one at
    a time all go to one worker. The comment at the head of that file names the worker with the smallest tree
    instead. Which one has the least load with others under way no forecast knows; ``draws`` stands for it.
    """

    def __init__(self, threshold: float = CACHE_THRESHOLD, draws: bool = False) -> None:
        self.threshold, self.draws = threshold, draws
        self.histories: list[list[Sequence[int]]] = []

    def __call__(
        self,
        _index: int,
        request: Request,
        caches: Sequence[PrefixCache],
        rng: random.Random,
        _homes: Mapping[int, int],
    ) -> int:
        """The worker, which then remembers the prompt."""
        self.histories = self.histories or [[] for _ in caches]
        prompt = request.prompt_ids
        shared = [
            max((common_prefix(prompt, old) for old in history), default=0) for history in self.histories
        ]
        best = max(shared)
        likely = best > self.threshold * len(prompt)
        otherwise = int(rng.random() * len(caches)) if self.draws else 0
        worker = shared.index(best) if likely else otherwise
        self.histories[worker].append(prompt)
        return worker


@dataclass(frozen=True)
class Strategy:
    """A way to route.

    Args:
        name: ours.
        policy: vllm-router's ``--policy``.
        options: further arguments of vllm-router that are the same in every run.
        session_header: whether clients name their conversation in SESSION_HEADER.
        events: whether the workers' KV cache events go to the router.
        what: how it chooses, for the report.
        chooser: makes the rule for one replay.
        draws: whether chance decides; else every replay gives the same.
    """

    name: str
    policy: str
    options: tuple[str, ...]
    session_header: bool
    events: bool
    what: str
    chooser: Callable[[], Chooser] = field(compare=False, repr=False)
    draws: bool


_ALL = (
    Strategy("random", "random", (), False, False, "any worker", lambda: at_random, draws=True),
    Strategy(
        "round_robin",
        "round_robin",
        (),
        False,
        False,
        "one worker after the other",
        lambda: in_turn,
        draws=False,
    ),
    Strategy(
        "prefix_hash",
        "consistent_hash",
        (),
        False,
        False,
        "by a hash of the request's text, which vllm-router 0.1.17 finds empty in a chat: all to one worker",
        lambda: always_one,
        draws=False,
    ),
    Strategy(
        "session_hash",
        "consistent_hash",
        (),
        True,
        False,
        f"by a hash of {SESSION_HEADER}: a conversation stays where it began",
        lambda: at_home,
        draws=False,
    ),
    Strategy(
        "power_of_two",
        "power_of_two",
        (),
        False,
        False,
        "the less loaded of two workers drawn; requests one at a time: any worker",
        lambda: at_random,
        draws=True,
    ),
    Strategy(
        "cache_aware",
        "cache_aware",
        ("--cache-threshold", f"{CACHE_THRESHOLD:g}"),
        False,
        False,
        "by the router's own tree of earlier prompts, if more than 30 % match, else the least loaded worker",
        lambda: OwnHistory(draws=True),
        draws=True,
    ),
    Strategy(
        "kv_aware",
        "kv_aware",
        ("--router-temperature", "0"),
        False,
        True,
        "the worker whose cache holds most of the prompt, as its KV cache events say",
        lambda: LargestMatch(draws=True),
        draws=True,
    ),
)
STRATEGIES: Mapping[str, Strategy] = MappingProxyType({one.name: one for one in _ALL})
# Requests one at a time meet no load that could tell equals apart; STRATEGIES draws where there is some.
ONE_AT_A_TIME: Mapping[str, Strategy] = MappingProxyType(
    {
        **STRATEGIES,
        "cache_aware": replace(STRATEGIES["cache_aware"], chooser=OwnHistory, draws=False),
        "kv_aware": replace(STRATEGIES["kv_aware"], chooser=LargestMatch, draws=False),
    }
)

"""How the strategies choose, requests one at a time."""

from __future__ import annotations

import random

from disagglab.kv.prefixcache import PrefixCache, Request
from disagglab.predict.strategies import ONE_AT_A_TIME, STRATEGIES, Chooser, OwnHistory


def request(conversation: int, *prompt: int) -> Request:
    return Request(conversation, 0, prompt, (0,))


def choices(choose: Chooser, requests: list[Request], workers: int = 2) -> list[int]:
    """Workers taken, each serving what it is given."""
    caches, rng, taken = [PrefixCache(100, 2) for _ in range(workers)], random.Random(0), []
    for index, one in enumerate(requests):
        taken.append(choose(index, one, caches, rng, {0: 1, 1: 0}))
        caches[taken[-1]].run(one.chain(2))
    return taken


def test_the_strategies_and_what_the_router_is_told() -> None:
    """Two of seven are one policy, told apart by the session header; one alone needs KV cache events."""
    assert list(STRATEGIES) == [
        *("random", "round_robin", "prefix_hash", "session_hash", "power_of_two", "cache_aware", "kv_aware")
    ]
    assert all(one.name == name and one.what for name, one in STRATEGIES.items())
    assert {name for name, one in STRATEGIES.items() if one.policy != name} == {"prefix_hash", "session_hash"}
    assert {one.policy for one in STRATEGIES.values() if one.policy != one.name} == {"consistent_hash"}
    assert [name for name, one in STRATEGIES.items() if one.session_header] == ["session_hash"]
    assert [name for name, one in STRATEGIES.items() if one.events] == ["kv_aware"]


def test_round_robin_takes_turns_and_a_session_stays() -> None:
    rows = [request(row % 2, row) for row in range(5)]
    assert choices(STRATEGIES["round_robin"].chooser(), rows) == [0, 1, 0, 1, 0]
    assert choices(STRATEGIES["session_hash"].chooser(), rows) == [1, 0, 1, 0, 1]


def test_random_reaches_every_worker_about_equally() -> None:
    for name in ("random", "power_of_two"):
        taken = choices(STRATEGIES[name].chooser(), [request(0, 1)] * 300, workers=3)
        assert all(70 < taken.count(worker) < 130 for worker in range(3))


def test_requests_one_at_a_time_all_begin_on_one_worker() -> None:
    """Nothing held anywhere, or the same on both: the first is taken each time, and the better one else."""
    choose, rng = ONE_AT_A_TIME["kv_aware"].chooser(), random.Random(0)
    caches = [PrefixCache(100, 2) for _ in range(2)]
    assert {choose(0, request(0, 1, 1, 2), caches, rng, {}) for _ in range(20)} == {0}
    caches[1].request([1, 1, 2], [0])
    assert choose(0, request(0, 1, 1, 2), caches, rng, {}) == 1
    assert choices(STRATEGIES["prefix_hash"].chooser(), [request(0, 1), request(1, 2)]) == [0, 0]


def test_kv_aware_goes_where_most_of_the_prompt_lies_and_draws_among_equals() -> None:
    """With the prompt's first block on both and the second on one, that one is taken, whichever it is."""
    choose, rng = STRATEGIES["kv_aware"].chooser(), random.Random(0)
    wanted = request(0, 1, 1, 2, 2, 3)
    for better in (0, 1):
        caches = [PrefixCache(100, 2) for _ in range(2)]
        caches[better].request([1, 1, 2, 2], [0])
        caches[1 - better].request([1, 1], [0])
        assert {choose(0, wanted, caches, rng, {}) for _ in range(20)} == {better}
    empty = [PrefixCache(100, 2) for _ in range(2)]
    assert {choose(0, wanted, empty, rng, {}) for _ in range(20)} == {0, 1}


def test_cache_aware_sends_all_to_the_first_worker_when_none_has_load() -> None:
    """What matches nowhere goes to the least loaded, the first of equals, so nothing is elsewhere."""
    rows = [request(row, *[row] * 10) for row in range(6)]
    assert choices(ONE_AT_A_TIME["cache_aware"].chooser(), rows + rows) == [0] * 12


def test_history_decides_only_above_the_threshold() -> None:
    """The second worker was sent the longest match: 4 of 10 tokens are more than 0.3, 3 are not."""
    for common, taken in ((4, 1), (3, 0)):
        choose = OwnHistory()
        choose.histories = [[[9] * 10], [[1] * 10]]
        wanted = request(1, *[1] * common, *[2] * (10 - common))
        assert choose(0, wanted, [PrefixCache(100, 2)] * 2, random.Random(0), {}) == taken


def test_under_load_what_matches_nowhere_is_drawn() -> None:
    """Both workers get some of what is new; what was sent before goes where it went."""
    rows = [request(row, *[row] * 10) for row in range(20)]
    taken = choices(STRATEGIES["cache_aware"].chooser(), rows + rows)
    assert set(taken) == {0, 1}
    assert taken[20:] == taken[:20]


def test_each_replay_begins_without_history() -> None:
    one, other = (ONE_AT_A_TIME["cache_aware"].chooser() for _ in range(2))
    choices(one, [request(0, 1, 2)])
    assert isinstance(one, OwnHistory)
    assert isinstance(other, OwnHistory)
    assert (len(one.histories), other.histories) == (2, [])

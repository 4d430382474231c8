"""Forecasts of the hit rate: by hand, and the order of the strategies under cache pressure."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from disagglab.errors import InvalidRun
from disagglab.kv.prefixcache import Request
from disagglab.predict.hitforecast import forecast, replay
from disagglab.predict.strategies import ONE_AT_A_TIME, STRATEGIES, Chooser

PAIR = [Request(0, 0, (1,) * 8, (1,) * 5), Request(0, 1, (1,) * 17, (1,))]  # the second finds 3 blocks of 4


def dialogue(shared: bool) -> list[Request]:
    """10 conversations of 5 turns in a new order each round: 205 + 70 tokens, then 16 + 70 a turn."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(count)]

    same = tokens(205)
    so_far = {one: same if shared else tokens(205) for one in range(10)}
    found = []
    for turn in range(5):
        for one in rng.sample(range(10), 10):
            prompt, answer = so_far[one] + tokens(70), tokens(16)
            found.append(Request(one, turn, tuple(prompt), tuple(answer)))
            so_far[one] = prompt + answer
    return found


def test_replay_finds_a_prefix_only_on_the_server_that_has_it() -> None:
    assert replay(PAIR, [1, 1], 20, 4) == [0, 12]
    assert replay(PAIR, [0, 1], 20, 4) == [0, 0]
    with pytest.raises(ValueError, match="shorter"):
        replay(PAIR, [0], 20, 4)
    with pytest.raises(InvalidRun, match="needs 5 KV blocks"):
        replay(PAIR, [0, 0], 5, 4)


def test_a_known_home_gives_one_replay_widened_by_a_block_for_each_later_turn() -> None:
    """12 of 25 prompt tokens, give or take the one block of the one turn that holds an answer."""
    found = forecast(STRATEGIES["session_hash"], PAIR, 2, 20, 4, homes={0: 1})
    assert (found.rate, found.low, found.high) == pytest.approx((12 / 25, 8 / 25, 16 / 25))
    assert found.how == "one replay, widened by one block of 4 tokens for each turn after the first"


def test_round_robin_finds_nothing_where_turns_alternate() -> None:
    found = forecast(STRATEGIES["round_robin"], PAIR, 2, 20, 4)
    assert (found.rate, found.low, found.high) == pytest.approx((0, 0, 4 / 25))


def test_chance_gives_the_mean_and_the_central_99_percent() -> None:
    """Half of the replays find 12 tokens, half none: the mean lies between, the interval holds both."""
    found = forecast(STRATEGIES["random"], PAIR, 2, 20, 4)
    assert found.rate == pytest.approx(6 / 25, abs=0.03)
    assert (found.low, found.high) == pytest.approx((0, 16 / 25))
    assert found.how.startswith("central 99 % of 1,000 replays")


@pytest.mark.parametrize(("together", "high"), [(5, 4 / 25), (6, 16 / 25)])
def test_the_interval_leaves_out_half_a_percent_at_each_end(together: int, high: float) -> None:
    """Of 1,000 replays, 5 that keep the conversation on one worker do not count; 6 do."""
    replays = itertools.count()

    def chooser() -> Chooser:
        stays = next(replays) < together
        return lambda index, *_: 0 if stays else index

    found = forecast(dataclasses.replace(STRATEGIES["random"], chooser=chooser), PAIR, 2, 20, 4)
    assert found.high == pytest.approx(high)
    assert found.rate == pytest.approx(together / 1000 * 12 / 25)
    assert next(replays) == 1000


def test_homes_are_drawn_where_they_are_not_known() -> None:
    """Own prompts under pressure: how many conversations share a worker decides, so the forecast spreads."""
    requests = dialogue(shared=False)
    drawn = forecast(STRATEGIES["session_hash"], requests, 2, 113, 32)
    even = forecast(
        STRATEGIES["session_hash"], requests, 2, 113, 32, homes={one: one % 2 for one in range(10)}
    )
    all_one = forecast(STRATEGIES["session_hash"], requests, 2, 113, 32, homes=dict.fromkeys(range(10), 0))
    assert drawn.high - drawn.low > even.high - even.low
    assert drawn.low <= all_one.rate < drawn.rate < even.rate <= drawn.high


def rates(requests: list[Request], blocks: int) -> dict[str, float]:
    """Hit rates by strategy on two workers, and of all on one."""
    prompts = sum(len(request.prompt_ids) for request in requests)
    one = sum(replay(requests, [0] * len(requests), blocks, 32)) / prompts
    rules = {name: STRATEGIES[name] for name in ("round_robin", "session_hash", "kv_aware")}
    rules["cache_aware"] = ONE_AT_A_TIME["cache_aware"]
    return {"one": one} | {name: forecast(rule, requests, 2, blocks, 32).rate for name, rule in rules.items()}


def test_affinity_pays_where_one_cache_is_too_small() -> None:
    """Two workers of 112 blocks hold the conversations that one does not, if each conversation stays."""
    found = rates(dialogue(shared=False), 113)
    assert min(found["session_hash"], found["kv_aware"]) > 0.1 + max(found["one"], found["round_robin"])
    assert found["cache_aware"] == found["one"]


def test_affinity_makes_one_cache_of_enough_room_needless() -> None:
    """With room for all, a conversation that stays finds what one server would find; in turns it does not."""
    found = rates(dialogue(shared=False), 1457)
    assert [found["session_hash"], found["kv_aware"]] == pytest.approx([found["one"]] * 2)
    assert found["round_robin"] < found["one"] - 0.1


def test_a_shared_system_prompt_draws_all_to_one_worker() -> None:
    """What is cached first has the largest match for everyone, so kv_aware leaves the other worker idle."""
    found = rates(dialogue(shared=True), 113)
    assert found["kv_aware"] == pytest.approx(found["one"])
    assert found["session_hash"] > found["kv_aware"]


def test_nothing_is_not_forecast() -> None:
    with pytest.raises(ValueError, match="nothing to forecast"):
        forecast(STRATEGIES["random"], [], 2, 20, 4)

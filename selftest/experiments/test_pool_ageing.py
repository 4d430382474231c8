"""Blocks under traffic: workloads that fit into a pool, and the rule by which ageing ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import pool_ageing
from disagglab.experiments.pool_ageing import Ageing
from disagglab.results.records import Snapshot

EMBEDDED = load_lab("embedded")
LAB = EMBEDDED.model_copy(
    update={
        "model": EMBEDDED.model.model_copy(update={"max_model_len": 1024}),
        "scale": EMBEDDED.scale.model_copy(update={"output": 0.25}),
    }
)


def topology(*pools: tuple[int, int]) -> Any:
    """Servers with pools of (blocks, tokens a block)."""

    def server(count: int, size: int) -> SimpleNamespace:
        labels = frozenset({("num_gpu_blocks", str(count)), ("block_size", str(size))})
        return SimpleNamespace(
            metrics=lambda: Snapshot("a", "http://x/metrics", (("vllm:cache_config_info", labels, 1.0),))
        )

    return SimpleNamespace(servers=[server(*pool) for pool in pools])


def test_the_smallest_pool_counts() -> None:
    assert pool_ageing.tokens_of(topology((100, 16), (10, 128))) == 1280
    silent = SimpleNamespace(servers=[SimpleNamespace(metrics=lambda: Snapshot("a", "http://x/metrics", ()))])
    with pytest.raises(InvalidRun, match="cache_config"):
        pool_ageing.tokens_of(silent)  # type: ignore[arg-type]


def test_two_lengths_alone_and_at_once() -> None:
    found = pool_ageing.workloads(LAB, 100_000, short=False)
    shapes = [(one.name, one.prompt_tokens, one.output_tokens, one.requests) for one in found]
    assert shapes == [
        ("alone-short", 128, 16, 8),
        ("16-at-once-short", 128, 16, 48),
        ("alone-long", 496, 4, 4),
        ("16-at-once-long", 496, 4, 32),
    ]
    assert [one.most_under_way for one in found] == [1, 16, 1, 16]


def test_short_form_has_fewer_requests() -> None:
    found = pool_ageing.workloads(LAB, 100_000, short=True)
    assert [one.requests for one in found] == [2, 12, 2, 8]
    assert [one.most_under_way for one in found] == [1, 4, 1, 4]


def test_what_is_under_way_fits_into_the_pool() -> None:
    for tokens in (700, 2_000, 9_000):
        for one in pool_ageing.workloads(LAB, tokens, short=False):
            assert one.most_under_way == 1 or one.most_under_way * one.tokens <= 0.8 * tokens


def test_ageing_traffic_is_short_prompts_with_long_answers_and_fits() -> None:
    measured = pool_ageing.workloads(LAB, 9_000, short=False)
    found = pool_ageing.traffic(measured, 9_000)
    shapes = [(one.name, one.prompt_tokens, one.output_tokens, one.requests) for one in found]
    assert shapes == [
        ("ageing-8", 8, 64, 128),
        ("ageing-16", 16, 64, 128),
        ("ageing-32", 32, 64, 128),
    ]
    assert [one.most_under_way for one in found] == [64, 64, 64]
    small = pool_ageing.traffic(pool_ageing.workloads(LAB, 2_000, short=False), 2_000)
    assert [one.most_under_way * one.tokens <= 0.8 * 2_000 for one in small] == [True] * 3
    assert not {one.name for one in found} & {one.name for one in measured}


def test_a_probe_has_neighbours_to_lose() -> None:
    measured = pool_ageing.workloads(LAB, 100_000, short=False)
    by_block = {block: pool_ageing.probe(measured, block) for block in (32, 128)}
    assert {block: one.prompt_tokens for block, one in by_block.items()} == {32: 128, 128: 496}
    assert all((one.requests, one.concurrency, one.name) == (2, 1, "probe") for one in by_block.values())


@pytest.mark.parametrize(
    ("probes", "passes", "settled", "said"),
    [
        ([], 0.0, False, "not settled after 0 runs: still changing, 0.0 passes"),
        ([0.9], 3.0, False, "not settled after 1 runs: still changing, 3.0 passes"),
        ([0.9, 0.95], 2.0, True, "settled after 2 runs, 2.0 passes"),
        ([0.9, 0.95], 1.9, False, "not settled after 2 runs: 1.9 passes of 2"),
        ([0.95, 0.9, 0.8], 9.0, False, "not settled after 3 runs: still changing, 9.0 passes"),
        ([0.2, 0.1, 0.6, 1.0, 1.0], 2.5, True, "settled after 5 runs, 2.5 passes"),
    ],
)
def test_a_pool_settles_when_two_probes_agree_after_enough_passes(
    probes: list[float], passes: float, settled: bool, said: str
) -> None:
    """The probe of the fresh pool does not count: it equals the first one where a run changed little."""
    ageing = Ageing(fresh=0.9, probes=probes, passes=passes)
    assert ageing.settled is settled
    assert str(ageing) == said
    assert ageing.over(12) is settled
    assert ageing.over(len(probes))


def test_the_rule_refuses_the_trend_that_one_run_left() -> None:
    """Descriptors per MiB 3.0, 2.0, 9.1, 16.0, as rounds once were: no two neighbours agree."""
    probes = [value / 16 for value in (3.0, 2.0, 9.1, 16.0)]
    for count in range(1, 5):
        assert not Ageing(0.0, probes[:count], passes=2.1 * count).settled
    assert Ageing(0.0, [*probes, 15.5 / 16], passes=10.0).settled


def test_ageing_sends_lengths_in_turn_until_the_probes_agree() -> None:
    each = pool_ageing.traffic(pool_ageing.workloads(LAB, 9_000, short=True), 9_000)
    shares, sent = iter([0.1, 0.1, 0.1, 0.5, 0.9, 0.91, 0.7]), []
    found = pool_ageing.age(each, 4_000, 12, lambda one: sent.append(one.name), lambda: next(shares))
    assert sent == ["ageing-8", "ageing-16", "ageing-32", "ageing-8", "ageing-16"]
    assert (found.fresh, found.probes) == (0.1, [0.1, 0.1, 0.5, 0.9, 0.91])
    assert found.passes == pytest.approx(32 * (2 * 72 + 2 * 80 + 96) / 4_000)
    assert found.settled


def test_ageing_that_never_settles_ends() -> None:
    each = pool_ageing.traffic(pool_ageing.workloads(LAB, 9_000, short=True), 9_000)
    shares = iter([0.0, *(number / 10 for number in range(1, 10))])
    found = pool_ageing.age(each, 1_000, 3, lambda one: None, lambda: next(shares))
    assert len(found.probes) == 3
    assert str(found).startswith("not settled after 3 runs: still changing")


class Queues:
    """Free lists of prefill and decode as vLLM keeps them: taken from the front, given back last block first.

    A prompt's blocks are taken on both sides and given back by prefill at once; the decode side takes one
    more whenever a request's tokens fill a block. One request is admitted a step, each step is one token.
    """

    def __init__(self, count: int, block: int) -> None:
        self.block = block
        self.free = {side: deque(range(count)) for side in ("prefill", "decode")}

    def take(self, side: str, count: int) -> list[int]:
        """The next blocks of a side."""
        return [self.free[side].popleft() for _ in range(count)]

    def give(self, side: str, held: list[int]) -> None:
        """Blocks of a request that is over."""
        self.free[side].extend(reversed(held))

    def run(self, workload: Workload) -> float:
        """Pieces of a prompt, of the worst possible: neighbours on both sides, ascending, are merged."""
        count = -(-workload.prompt_tokens // self.block)
        under_way: list[tuple[list[int], int]] = []
        pieces = sent = 0
        while sent < workload.requests or under_way:
            if sent < workload.requests and len(under_way) < workload.most_under_way:
                there, here = self.take("prefill", count), self.take("decode", count)
                steps = [(b - a, d - c) for a, b, c, d in zip(there, there[1:], here, here[1:], strict=False)]
                pieces += 1 + sum(step != (1, 1) for step in steps)
                self.give("prefill", there)
                under_way.append((here, workload.prompt_tokens))
                sent += 1
            for held, tokens in under_way:
                if tokens >= len(held) * self.block:
                    held += self.take("decode", 1)
            over = [held for held, tokens in under_way if tokens + 1 >= workload.tokens]
            under_way = [(held, tokens + 1) for held, tokens in under_way if tokens + 1 < workload.tokens]
            for held in over:
                self.give("decode", held)
        return pieces / workload.requests / count


def rounds_after_ageing(count: int, each: Callable[[list[Workload]], list[Workload]]) -> list[float]:
    """Pieces of what is measured, of the worst possible, run by run of four rounds on an aged model pool."""
    model = LAB.model.model_copy(update={"max_model_len": 16_384})
    full = LAB.model_copy(update={"model": model, "scale": LAB.scale.model_copy(update={"output": 1.0})})
    measured = pool_ageing.workloads(full, 16 * count, short=False)
    queues, lone = Queues(count, 16), pool_ageing.probe(measured, 16)
    found = pool_ageing.age(each(measured), 16 * count, 12, queues.run, lambda: queues.run(lone))
    assert found.fresh < 0.05
    assert found.settled
    return [queues.run(one) for _ in range(4) for one in measured]


@pytest.mark.parametrize("count", [3_000, 10_000, 20_000])
def test_long_answers_scatter_a_pool_for_good(count: int) -> None:
    """In a model of the free lists, every run after ageing is near the worst."""
    after = rounds_after_ageing(count, lambda measured: pool_ageing.traffic(measured, 16 * count))
    assert min(after) > 0.75


def test_long_prompts_do_not() -> None:
    """Aged by the short workload itself, the model swings between few pieces and the worst."""
    after = rounds_after_ageing(10_000, lambda measured: [measured[1]])
    assert min(after) < 0.25
    assert max(after) > 0.9

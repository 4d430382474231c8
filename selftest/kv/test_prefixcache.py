"""The model of vLLM's prefix cache: against what vLLM's own KVCacheManager found, and by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from disagglab.errors import InvalidRun
from disagglab.kv.prefixcache import PrefixCache, Request, chain

# Hit blocks (base 36) of `traffic(seed)` by vLLM 0.31.0's KVCacheManager, one full attention group, 24 blocks
# of 4 tokens: get_computed_blocks, allocate_slots for the prompt, then for each sampled token but the last,
# free. In 105 and 116 the same tokens lie in several blocks, and it counts which of them is found.
VLLM = {
    1: "02030713733447c0a37708ad37907772901047717a031073e03381010457",
    2: "020493035022444202500403003520000614910340054059940830020037",
    105: "003643474705757a1414541454a7454714451b418445947042bbc40c4671",
    116: "010202324336960220326230330182020083303a70762002102065230203",
}


def match(cache: PrefixCache, prompt_ids: Sequence[int]) -> int:
    """Tokens of a prompt that a request would find now."""
    return cache.find(chain(prompt_ids, (), cache.block_size))


def traffic(seed: int, count: int = 60) -> list[tuple[list[int], list[int]]]:
    """Conversations of short prompts over an alphabet of two, so that prefixes are often shared."""
    rng = random.Random(seed)
    kept: list[list[int]] = [[]]
    found = []
    for _ in range(count):
        prompt = list(rng.choice(kept)) + [int(rng.random() * 2) for _ in range(1 + int(rng.random() * 12))]
        prompt = prompt[:60]
        output = [int(rng.random() * 2) for _ in range(1 + int(rng.random() * 9))]
        kept.append(prompt + output)
        found.append((prompt, output))
    return found


@pytest.mark.parametrize("seed", sorted(VLLM))
def test_hits_equal_those_of_vllm(seed: int) -> None:
    """Every request of random traffic finds as many tokens as in vLLM's own block manager."""
    cache = PrefixCache(24, 4)
    assert [cache.request(*one) // 4 for one in traffic(seed)] == [int(digit, 36) for digit in VLLM[seed]]


def test_the_last_prompt_token_is_never_found() -> None:
    """A prompt of whole blocks, sent again, lacks its last block; one token more, and it is found."""
    cache = PrefixCache(9, 4)
    assert cache.request(range(8), [0]) == 0
    assert match(cache, range(8)) == 4
    assert match(cache, range(9)) == 8
    assert cache.request(range(8), [0]) == 4


def test_the_last_sampled_token_is_not_in_the_cache() -> None:
    """Of 5 prompt tokens and 4 sampled ones 8 are computed; with 3 the second block is not full."""
    for output, found in ((4, 8), (3, 4)):
        cache = PrefixCache(9, 4)
        cache.request(range(5), range(5, 5 + output))
        assert match(cache, range(20)) == found


def test_one_block_of_a_pool_is_never_used() -> None:
    """A request of 8 tokens needs two blocks of 4: three in the pool do, two do not."""
    assert PrefixCache(3, 4).request(range(8), [0]) == 0
    with pytest.raises(InvalidRun, match="needs 2 KV blocks, the server has 1"):
        PrefixCache(2, 4).request(range(8), [0])


def test_a_refused_request_changes_nothing() -> None:
    cache = PrefixCache(4, 4)
    cache.request(range(8), [0])
    with pytest.raises(InvalidRun):
        cache.request(range(16), [0])
    assert match(cache, range(9)) == 8


def test_the_end_of_the_oldest_request_is_lost_first() -> None:
    """Four blocks, two requests of two: a third of one block takes the last block of the first."""
    cache = PrefixCache(5, 4)
    old, new = list(range(8)), list(range(100, 108))
    cache.request(old, [0])
    cache.request(new, [0])
    cache.request(range(200, 204), [0])
    assert (match(cache, [*old, 0]), match(cache, [*new, 0])) == (4, 8)


def test_what_is_found_again_is_kept_longest() -> None:
    """The first of two requests comes again; then room is made at the cost of the second."""
    cache = PrefixCache(5, 4)
    old, new = list(range(8)), list(range(100, 108))
    cache.request(old, [0])
    cache.request(new, [0])
    match(cache, [*new, 0])
    cache.request([*old], [0])
    cache.request(range(200, 204), [0])
    assert match(cache, [*new, 0]) <= 4
    assert match(cache, [*old, 0]) == 8


def test_a_block_that_is_not_full_is_used_first() -> None:
    """Its place goes to the next request, although blocks that were never used are free."""
    cache = PrefixCache(4, 4)
    cache.request(range(4), [0])
    for first in (10, 20, 30):
        cache.request([first, first], [0])
    assert match(cache, range(5)) == 4


def test_equal_tokens_after_another_beginning_are_not_found() -> None:
    cache = PrefixCache(9, 4)
    cache.request([1, 1, 1, 1, 5, 5, 5, 5], [0])
    assert match(cache, [2, 2, 2, 2, 5, 5, 5, 5, 0]) == 0
    assert match(cache, [5, 5, 5, 5, 0]) == 0


def test_a_look_changes_nothing() -> None:
    """Asked before every request or never, a pool finds the same."""
    asked, not_asked = PrefixCache(24, 4), PrefixCache(24, 4)
    for prompt, output in traffic(9):
        before = match(asked, prompt)
        assert before == asked.request(prompt, output) == not_asked.request(prompt, output)


def test_a_chain_counts_what_is_looked_up_full_and_held() -> None:
    made = chain(range(8), range(6), 4)
    assert (made.lookup, len(made.keys), made.held) == (1, 3, 4)
    request = Request(0, 0, tuple(range(8)), tuple(range(6)))
    assert request.chain(4) == made
    assert request.chain(4) is request.chain(4)
    assert request.chain(2).lookup == 3

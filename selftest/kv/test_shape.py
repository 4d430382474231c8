"""KV cache arithmetic on layers given by hand.

Oracle: products written out from what each layer is said to keep, and laws that hold for every shape. The
sizes of the dtypes are listed here once more, so that a wrong one in the code does not agree with itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disagglab.errors import ConfigError
from disagglab.kv.shape import DTYPES, KvShape, Layer, blocks, tokens_from_prefill, transfer_time_s

LLAMA = KvShape((Layer(8, 128, 128),) * 32, "bfloat16")
LATENT = Layer(kv_heads=1, key_dim=512 + 64, value_dim=0)
DEEPSEEK = KvShape((LATENT,) * 61, "bfloat16")

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
PER_TOKEN_HEAD = ("fp8_per_token_head", "int8_per_token_head")
BLOCK_SIZES = st.sampled_from([1, 16, 32, 128])
HEADED = st.builds(
    lambda heads, dim, window: Layer(heads, dim, dim, window),
    st.integers(1, 128),
    st.sampled_from([8, 64, 96, 128, 256]),
    st.sampled_from([None, 1, 512, 4096]),
)
LATENTS = st.builds(lambda dim: Layer(1, dim, 0), st.sampled_from([288, 576]))
HEADED_LAYERS = st.lists(HEADED, min_size=1, max_size=6).map(tuple)
LAYERS = st.lists(HEADED | LATENTS, min_size=1, max_size=6).map(tuple)
SHAPES = st.builds(KvShape, LAYERS, st.sampled_from(sorted(NUMBER_BYTES)))


@pytest.mark.parametrize(
    ("shape", "per_token"),
    [
        (LLAMA, 32 * 8 * (128 + 128) * 2),
        (replace(LLAMA, dtype="fp8"), 32 * 8 * (128 + 128)),
        (replace(LLAMA, dtype="float32"), 32 * 8 * (128 + 128) * 4),
        (replace(LLAMA, dtype="fp8_per_token_head"), 32 * 8 * (128 + 4 + 128 + 4)),
        (replace(LLAMA, dtype="int8_per_token_head"), 32 * 8 * (128 + 4 + 128 + 4)),
        (DEEPSEEK, 61 * 576 * 2),
        (KvShape((LATENT,), "fp8_per_token_head"), 576 + 4),
        (KvShape((Layer(3, 64, 64),) * 30, "bfloat16"), 23_040),
        (KvShape((Layer(8, 256, 256, 1024), Layer(2, 512, 512)), "float16"), 8 * 512 * 2 + 2 * 1024 * 2),
        (KvShape((Layer(4, 192, 128),), "bfloat16"), 4 * (192 + 128) * 2),
        (KvShape((), "bfloat16"), 0),
    ],
)
def test_known_shapes(shape: KvShape, per_token: int) -> None:
    """Keys and values of every layer are counted once, in the bytes of the dtype; a latent has one side."""
    assert shape.bytes_per_token == per_token
    assert shape.bytes_per_block(16) == 16 * per_token


def test_every_dtype_has_its_size_here() -> None:
    """A dtype that is added to the code needs a line in this file."""
    assert set(DTYPES) == {*NUMBER_BYTES, *PER_TOKEN_HEAD}


@given(LAYERS, st.sampled_from(sorted(NUMBER_BYTES)))
def test_bytes_per_token_are_the_sum_over_layers(layers: tuple[Layer, ...], dtype: str) -> None:
    """Every layer adds heads x (key + value numbers) x bytes per number, whatever its window."""
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    shape = KvShape(layers, dtype)
    assert shape.bytes_per_token == numbers * NUMBER_BYTES[dtype]
    assert shape.bytes_per_token == sum(KvShape((layer,), dtype).bytes_per_token for layer in layers)


@given(LAYERS)
def test_eight_bits_are_half_of_sixteen(layers: tuple[Layer, ...]) -> None:
    """fp8 keeps half the bytes of bfloat16, which keeps half of float32."""
    by_dtype = {dtype: KvShape(layers, dtype).bytes_per_token for dtype in NUMBER_BYTES}
    assert 2 * by_dtype["fp8"] == by_dtype["bfloat16"] == by_dtype["float16"]
    assert 2 * by_dtype["bfloat16"] == by_dtype["float32"]
    assert by_dtype["fp8"] == by_dtype["fp8_e4m3"] == by_dtype["fp8_e5m2"]


@given(HEADED_LAYERS, st.sampled_from(PER_TOKEN_HEAD))
def test_scales_of_each_head_are_added(layers: tuple[Layer, ...], dtype: str) -> None:
    """Per-token-head dtypes add one float32 for the key and one for the value of every head and layer."""
    scales = 4 * 2 * sum(layer.kv_heads for layer in layers)
    assert KvShape(layers, dtype).bytes_per_token == KvShape(layers, "fp8").bytes_per_token + scales


@given(SHAPES, st.integers(1, 10**4), st.integers(1, 10**4), BLOCK_SIZES)
def test_whole_blocks_are_linear(shape: KvShape, a: int, b: int, block: int) -> None:
    """k blocks take k times one block, and the bytes of a + b blocks are those of a and of b."""

    def taken(count: int) -> int:
        return shape.bytes_per_prompt(count * block, block)

    assert taken(a) == a * taken(1) == a * block * shape.bytes_per_token
    assert taken(a + b) == taken(a) + taken(b)


@given(SHAPES, st.integers(1, 10**6), BLOCK_SIZES)
def test_a_prompt_takes_whole_blocks(shape: KvShape, tokens: int, block: int) -> None:
    """The bytes of a prompt cover its tokens, with less than one block to spare."""
    taken = shape.bytes_per_prompt(tokens, block)
    assert taken % shape.bytes_per_block(block) == 0
    assert 0 <= taken - tokens * shape.bytes_per_token < shape.bytes_per_block(block)


@given(st.integers(1, 10**6), BLOCK_SIZES)
def test_blocks_are_the_smallest_cover(tokens: int, block: int) -> None:
    """The blocks hold the tokens, and one block less would not."""
    count = blocks(tokens, block)
    assert count * block >= tokens > (count - 1) * block


@given(HEADED_LAYERS, st.integers(1, 16), st.integers(1, 8))
def test_ranks_share_the_heads(layers: tuple[Layer, ...], ranks: int, factor: int) -> None:
    """Where the ranks divide the KV heads, they keep together what one server would."""
    whole = KvShape(tuple(replace(layer, kv_heads=factor * ranks) for layer in layers), "bfloat16")
    on_rank = whole.on_rank(ranks)
    assert ranks * on_rank.bytes_per_token == whole.bytes_per_token
    assert all(layer.kv_heads == factor for layer in on_rank.layers)
    assert [layer.window for layer in on_rank.layers] == [layer.window for layer in layers]


@given(HEADED, st.integers(1, 8))
def test_more_ranks_than_heads_hold_copies(layer: Layer, copies: int) -> None:
    """With a multiple of the KV heads every rank keeps one head, however many ranks there are."""
    one_head = 2 * layer.key_dim * 2  # key and value, two bytes each
    assert KvShape((layer,), "bfloat16").on_rank(copies * layer.kv_heads).bytes_per_token == one_head


@given(st.integers(1, 64))
def test_a_latent_is_whole_on_every_rank(ranks: int) -> None:
    """MLA has nothing to divide: every rank keeps all of it."""
    assert DEEPSEEK.on_rank(ranks) == DEEPSEEK


@given(HEADED, st.integers(2, 200))
def test_heads_that_ranks_cannot_share_are_refused(layer: Layer, ranks: int) -> None:
    """Neither a divisor nor a multiple of the KV heads: refused with both numbers."""
    assume(layer.kv_heads % ranks and ranks % layer.kv_heads)
    with pytest.raises(ConfigError, match=f"{ranks}: does not divide {layer.kv_heads} KV heads") as caught:
        KvShape((layer,), "bfloat16").on_rank(ranks)
    assert caught.value.problems[0].file == "tensor parallel size"


def test_one_layer_that_cannot_be_shared_is_enough() -> None:
    """Four ranks share 8 heads, but not the 6 of another layer; no ranks share nothing."""
    with pytest.raises(ConfigError, match="does not divide 6 KV heads"):
        KvShape((Layer(8, 64, 64), Layer(6, 64, 64)), "bfloat16").on_rank(4)
    with pytest.raises(ConfigError, match="tensor parallel size"):
        LLAMA.on_rank(0)


def test_one_token_prompts_are_computed_by_decode() -> None:
    """vLLM recomputes the last prompt token, so of one token none counts as taken from prefill."""
    assert (tokens_from_prefill(1), tokens_from_prefill(2), tokens_from_prefill(300)) == (0, 2, 300)


def test_transfer_time_is_latency_and_bytes_over_rate() -> None:
    """One second of a 100 Gbit/s link is 12.5 GB; the latency comes on top."""
    assert transfer_time_s(12_500_000_000, 12.5e9) == 1.0
    assert transfer_time_s(6_250_000_000, 12.5e9, 0.25) == 0.75

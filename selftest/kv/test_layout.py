"""Blocks, groups and bytes moved, for layers given by hand and for every shipped model.

Oracle: group sizes worked out by hand from vLLM's rule (as many layers a group as the rarest kind has, or as
the commonest where that is less than half more), and laws that any layout has to obey.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagglab.errors import ConfigError
from disagglab.kv import attention, modelconfig
from disagglab.kv.layout import KvLayout, layout
from disagglab.kv.shape import KvShape, Layer

VERSION = "0.31.0"
SLIDES, FULL = Layer(1, 256, 256, window=512), Layer(1, 256, 256)
GEMMA = KvShape(tuple(FULL if number % 6 == 0 else SLIDES for number in range(1, 27)), "bfloat16")
GEMMA_PAGE = 128 * 2 * 256 * 2  # one layer of one block of 128 tokens
GEMMA_4 = KvShape((Layer(8, 256, 256, 1024),) * 25 + (Layer(2, 512, 512),) * 5, "bfloat16")
GEMMA_4_POOL = 5 * 16 * 8 * 2 * 256 * 2

BLOCK_SIZES = st.sampled_from([1, 16, 32, 128])
TOKENS = st.integers(1, 50_000)


def of_kinds(full: int, sliding: int, window: int, heads: int = 2) -> KvShape:
    """So many full and so many sliding layers, one size of page."""
    layer = Layer(heads, 64, 64)
    return KvShape((layer,) * full + (replace(layer, window=window),) * sliding, "bfloat16")


HYBRIDS = st.builds(of_kinds, st.integers(1, 12), st.integers(1, 40), st.integers(1, 5000), st.integers(1, 8))
MIXED_FULL = st.builds(
    lambda heads, dtype: KvShape(tuple(Layer(count, 64, 64) for count in heads), dtype),
    st.lists(st.integers(1, 16), min_size=1, max_size=8),
    st.sampled_from(["bfloat16", "fp8"]),
)
ANY = HYBRIDS | MIXED_FULL | st.sampled_from([GEMMA, GEMMA_4])


def sizes(made: KvLayout, sliding: bool) -> list[int]:
    """Layers in each group of one kind."""
    return sorted((len(g.layers) for g in made.groups if (g.window is not None) is sliding), reverse=True)


def test_gemma_3_1b() -> None:
    """22 sliding and 4 full layers make 7 groups of up to 4, whose blocks are 524,288 B."""
    made = layout(GEMMA, 128)
    assert (sizes(made, sliding=True), sizes(made, sliding=False)) == ([4, 4, 4, 4, 3, 3], [4])
    assert made.bytes_per_block == 4 * GEMMA_PAGE == 524_288
    # 16 blocks of the full group, 4 of each sliding one: token 2048, the next, looks back to 1537. Groups of
    # three read a fourth page, because others use that region.
    assert made.bytes_to_move(2048, VERSION) == (16 + 6 * 4) * 4 * GEMMA_PAGE == 20_971_520
    assert made.bytes_to_move(2048, VERSION, held_tokens=8 * 128) == (8 + 6 * 4) * 4 * GEMMA_PAGE
    assert made.bytes_to_move(2048, VERSION, held_tokens=14 * 128) == (2 + 6 * 2) * 4 * GEMMA_PAGE


@pytest.mark.parametrize(
    ("full", "sliding", "of_full", "of_sliding", "pages"),
    [
        (10, 20, [10], [10, 10], 30),
        (12, 13, [12], [13], 25),
        (13, 12, [13], [12], 25),
        (4, 5, [4], [5], 9),
        (4, 6, [4], [3, 3], 10),
        (6, 4, [3, 3], [4], 10),
        (1, 3, [1], [1, 1, 1], 4),
        (10, 52, [10], [9, 9, 9, 9, 8, 8], 10 + 6 * 9),
        (3, 8, [3], [3, 3, 2], 12),
    ],
)
def test_group_sizes(full: int, sliding: int, of_full: list[int], of_sliding: list[int], pages: int) -> None:
    """The rarest kind sets the size of a group, or the commonest if it has less than half more layers.

    A block is read in every region that several groups use, and in those that its own group alone uses:
    ``pages`` counts them for one block of each group.
    """
    made = layout(of_kinds(full, sliding, window=1000), 16)
    page = 16 * 2 * 128 * 2
    assert (sizes(made, sliding=False), sizes(made, sliding=True)) == (of_full, of_sliding)
    assert made.bytes_per_block == max(of_full + of_sliding) * page
    assert made.bytes_to_move(3 * 16, VERSION) == 3 * pages * page


def test_smaller_layers_have_longer_blocks() -> None:
    """Gemma 4: a full layer keeps half of a sliding one, so its block holds 32 tokens beside 16."""
    made = layout(GEMMA_4, 16)
    assert sorted((group.window or 0, group.block_size, len(group.layers)) for group in made.groups) == [
        (0, 32, 5),
        *[(1024, 16, 5)] * 5,
    ]
    assert made.bytes_per_block == GEMMA_4_POOL == 655_360
    assert made.bytes_to_move(64, VERSION) == (2 + 5 * 4) * GEMMA_4_POOL
    assert made.bytes_to_move(65, VERSION) == (3 + 5 * 5) * GEMMA_4_POOL
    # of 64 tokens decode holds 32, or all: half of the blocks of either length move, or none
    assert made.bytes_to_move(64, VERSION, held_tokens=32) == (1 + 5 * 2) * GEMMA_4_POOL
    assert made.bytes_to_move(64, VERSION, held_tokens=64) == 0


def test_layers_that_do_not_divide_the_largest_are_padded() -> None:
    """Two thirds of a page take a whole one, and keep the length of their block."""
    made = layout(KvShape((Layer(2, 64, 64, window=64), Layer(3, 64, 64)), "bfloat16"), 16)
    page = 16 * 3 * 128 * 2
    assert [(group.page_bytes, group.block_size) for group in made.groups] == [((page,), 16)] * 2


def test_without_the_hybrid_manager_there_is_one_group() -> None:
    """Sliding layers beside full ones keep all tokens; those of a model that only slides stay as they are."""
    made = layout(GEMMA, 128, hybrid=False)
    assert [(len(group.layers), group.window) for group in made.groups] == [(26, None)]
    assert made.bytes_per_block == 26 * GEMMA_PAGE
    assert made.bytes_to_move(2048, VERSION) == 16 * 26 * GEMMA_PAGE
    sliding = KvShape((SLIDES,) * 3, "bfloat16")
    assert layout(sliding, 128, hybrid=False) == layout(sliding, 128)


@given(st.integers(2, 300), st.sampled_from([1, 16, 128]), st.integers(1, 600), st.integers(0, 40))
def test_a_window_moves_the_blocks_that_it_touches(window: int, block: int, tokens: int, held: int) -> None:
    """Of the positions that the next token sees, the blocks that decode does not hold, each counted once."""
    held = min(held, -(-tokens // block))
    seen = {position // block for position in range(max(0, tokens + 1 - window), tokens)}
    made = layout(KvShape((Layer(8, 128, 128, window),) * 3, "bfloat16"), block)
    assert len(made.groups) == 1
    moved = made.bytes_to_move(tokens, VERSION, held * block)
    assert moved == len(seen - set(range(held))) * block * 3 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("version", ["9.9.9", "0.29.1", "0.3", "0.310.0", "1.31"])
def test_an_unknown_block_rule_names_the_version(version: str) -> None:
    """A vLLM version whose block rule nobody has measured is refused by its number."""
    with pytest.raises(ConfigError, match=rf"no block rule known for vLLM {version}") as caught:
        layout(GEMMA, 16).bytes_to_move(1, version)
    assert caught.value.problems[0].key == "BLOCK_RULE"


@pytest.mark.parametrize("version", ["0.31.0", "0.31.2+cpu", "0.26.1", "0.31"])
def test_measured_versions_are_known(version: str) -> None:
    """Patch releases and local builds of a measured version follow its rule."""
    assert layout(GEMMA, 128).bytes_to_move(1, version) == 7 * 4 * GEMMA_PAGE


@pytest.mark.parametrize("model", modelconfig.shipped())
def test_every_layer_of_shipped_models_is_in_one_group(model: str) -> None:
    """No layer is lost or kept twice, and a group is of one kind, with and without the hybrid manager."""
    shape = attention.shape(modelconfig.shipped_config(model))
    made = layout(shape, 16)
    assert Counter(layer for group in made.groups for layer in group.layers) == Counter(shape.layers)
    for group in (*made.groups, *layout(shape, 16, hybrid=False).groups):
        assert {layer.window for layer in group.layers} == {group.window}
        assert len(group.page_bytes) == len(group.layers)


@given(ANY, BLOCK_SIZES)
def test_every_layer_fits_into_its_page(shape: KvShape, block: int) -> None:
    """Every layer is in one group, and the tokens of that group's block fit into the layer's page."""
    made = layout(shape, block)
    assert Counter(layer for group in made.groups for layer in group.layers) == Counter(shape.layers)
    for group in made.groups:
        for layer, page in zip(group.layers, group.page_bytes, strict=True):
            assert group.block_size * 2 * layer.kv_heads * layer.key_dim <= page
        assert group.bytes_per_block <= made.bytes_per_block


@given(ANY, BLOCK_SIZES, st.integers(0, 10**12))
def test_a_budget_holds_the_most_blocks_that_fit(shape: KvShape, block: int, budget: int) -> None:
    """The blocks fit into the budget, and one more would not."""
    made = layout(shape, block)
    held = made.blocks_in(budget)
    assert held * made.bytes_per_block <= budget < (held + 1) * made.bytes_per_block


@given(MIXED_FULL, BLOCK_SIZES, TOKENS, st.data())
def test_models_of_one_kind_move_whole_blocks(
    shape: KvShape, block: int, tokens: int, data: st.DataObject
) -> None:
    """Exactly the blocks that the prompt takes, less those that decode holds, whatever the layers' heads."""
    whole = -(-tokens // block)
    held = data.draw(st.integers(0, whole))
    made = layout(shape, block)
    per_block = block * shape.bytes_per_token
    assert (len(made.groups), made.bytes_per_block) == (1, per_block)
    assert made.bytes_to_move(tokens, VERSION) == whole * per_block
    assert made.bytes_to_move(tokens, VERSION, held * block) == (whole - held) * per_block


@given(HYBRIDS, BLOCK_SIZES, TOKENS)
def test_hybrids_move_no_more_than_full_attention_and_padding(
    shape: KvShape, block: int, tokens: int
) -> None:
    """At most all blocks of all layers and of the padding, at least all blocks of the full layers.

    A group reads each of its blocks in at most as many pages as the widest group has. What this adds to the
    pages of the layers is padding, fewer pages than that width for each of the two kinds.
    """
    made = layout(shape, block)
    whole = -(-tokens // block)
    page = block * shape.bytes_per_token // len(shape.layers)
    width = max(len(group.layers) for group in made.groups)
    padding = len(made.groups) * width - len(shape.layers)
    full = sum(layer.window is None for layer in shape.layers)
    moved = made.bytes_to_move(tokens, VERSION)
    assert 0 <= padding < 2 * width
    assert whole * full * page <= moved <= whole * (len(shape.layers) + padding) * page


@given(ANY, BLOCK_SIZES, TOKENS, st.integers(1, 300))
def test_whole_blocks_more_never_move_less(shape: KvShape, block: int, tokens: int, more: int) -> None:
    """Bytes are monotone in whole blocks (twice the size here, because Gemma 4 has blocks of two lengths).

    In single tokens they are not: a window that leaves its oldest block behind reads one block less.
    """
    made = layout(shape, block)
    longer = tokens + more * 2 * block
    assert made.bytes_to_move(tokens, VERSION) <= made.bytes_to_move(longer, VERSION)


@given(HYBRIDS, BLOCK_SIZES, st.integers(1, 100))
def test_beyond_the_window_only_full_layers_grow(shape: KvShape, block: int, more: int) -> None:
    """Past window and two blocks, each further block adds what the groups of full layers read of one."""
    made = layout(shape, block)
    start = max(layer.window or 0 for layer in shape.layers) + 2 * block
    full_only = layout(KvShape(tuple(x for x in shape.layers if x.window is None), "bfloat16"), block)
    grown = made.bytes_to_move(start + more * block, VERSION) - made.bytes_to_move(start, VERSION)
    groups = sum(group.window is None for group in made.groups)
    assert more * full_only.bytes_per_block <= grown <= more * groups * made.bytes_per_block
    assert grown % more == 0


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 60), st.data())
def test_held_blocks_within_the_window_are_not_moved(
    full: int, sliding: int, whole: int, data: st.DataObject
) -> None:
    """Each block that decode holds saves what a prompt of one block moves; all of them leave nothing."""
    made = layout(of_kinds(full, sliding, window=60 * 16), 16)
    held = data.draw(st.integers(0, whole))
    one = made.bytes_to_move(16, VERSION)
    assert made.bytes_to_move(whole * 16, VERSION, held * 16) == (whole - held) * one
    assert made.bytes_to_move(whole * 16, VERSION, whole * 16) == 0


def test_more_held_than_the_prompt_has_moves_nothing() -> None:
    """Never a negative number of blocks."""
    assert layout(KvShape((FULL,) * 2, "bfloat16"), 16).bytes_to_move(16, VERSION, held_tokens=64) == 0

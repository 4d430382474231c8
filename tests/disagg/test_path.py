"""Prefill on one node, decode on another: proof that the KV cache really took that path.

The oracle is the connector's own byte counter on the decode server against arithmetic, exactly: an equality
that stays true only if every block of every prompt moved, once. The last test shows that the check can fail.
"""

from __future__ import annotations

import dataclasses

import pytest

from disagglab.config.schema import Lab
from disagglab.errors import TransferError
from disagglab.kv.shape import KvShape, blocks, reusable_tokens
from disagglab.measure import ledger
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.serving import openai
from disagglab.serving.topology import Topology

OUTPUT_TOKENS = 4


@pytest.mark.parametrize(
    "blocks_and_more",
    [(0, 1), (1, -1), (1, 0), (1, 1), (5, 7), (12, 0), (20, 1)],
    ids=lambda pair: f"{pair[0]}b{pair[1]:+d}",
)
def test_transferred_bytes_equal_whole_blocks(
    disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder, blocks_and_more: tuple[int, int]
) -> None:
    """One request moves exactly ceil(tokens / block size) blocks, in one transfer, and decode computes
    nothing again.

    Pages, not bytes: a prompt one token over a block edge moves a whole further block.
    """
    block = ledger.block_size(disaggregated.decode[0].metrics())
    length = blocks_and_more[0] * block + blocks_and_more[1]
    before = ledger.read(disaggregated)
    answer = openai.complete(
        disaggregated.router.url,
        openai.body(disaggregated.served_name, openai.prompt_of(length, length), OUTPUT_TOKENS),
    )
    after = ledger.settle(disaggregated, before, 1)
    book = ledger.prove(disaggregated, before, after, [Sent(length, OUTPUT_TOKENS)], shape, lab.vllm.version)
    assert answer.prompt_tokens == length
    record.numbers(
        f"KV bytes moved, {length} tokens",
        [book.kv_bytes],
        "B",
        arm="disaggregated",
        what="transfers",
        note=f"{blocks(length, block)} blocks of {block} tokens a group of layers, as computed",
    )
    record.numbers(
        f"transfer time, {length} tokens", [book.transfer_s], "s", arm="disaggregated", what="transfers"
    )


@pytest.mark.usefixtures("prefix_cache")
@pytest.mark.parametrize(
    ("first", "second"),
    [((3, 7), (3, 7)), ((3, 7), (5, 9)), ((2, 1), (2, 1)), ((2, 0), (2, 0)), ((1, 0), (1, 0))],
    ids=["same again", "longer", "same, one past an edge", "same, at an edge", "same, one block"],
)
def test_only_missing_blocks_move(
    disaggregated: Topology,
    lab: Lab,
    shape: KvShape,
    record: Recorder,
    first: tuple[int, int],
    second: tuple[int, int],
) -> None:
    """Blocks that the decode server holds already do not move again; the one with the last token always does.

    A content-addressed page cache on both ends of the wire. The last token is computed again for its
    logits, so the block that holds it never counts as a hit: even a prompt that decode holds entirely moves
    one block. Where a role has several nodes the earlier prompt is sent until each of them has had it.
    """
    block = ledger.block_size(disaggregated.decode[0].metrics())
    earlier, length = (blocks * block + more for blocks, more in (first, second))
    salt = {"cache_salt": f"missing-{first}-{second}"}
    whole = openai.prompt_of(max(earlier, length), 500)
    request = openai.body(disaggregated.served_name, whole[:earlier], OUTPUT_TOKENS) | salt
    before = ledger.read(disaggregated)
    for _ in range(disaggregated.cycle):
        openai.complete(disaggregated.router.url, request)
    middle = ledger.settle(disaggregated, before, disaggregated.cycle)
    seen = reusable_tokens(earlier, block)  # by a node that has had the prompt before
    first_ones = [
        Sent(
            earlier,
            OUTPUT_TOKENS,
            held_by_decode=seen * (number >= len(disaggregated.decode)),
            held_by_prefill=seen * (number >= len(disaggregated.prefill)),
        )
        for number in range(disaggregated.cycle)
    ]
    ledger.prove(disaggregated, before, middle, first_ones, shape, lab.vllm.version)
    openai.complete(disaggregated.router.url, request | {"prompt": whole[:length]})
    after = ledger.settle(disaggregated, middle, 1)
    held = min(earlier // block * block, reusable_tokens(length, block))
    sent = [Sent(length, OUTPUT_TOKENS, held_by_decode=held, held_by_prefill=held)]
    book = ledger.prove(disaggregated, middle, after, sent, shape, lab.vllm.version)
    moved = blocks(length, block) - held // block
    assert moved >= 1, "the block of the last token has to move"
    record.numbers(
        f"KV blocks moved, {length} tokens of which decode holds {held}",
        [moved],
        "blocks",
        arm="disaggregated",
        what="transfers",
        note=f"{book.kv_bytes:,} B, as computed",
    )


@pytest.mark.usefixtures("prefix_cache")
def test_what_only_prefill_holds_moves_in_full(disaggregated: Topology, lab: Lab, shape: KvShape) -> None:
    """A prefix-cache hit on the prefill server saves its computing, and nothing on the wire."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    length = 3 * block + 1
    request = openai.body(disaggregated.served_name, openai.prompt_of(length, 501), OUTPUT_TOKENS)
    request |= {"cache_salt": "prefill-holds"}
    for server in disaggregated.prefill:
        openai.complete(server.url, request)
    before = ledger.read(disaggregated)
    openai.complete(disaggregated.router.url, request)
    after = ledger.settle(disaggregated, before, 1)
    sent = [Sent(length, OUTPUT_TOKENS, held_by_prefill=reusable_tokens(length, block))]
    book = ledger.prove(disaggregated, before, after, sent, shape, lab.vllm.version)
    assert book.kv_bytes == ledger.expected_bytes(
        [Sent(length, OUTPUT_TOKENS)], shape, block, lab.vllm.version
    )


def test_a_decode_that_prefills_itself_is_caught(disaggregated: Topology, lab: Lab, shape: KvShape) -> None:
    """Prefill worked, its KV never moved, decode computed the prompt again: the proof refuses the request.

    A proxy that forgets the transfer parameters answers 200 with correct text; only the counters know.
    """
    before = ledger.read(disaggregated)
    prompt = openai.prompt_of(300, 77)
    openai.complete(disaggregated.prefill[0].url, openai.body(disaggregated.served_name, prompt, 1))
    openai.complete(
        disaggregated.decode[0].url, openai.body(disaggregated.served_name, prompt, OUTPUT_TOKENS)
    )
    after = ledger.read(disaggregated)
    with pytest.raises(TransferError, match="transfers: expected 1, got 0"):
        ledger.prove(disaggregated, before, after, [Sent(300, OUTPUT_TOKENS)], shape, lab.vllm.version)


def test_a_wrong_byte_count_is_caught(disaggregated: Topology, lab: Lab, shape: KvShape) -> None:
    """A true transfer, checked against the arithmetic of one KV head more, is refused."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    before = ledger.read(disaggregated)
    request = openai.body(disaggregated.served_name, openai.prompt_of(block, 78), OUTPUT_TOKENS)
    openai.complete(disaggregated.router.url, request)
    after = ledger.settle(disaggregated, before, 1)
    wider = tuple(dataclasses.replace(layer, kv_heads=layer.kv_heads + 1) for layer in shape.layers)
    with pytest.raises(TransferError, match=r"bytes moved by the connector: expected [\d,]+, got [\d,]+"):
        ledger.prove(
            disaggregated,
            before,
            after,
            [Sent(block, OUTPUT_TOKENS)],
            dataclasses.replace(shape, layers=wider),
            lab.vllm.version,
        )

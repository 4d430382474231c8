"""Prefill on one node, decode on the other: proof that the KV cache really took that path.

The oracle is the connector's own byte counter on the decode server against arithmetic, exactly: an equality
that stays true only if every block of every prompt moved, once. The last test shows that the check can fail.
"""

from __future__ import annotations

import dataclasses

import pytest

from disagglab import client, ledger
from disagglab.errors import TransferError
from disagglab.kv import KvShape
from disagglab.ledger import Sent
from disagglab.recorder import Recorder
from disagglab.section import Lab
from disagglab.topology import Topology

OUTPUT_TOKENS = 4


def prompt_of(length: int, salt: int) -> list[int]:
    """A prompt of exactly ``length`` tokens that no other salt shares a block with."""
    return [1000 + salt, *(2000 + position % 997 for position in range(length - 1))]


@pytest.mark.parametrize(
    "blocks_and_more", [(0, 1), (1, -1), (1, 0), (1, 1), (5, 7)], ids=lambda pair: f"{pair[0]}b{pair[1]:+d}"
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
    answer = client.complete(
        disaggregated.router.url,
        client.body(disaggregated.served_name, prompt_of(length, length), OUTPUT_TOKENS),
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
        note=f"{book.kv_bytes // shape.bytes_per_block(block)} blocks of {block} tokens, as computed",
    )
    record.numbers(
        f"transfer time, {length} tokens", [book.transfer_s], "s", arm="disaggregated", what="transfers"
    )


def test_a_decode_that_prefills_itself_is_caught(disaggregated: Topology, lab: Lab, shape: KvShape) -> None:
    """Prefill worked, its KV never moved, decode computed the prompt again: the proof refuses the request.

    A proxy that forgets the transfer parameters answers 200 with correct text; only the counters know.
    """
    before = ledger.read(disaggregated)
    prompt = prompt_of(300, 77)
    client.complete(disaggregated.prefill[0].url, client.body(disaggregated.served_name, prompt, 1))
    client.complete(
        disaggregated.decode[0].url, client.body(disaggregated.served_name, prompt, OUTPUT_TOKENS)
    )
    after = ledger.read(disaggregated)
    with pytest.raises(TransferError, match="transfers: expected 1, got 0"):
        ledger.prove(disaggregated, before, after, [Sent(300, OUTPUT_TOKENS)], shape, lab.vllm.version)


def test_a_wrong_byte_count_is_caught(disaggregated: Topology, lab: Lab, shape: KvShape) -> None:
    """A true transfer, checked against the arithmetic of one layer more, is refused."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    before = ledger.read(disaggregated)
    request = client.body(disaggregated.served_name, prompt_of(block, 78), OUTPUT_TOKENS)
    client.complete(disaggregated.router.url, request)
    after = ledger.settle(disaggregated, before, 1)
    deeper = dataclasses.replace(shape, layers=shape.layers + 1)
    with pytest.raises(TransferError, match=r"bytes moved by the connector: expected [\d,]+, got [\d,]+"):
        ledger.prove(disaggregated, before, after, [Sent(block, OUTPUT_TOKENS)], deeper, lab.vllm.version)

"""The third ledger: what the wire between the nodes carried, beside the connector's bytes and the
scheduler's tokens.

Three counters kept by three parties that do not know of each other: NIXL counts what it was asked to move,
vLLM's scheduler counts prompt tokens by where they came from, the kernel (or the RDMA adapter) counts what
passed its interface. The first two are proved equal to arithmetic; the third must hold them, plus protocol
overhead.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab import waiting
from disagglab.config.schema import Lab
from disagglab.errors import TransferError
from disagglab.hosts import link_counters
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.link_counters import Wire
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, tokens_from_prefill
from disagglab.measure import ledger
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.serving import openai
from disagglab.serving.topology import Topology

pytestmark = pytest.mark.lab_has("wire")

BLOCKS = (1, 5, 16)
OUTPUT_TOKENS = 4
SETTLE_DEADLINE_S = 5.0
POLL_S = 0.1

Reader = Callable[[], Wire]


@pytest.fixture
def counters(hosts: Hosts, disaggregated: Topology, lab: Lab) -> Reader:
    """Reads the data links of the decode nodes."""

    def read() -> Wire:
        found = link_counters.read_all([(hosts.of(node), node) for node in lab.decode])
        assert found is not None, "a decode node names no interface and no rdma device"
        return found

    return read


def settled(read: Reader, before: Wire, expected: int) -> Wire:
    """A reading once the wire has carried ``expected`` bytes; at the deadline whatever it has."""
    after = before

    def carried() -> bool:
        nonlocal after
        after = read()
        return after.received - before.received >= expected

    waiting.last_answer(carried, SETTLE_DEADLINE_S, POLL_S)
    return after


@pytest.mark.parametrize("count", BLOCKS, ids=lambda count: f"{count}-blocks")
def test_three_ledgers_agree(
    disaggregated: Topology, counters: Reader, lab: Lab, shape: KvShape, record: Recorder, count: int
) -> None:
    """Connector bytes = blocks x bytes, scheduler tokens = prompt, wire = both within protocol overhead."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    length = count * block
    request = openai.body(disaggregated.served_name, openai.prompt_of(length, count), OUTPUT_TOKENS)
    first, before = counters(), ledger.read(disaggregated)
    openai.complete(disaggregated.router.url, request | {"cache_salt": f"wire-{count}"})
    after = ledger.settle(disaggregated, before, 1)
    book = ledger.prove(disaggregated, before, after, [Sent(length, OUTPUT_TOKENS)], shape, lab.vllm.version)
    assert book.kv_bytes == layout(shape, block).bytes_to_move(length, lab.vllm.version)
    assert book.external_tokens == tokens_from_prefill(length)
    last = settled(counters, first, book.kv_bytes)
    carried = link_counters.prove(first, last, book.kv_bytes, 1)
    record.numbers(
        f"wire, {length} tokens", [carried], "B", arm="disaggregated", what="requests", note=last.source
    )
    record.numbers(f"connector, {length} tokens", [book.kv_bytes], "B", arm="disaggregated", what="requests")
    record.numbers(
        f"wire / connector, {length} tokens",
        [carried / book.kv_bytes],
        "ratio",
        arm="disaggregated",
        what="requests",
        note=f"at most {link_counters.most(book.kv_bytes, 1, last.mtu) / book.kv_bytes:.3f}"
        f" at an MTU of {last.mtu} B",
    )


def test_the_wire_tells_a_transfer_that_was_not(
    disaggregated: Topology, counters: Reader, lab: Lab, shape: KvShape
) -> None:
    """A request that decode computes itself leaves the wire idle, and the wire's proof refuses it."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    length = 4 * block
    request = openai.body(disaggregated.served_name, openai.prompt_of(length, 99), OUTPUT_TOKENS)
    before = counters()
    openai.complete(disaggregated.decode[0].url, request | {"cache_salt": "wire-idle"})
    after = counters()
    claimed = layout(shape, block).bytes_to_move(length, lab.vllm.version)
    with pytest.raises(TransferError, match="the wire carried"):
        link_counters.prove(before, after, claimed, 1)
    assert link_counters.received(before, after) < link_counters.REQUEST_BYTES

"""KV memory of a request, and what a repeated prompt saves, as the live server reports them.

Oracle: the server's own gauges and counters (blocks in use, prompt tokens by source) against arithmetic,
exactly. Times are recorded; of them only "computing 17 blocks takes longer than computing one token" is
asserted.
"""

from __future__ import annotations

import pytest

from disagglab.kv.shape import KvShape, blocks, reusable_tokens
from disagglab.measure import ledger
from disagglab.measure.kv_usage import peak_blocks
from disagglab.measure.ledger import BY_SOURCE
from disagglab.results.recorder import Recorder
from disagglab.serving import openai
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import Topology

GROWTH = (1, 2, 5, 9, 17)  # blocks of the prompt, less one token
OUTPUT_TOKENS = 16  # enough for the poll to see the request at its largest
STEP = 16  # tokens between points of the computed lines
REPEATED = (1, 4, 8, 16)  # blocks of the prompt, plus one token


@pytest.mark.usefixtures("one_table")
def test_memory_grows_by_whole_blocks(single: Topology, shape: KvShape, record: Recorder) -> None:
    """At every prompt length the server holds ceil(tokens / block size) blocks, no more and no fewer.

    A request's session state grows in pages: flat within a page, one page up at its edge.
    """
    server = single.servers[0]
    block = ledger.block_size(server.metrics())
    lengths = [count * block - 1 for count in GROWTH]
    used = []
    for length in lengths:
        request = openai.body(single.served_name, openai.prompt_of(length, length), OUTPUT_TOKENS)
        used.append(peak_blocks(server, single.router.url, request | {"cache_salt": f"growth-{length}"}))
    expected = [blocks(length + OUTPUT_TOKENS, block) for length in lengths]
    per_block = shape.bytes_per_block(block)
    mebibytes = [count * per_block / 2**20 for count in used]
    steps = range(1, lengths[-1] + 1, STEP)
    for length, count in zip(lengths, used, strict=True):
        note = f"{count} blocks of {block} tokens"
        record.numbers(
            f"KV bytes in use, {length} tokens",
            [count * per_block],
            "B",
            arm="single",
            what="peak",
            note=note,
        )
    record.plot(
        "KV memory of one request",
        "prompt tokens",
        "MiB",
        {
            "measured": (lengths, mebibytes),
            "computed: whole blocks": (
                steps,
                [blocks(n + OUTPUT_TOKENS, block) * per_block / 2**20 for n in steps],
            ),
            "tokens x bytes per token": (
                steps,
                [(n + OUTPUT_TOKENS) * shape.bytes_per_token / 2**20 for n in steps],
            ),
        },
        style="points over lines",
        caption=f"Blocks of {block} tokens; the {OUTPUT_TOKENS} output tokens are counted in.",
    )
    assert used == expected, (
        f"prompts of {lengths} tokens: expected {expected} blocks, the server used {used}"
    )


@pytest.mark.usefixtures("prefix_cache")
@pytest.mark.parametrize("remainder", [0, 1], ids=["at an edge", "one past it"])
def test_a_repeated_prompt_reuses_whole_blocks(single: Topology, record: Recorder, remainder: int) -> None:
    """The second time a prompt comes, all its whole blocks are found, except that the last token is computed.

    A content-addressed page cache: equal beginnings share pages. A prompt that ends at a page edge gives its
    last page up, because its last token has to be computed for its logits.
    """
    server = single.servers[0]
    block = ledger.block_size(server.metrics())
    lengths = [count * block + remainder for count in REPEATED]
    cold, warm = [], []
    for length in lengths:
        request = openai.body(single.served_name, openai.prompt_of(length, 400 + length), 1)
        request |= {"cache_salt": f"reuse-{length}"}
        cold.append(openai.complete(single.router.url, request).ttft_s)
        before = server.metrics()
        warm.append(openai.complete(single.router.url, request).ttft_s)
        after = server.metrics()
        hits = round(delta(before, after, BY_SOURCE, source="local_cache_hit"))
        computed = round(delta(before, after, BY_SOURCE, source="local_compute"))
        reused = reusable_tokens(length, block)
        assert (hits, computed) == (reused, length - reused), f"{length} tokens: found and computed again"
    for name, values in (("first", cold), ("repeated", warm)):
        for length, seconds in zip(lengths, values, strict=True):
            record.numbers(f"TTFT, {name}, {length} tokens", [seconds], "s", arm="single", what="requests")
    record.plot(
        f"Prefix-cache reuse of a repeated prompt ({'past' if remainder else 'at'} a block edge)",
        "prompt tokens",
        "TTFT, s",
        {"first time": (lengths, cold), "repeated": (lengths, warm)},
        caption="One request a point; the second finds the blocks of the first.",
    )
    assert warm[-1] < cold[-1], f"{lengths[-1]} tokens took {warm[-1]:.3f} s again, {cold[-1]:.3f} s at first"

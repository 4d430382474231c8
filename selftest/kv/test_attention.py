"""What each layer keeps, read from config.json: layer patterns, where heads and dimensions are named,
refusals.

Oracle: the configuration classes of Hugging Face transformers, read by eye; patterns are written out as one
letter per layer, L for a layer that looks back over a window, G for one that sees everything.
"""

from __future__ import annotations

from typing import Any

import pytest

from disagglab.errors import ConfigError
from disagglab.kv import attention, modelconfig
from disagglab.kv.shape import KvShape, Layer

BASE: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "torch_dtype": "bfloat16",
}
WINDOW = 512
MLA = {"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
TYPES = {"L": "sliding_attention", "G": "full_attention"}


def read(**changes: Any) -> KvShape:
    """The shape of the base config with keys changed; ``...`` takes a key away."""
    return attention.shape({key: value for key, value in {**BASE, **changes}.items() if value is not ...})


def layers(**changes: Any) -> list[tuple[int, int, int]]:
    """KV heads, key and value numbers of each layer."""
    return [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in read(**changes).layers]


ON = {"use_sliding_window": True}
PATTERNS: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {}, "LGLGLGL"),
    ("gemma3_text", {}, "LLLLLGLLLLLGLL"),
    ("gemma3_text", {"sliding_window_pattern": 6}, "LLLLLGLLLLLGLL"),
    ("gemma3_text", {"sliding_window_pattern": 3}, "LLGLLG"),
    ("gemma3n_text", {}, "LLLLGLLLLG"),
    ("gpt_oss", {}, "LGLGL"),
    ("olmo3", {}, "LLLGLLLG"),
    ("exaone4", {}, "LLLGLLLGL"),
    ("exaone4", {"sliding_window_pattern": "LLLG"}, "LLLGLLLGL"),
    ("exaone4", {"sliding_window_pattern": "LGG"}, "LGGLGG"),
    ("mistral", {}, "LLLL"),
    ("mistral", {"sliding_window": None}, "GGGG"),
    ("mistral", {"sliding_window": 0}, "GGGG"),
    ("mistral", {"use_sliding_window": False}, "GGGG"),
    ("gemma2", {"sliding_window": None}, "GGGG"),
    ("qwen2", {}, "GGGG"),
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 2}, "GGGG"),
    ("qwen2", {**ON, "max_window_layers": 2}, "GGLLL"),
    ("qwen2", {**ON, "max_window_layers": 4}, "GGGG"),
    ("qwen3", {**ON, "max_window_layers": 0}, "LLL"),
    ("smollm3", {}, "GGGG"),
    ("gemma2", {"layer_types": [TYPES[kind] for kind in "GGLG"]}, "GGLG"),
    ("llama", {"layer_types": [TYPES[kind] for kind in "LGG"]}, "LGG"),
    ("qwen3", {"layer_types": ["full_attention"] * 3, "sliding_window": None}, "GGG"),
]


@pytest.mark.parametrize(("model_type", "changes", "pattern"), PATTERNS)
def test_layer_patterns(model_type: str, changes: dict[str, Any], pattern: str) -> None:
    """Each family's layers slide where its configuration class says so."""
    config = {
        "model_type": model_type,
        "sliding_window": WINDOW,
        **changes,
        "num_hidden_layers": len(pattern),
    }
    windows = [layer.window for layer in read(**config).layers]
    assert windows == [WINDOW if kind == "L" else None for kind in pattern]


@pytest.mark.parametrize("named", [{}, {"layer_types": [TYPES[kind] for kind in "LLLGLLLG"]}])
def test_coheres_window_excludes_the_present_token(named: dict[str, Any]) -> None:
    """Cohere 2 looks back 512 tokens beside the present one, three layers of four."""
    shape = read(model_type="cohere2", sliding_window=512, num_hidden_layers=8, **named)
    assert [layer.window for layer in shape.layers] == [513, 513, 513, None] * 2


HEADS: list[tuple[dict[str, Any], list[tuple[int, int, int]]]] = [
    ({}, [(2, 16, 16)] * 6),
    ({"head_dim": 32}, [(2, 32, 32)] * 6),
    ({"head_dim": 32, "hidden_size": ...}, [(2, 32, 32)] * 6),
    ({"head_dim": None}, [(2, 16, 16)] * 6),
    ({"head_dim": 0}, [(2, 16, 16)] * 6),
    ({"num_key_value_heads": ...}, [(8, 16, 16)] * 6),
    ({"num_key_value_heads": None}, [(8, 16, 16)] * 6),
    ({"num_key_value_heads": ..., "multi_query_group_num": 4, "kv_channels": 24}, [(4, 24, 24)] * 6),
    ({"num_hidden_layers": 3, "num_key_value_heads": [1, 2, 4]}, [(1, 16, 16), (2, 16, 16), (4, 16, 16)]),
    ({"model_type": "falcon", "multi_query": True, "num_kv_heads": 8}, [(1, 16, 16)] * 6),
    ({"model_type": "falcon", "multi_query": False}, [(2, 16, 16)] * 6),
    (
        {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 4},
        [(4, 16, 16)] * 6,
    ),
    ({"num_key_value_heads": ..., "attn_config": {"kv_n_heads": 4}}, [(4, 16, 16)] * 6),
    ({"v_head_dim": 16}, [(2, 16, 16)] * 6),
    (MLA, [(1, 512 + 64, 0)] * 6),
    ({**MLA, "v_head_dim": 128, "num_key_value_heads": 8}, [(1, 576, 0)] * 6),
    ({"num_kv_shared_layers": 4}, [(2, 16, 16)] * 2),
    ({"num_kv_shared_layers": 0}, [(2, 16, 16)] * 6),
    (
        {"num_hidden_layers": 3, "per_layer_config": {"1": {"num_key_value_heads": 4}, "2": {"head_dim": 8}}},
        [(2, 16, 16), (4, 16, 16), (2, 8, 8)],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), HEADS)
def test_heads_and_dimensions(changes: dict[str, Any], expected: list[tuple[int, int, int]]) -> None:
    """KV heads and numbers per head of every layer, wherever the config names them."""
    assert layers(**changes) == expected


@pytest.mark.parametrize(
    "names",
    [("n_layer", "n_head", "n_embd"), ("n_layers", "n_heads", "d_model"), ("num_layers", "n_head", "n_embd")],
)
def test_names_of_older_configs(names: tuple[str, str, str]) -> None:
    """GPT-2 and MPT have other names for layers, heads and width."""
    shape = attention.shape(dict(zip(names, (12, 12, 768), strict=True)))
    assert shape.layers == (Layer(12, 64, 64),) * 12


def test_shared_layers_are_the_last_ones() -> None:
    """Layers that read the cache of an earlier one keep none; the first keep their pattern."""
    shape = read(model_type="gemma3n_text", sliding_window=9, num_hidden_layers=10, num_kv_shared_layers=4)
    assert [layer.window for layer in shape.layers] == [9, 9, 9, 9, None, 9]


@pytest.mark.parametrize(("same", "heads"), [(True, 1), (False, 2)])
def test_full_layers_of_gemma_4_have_their_own_shape(same: bool, heads: int) -> None:
    """Full layers take global_head_dim, and their own KV heads only where keys are values."""
    own = {"global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": same}
    kinds = {"layer_types": [TYPES[kind] for kind in "LG"], "num_hidden_layers": 2, "sliding_window": 8}
    assert read(**own, **kinds).layers == (Layer(2, 16, 16, 8), Layer(heads, 64, 64))


def test_blocks_without_attention_keep_nothing() -> None:
    """Nemotron-NAS: heads in a group differ by block; no-op and linear blocks have no cache."""
    blocks = [
        {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False},
        {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False},
        {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True},
        {"n_heads_in_group": 1},
    ]
    config = {"num_hidden_layers": 4, "block_configs": [{"attention": block, "ffn": {}} for block in blocks]}
    assert layers(num_key_value_heads=None, **config) == [(2, 16, 16), (8, 16, 16)]


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_the_language_model_of_a_multimodal_one_is_read(key: str) -> None:
    """A nested config counts, with the outer dtype where it names none; an outer one with layers wins."""
    inner = {name: value for name, value in BASE.items() if name != "torch_dtype"}
    outer = {"model_type": "some_vl", "vision_config": {"num_hidden_layers": 99}, key: inner}
    shape = attention.shape({**outer, "dtype": "float16"})
    assert (shape.layers, shape.dtype) == ((Layer(2, 16, 16),) * 6, "float16")
    assert (
        attention.shape({**outer, key: {**inner, "dtype": "bfloat16"}, "dtype": "float16"}).dtype
        == "bfloat16"
    )
    assert len(attention.shape({**BASE, key: {**inner, "num_hidden_layers": 2}}).layers) == 6
    assert attention.max_positions({key: {"max_position_embeddings": 77}}) == 77


@pytest.mark.parametrize(
    ("named", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": ..., "dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float32"}, "bfloat16"),
        ({"torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": ...}, "bfloat16"),
    ],
)
def test_the_models_own_dtype(named: dict[str, Any], dtype: str) -> None:
    """Unasked, the model's own dtype counts; a float32 checkpoint is served in 16 bits."""
    assert read(**named).dtype == dtype


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "seq_length"])
def test_longest_sequence(name: str) -> None:
    """The position encoding's reach has several names; without one the config is refused."""
    assert attention.max_positions({name: 1024}) == 1024
    with pytest.raises(ConfigError, match="max_position_embeddings: missing"):
        attention.max_positions(BASE)


def test_a_16_bit_dtype_is_allowed_where_fp8_is_not() -> None:
    """Falcon and MLA refuse only what they cannot keep (the refusals are in test_attention_refusals.py)."""
    assert attention.shape({**BASE, "model_type": "falcon"}, "float16").dtype == "float16"
    assert attention.shape({**BASE, **MLA}, "fp8").bytes_per_token == 6 * 576


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}},
    ],
)
def test_a_checkpoint_may_ask_for_an_fp8_cache(quantization: dict[str, Any]) -> None:
    """Left to itself vLLM keeps what the checkpoint's quantization asks for; a dtype that is named wins."""
    config = {
        **modelconfig.shipped_config("meta-llama/Llama-3.1-8B-Instruct"),
        "quantization_config": quantization,
    }
    assert attention.shape(config).bytes_per_token == 32 * 2 * 8 * 128
    assert attention.shape(config, "bfloat16").bytes_per_token == 32 * 2 * 8 * 128 * 2
    weights_only = {
        **config,
        "quantization_config": {"quant_method": "awq", "bits": 4, "kv_cache_scheme": None},
    }
    assert attention.shape(weights_only).bytes_per_token == 32 * 2 * 8 * 128 * 2


def test_qwens_windows_begin_at_a_layer() -> None:
    """Where max_window_layers is not said, the configuration class says 28."""
    config = modelconfig.shipped_config("Qwen/Qwen3-8B") | {"use_sliding_window": True, "sliding_window": 64}
    config.pop("max_window_layers", None)
    layers = attention.shape(config).layers
    assert [index for index, layer in enumerate(layers) if layer.window] == list(range(28, 36))

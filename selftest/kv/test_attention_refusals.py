"""What the KV arithmetic refuses: caches of another kind, and configs that contradict themselves.

A number for any of these would be wrong without anybody noticing. Each refusal names the key to blame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagglab.errors import ConfigError
from disagglab.kv import attention, modelconfig

CONFIGS = Path(__file__).parent / "configs"
BASE: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "torch_dtype": "bfloat16",
}
MLA = {"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
FULL, SLIDING = "full_attention", "sliding_attention"
BLOCK = {"attention": {"n_heads_in_group": 4}}


def refused(config: dict[str, Any], dtype: str = "auto") -> str:
    """The key that a refusal names."""
    with pytest.raises(ConfigError) as caught:
        attention.shape(config, dtype, "here.json")
    (problem,) = caught.value.problems
    assert problem.file == "here.json"
    assert problem.wrong
    assert problem.mend
    return problem.key


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The base config with keys changed; ``...`` takes a key away."""
    return {key: value for key, value in {**BASE, **changes}.items() if value is not ...}


def test_the_base_config_is_sound() -> None:
    """What is refused below is refused for what is changed in it."""
    assert attention.shape(BASE).bytes_per_token == 6 * 2 * (16 + 16) * 2
    assert attention.shape(changed(MLA)).bytes_per_token == 6 * 576 * 2
    assert len(attention.shape(changed({"block_configs": [BLOCK] * 6})).layers) == 6


OTHER_CACHES = {
    "Qwen--Qwen3-Next-80B-A3B-Instruct": "full_attention_interval",
    "ai21labs--AI21-Jamba-1.5-Mini": "attn_layer_offset",
    "deepseek-ai--DeepSeek-V3.2": "index_head_dim",
    "google-t5--t5-small": "is_encoder_decoder",
    "openai--whisper-tiny": "is_encoder_decoder",
    "state-spaces--mamba-130m-hf": "state_size",
    "tiiuae--falcon-mamba-7b": "state_size",
}


def test_every_config_beside_this_file_is_refused() -> None:
    """Real models that keep something else than keys and values, each refused by its own key."""
    keys = {path.stem: refused(modelconfig.read(path)) for path in CONFIGS.glob("*.json")}
    assert keys == OTHER_CACHES


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "rwkv", "num_attention_heads": ..., "attention_hidden_size": 128}, "model_type"),
        ({"model_type": "rwkv6", "num_key_value_heads": ..., "head_size": 64}, "model_type"),
        ({"block_types": ["recurrent", "recurrent", "attention"]}, "block_types"),
        ({"_block_types": ["recurrent", "attention"]}, "_block_types"),
        ({"lru_width": 128}, "lru_width"),
        ({"state_size": 16}, "state_size"),
        ({"model_type": "xlstm"}, "model_type"),
        ({"conv_L_cache": 3}, "conv_L_cache"),
        ({"layer_types": ["linear_attention"] * 5 + [FULL]}, "layer_types"),
        ({"layer_types": [FULL] * 5 + ["mamba"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ({"attn_type_list": [1, 0, 1, 1, 1, 1]}, "attn_type_list"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "linear_attn_config"),
        ({"linear_num_key_heads": 4}, "linear_num_key_heads"),
        ({"mamba_d_state": 128}, "mamba_d_state"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"attn_layer_indices": [3]}, "attn_layer_indices"),
        ({"model_type": "minicpm3", "kv_lora_rank": 256, "qk_rope_head_dim": 32}, "kv_lora_rank"),
        ({**MLA, "index_topk": 2048}, "index_topk"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"cross_attention_layers": [3]}, "cross_attention_layers"),
        ({"swa_num_key_value_heads": 4}, "swa_num_key_value_heads"),
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": "roberta"}, "model_type"),
        ({"model_type": "modernbert"}, "model_type"),
        *[
            ({"model_type": name}, "model_type")
            for name in ("albert", "electra", "deberta-v2", "mpnet", "vit")
        ],
        *[({"model_type": name}, "model_type") for name in ("clip_text_model", "t5", "whisper", "retnet")],
        ({"use_cla": True, "cla_share_factor": 2}, "use_cla"),
        ({"attention_other_setting": {"num_attention_groups": 2}}, "attention_other_setting"),
        ({**MLA, "model_type": "longcat_flash"}, "kv_lora_rank"),
        ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ],
)
def test_other_caches_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    """Recurrent and linear-attention state, indexers, chunks, cross attention, encoders: never a number."""
    assert refused(changed(changes)) == key


@pytest.mark.parametrize("outer", [True, False])
def test_a_multimodal_model_is_refused_by_either_part(outer: bool) -> None:
    """The key that forbids may stand in the nested config or around it."""
    wrong = {"mamba_d_state": 128}
    config = {"text_config": BASE, **wrong} if outer else {"text_config": {**BASE, **wrong}}
    assert refused(config) == "mamba_d_state"


@pytest.mark.parametrize(
    "changes", [{"attn_type_list": [1] * 6}, {"attention_chunk_size": None}, {"is_encoder_decoder": False}]
)
def test_keys_that_are_off_forbid_nothing(changes: dict[str, Any]) -> None:
    """A key that says no to the other cache leaves the model computable."""
    assert attention.shape(changed(changes)) == attention.shape(BASE)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": [FULL] * 5}, "layer_types"),
    ({"layer_types": [FULL] * 7}, "layer_types"),
    ({"layer_types": []}, "layer_types"),
    ({"layer_types": [SLIDING] * 6}, "layer_types"),
    ({"layer_types": [SLIDING] * 6, "sliding_window": 0}, "layer_types"),
    ({"layer_types": [SLIDING] * 6, "sliding_window": 8, "use_sliding_window": False}, "layer_types"),
    ({"layer_types": 6}, "layer_types"),
    ({"layer_types": [[FULL]] * 6}, "layer_types"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": 16}, "num_key_value_heads"),
    ({"num_key_value_heads": [2] * 5}, "num_key_value_heads"),
    ({"num_key_value_heads": [2] * 5 + [3]}, "num_key_value_heads"),
    ({"hidden_size": 129}, "hidden_size"),
    ({"v_head_dim": 8}, "v_head_dim"),
    ({"block_configs": [BLOCK] * 5}, "block_configs"),
    ({"block_configs": [BLOCK] * 7}, "block_configs"),
    ({"block_configs": [BLOCK] * 6, "hidden_size": 129}, "hidden_size"),
    ({"block_configs": [BLOCK] * 5 + [{"ffn": {}}]}, "block_configs"),
    ({"block_configs": [BLOCK] * 5 + [{"attention": {"n_heads_in_group": 3}}]}, "block_configs"),
    ({"block_configs": [{"attention": {"no_op": True}}] * 6}, "block_configs"),
    ({"block_configs": [{"attention": {}}] * 6}, "block_configs[0].attention.n_heads_in_group"),
    ({**MLA, "qk_rope_head_dim": ...}, "qk_rope_head_dim"),
    ({"num_kv_shared_layers": 6}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": 1.5}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": True}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": False}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": "two"}, "num_kv_shared_layers"),
    ({"per_layer_config": [1]}, "per_layer_config"),
    ({"per_layer_config": {"first": {}}}, "per_layer_config"),
    ({"per_layer_config": {"0": 1}}, "per_layer_config"),
    ({"per_layer_config": {"0": {"num_key_value_heads": 3}}}, "num_key_value_heads"),
    ({"attn_type_list": 1}, "attn_type_list"),
    ({"model_type": "gemma2", "sliding_window": 8, "sliding_window_pattern": 0}, "sliding_window_pattern"),
    (
        {"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": "LXG"},
        "sliding_window_pattern",
    ),
    ({"num_hidden_layers": ...}, "num_hidden_layers"),
    ({"num_hidden_layers": 10_001}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ({"head_dim": 10**30}, "head_dim"),
    ({"model_type": [], "kv_lora_rank": 8}, "kv_lora_rank"),
    ({"model_type": "gpt_oss"}, "sliding_window"),
    ({"model_type": "gemma2"}, "sliding_window"),
    ({"quantization_config": {"kv_cache_quant_algo": "NVFP4"}}, "quantization_config.kv_cache_quant_algo"),
    ({"quantization_config": {"kv_cache_scheme": {"num_bits": 4}}}, "quantization_config.kv_cache_scheme"),
    ({"num_attention_heads": ...}, "num_attention_heads"),
    ({"hidden_size": ...}, "hidden_size"),
    ({"torch_dtype": "int3"}, "dtype"),
]


@pytest.mark.parametrize(("changes", "key"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    """A config whose keys deny each other, or that lacks one, is refused by the key to blame."""
    assert refused(changed(changes)) == key


@pytest.mark.parametrize(
    ("key", "around"),
    [
        ("num_hidden_layers", {}),
        ("num_attention_heads", {}),
        ("num_key_value_heads", {}),
        ("hidden_size", {}),
        ("kv_lora_rank", MLA),
        ("qk_rope_head_dim", MLA),
        ("head_dim", {}),
        ("sliding_window", {"model_type": "mistral"}),
        ("max_window_layers", {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}),
    ],
)
@pytest.mark.parametrize("value", [-2, True, 8.0, "8", {"a": 8}])
def test_what_is_no_positive_whole_number_is_refused(key: str, around: dict[str, Any], value: Any) -> None:
    """Negative, boolean, fractional and quoted numbers are refused by their key, none is converted."""
    assert refused(changed({**around, key: value})) == key


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"]
)
def test_zero_is_refused_where_it_means_nothing(key: str) -> None:
    """No layers, heads or width: refused (a zero head_dim or window means that there is none)."""
    assert refused(changed({key: 0})) == key


@pytest.mark.parametrize(
    ("changes", "dtype", "key"),
    [
        ({}, "fp4", "dtype"),
        ({}, "", "dtype"),
        (MLA, "fp8_per_token_head", "kv_lora_rank"),
        (MLA, "int8_per_token_head", "kv_lora_rank"),
        ({"model_type": "falcon", "multi_query": True}, "fp8", "model_type"),
        ({"model_type": "falcon"}, "int8_per_token_head", "model_type"),
        ({"model_type": "RefinedWebModel"}, "fp8_e5m2", "model_type"),
    ],
)
def test_dtypes_that_a_model_cannot_keep(changes: dict[str, Any], dtype: str, key: str) -> None:
    """An unknown dtype, one that MLA has no layout for, and any 8-bit one for falcon are refused."""
    assert refused(changed(changes), dtype) == key

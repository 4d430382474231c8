"""KV cache arithmetic against values known from elsewhere, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagglab import kv
from disagglab.errors import ConfigError

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


def test_known_models() -> None:
    """Llama-3.1-8B makes 131,072 B per token, in fp8 half of it; SmolLM2-135M makes 23,040 B."""
    assert kv.shape(LLAMA, "bfloat16").bytes_per_token == 131_072
    assert kv.shape(LLAMA, "fp8").bytes_per_token == 65_536
    smol = {
        **LLAMA,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    shape = kv.shape(smol, "bfloat16")
    assert (shape.bytes_per_token, shape.bytes_per_block(128)) == (23_040, 2_949_120)


def test_head_dim_of_the_config_wins() -> None:
    """A head dimension in the config is taken as it is; without one it is hidden_size / heads."""
    assert kv.shape({**LLAMA, "head_dim": 256}, "bfloat16").head_dim == 256
    assert kv.shape(LLAMA, "bfloat16").head_dim == 128


def test_multi_head_attention_without_kv_heads() -> None:
    """A config that names no KV heads has as many as attention heads."""
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert kv.shape(config, "bfloat16").kv_heads == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_lora_rank", 512),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("is_encoder_decoder", True),
        ("mamba_d_state", 128),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(key: str, value: Any) -> None:
    """Architectures that store something else are refused, naming the key; nothing is guessed."""
    with pytest.raises(ConfigError) as caught:
        kv.shape({**LLAMA, key: value}, "bfloat16")
    assert caught.value.problems[0].key == key


def test_a_missing_value_is_named() -> None:
    """A config without layers is refused, naming the key."""
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        kv.shape({"num_attention_heads": 2, "max_position_embeddings": 1}, "bfloat16")


def test_unknown_block_rule_names_the_version() -> None:
    """A vLLM version whose block rule nobody has measured is refused by its number."""
    with pytest.raises(ConfigError, match=r"vLLM 9\.9\.9"):
        kv.blocks_to_move(1, 16, "9.9.9")


@given(st.integers(1, 10**6), st.sampled_from([16, 32, 64, 128]))
def test_blocks_are_the_smallest_cover(tokens: int, block: int) -> None:
    """The blocks hold the tokens, and one block less would not."""
    count = kv.blocks(tokens, block)
    assert count * block >= tokens > (count - 1) * block


def test_one_token_prompts_are_computed_by_decode() -> None:
    """vLLM recomputes the last prompt token, so of one token none counts as taken from prefill."""
    assert (kv.tokens_from_prefill(1), kv.tokens_from_prefill(2)) == (0, 2)


def test_a_broken_config_names_the_file(tmp_path: Path) -> None:
    """A missing and a damaged config.json are told apart, both with their path."""
    with pytest.raises(ConfigError, match="missing"):
        kv.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        kv.read_config(tmp_path)


def test_shipped_configs_are_readable() -> None:
    """Every shipped config gives a KV shape."""
    assert "meta-llama/Llama-3.1-8B-Instruct" in kv.shipped()
    for name in kv.shipped():
        assert kv.shape(kv.shipped_config(name), "bfloat16", name).bytes_per_token > 0

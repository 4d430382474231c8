"""KV cache arithmetic from a model's ``config.json`` alone: no weights, no torch, no vLLM.

Bytes per token = 2 (key and value) x layers x KV heads x head dimension x bytes per element (full attention:
MHA, GQA and MQA differ only in the number of KV heads). What this module cannot compute it refuses by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagglab.errors import ConfigError, Problem

CONFIGS_FOLDER = Path(__file__).parent / "configs"  # of models that a lab names and this machine may not have
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
KEY_AND_VALUE = 2

# How many KV cache blocks NixlConnector moves for a prompt, by vLLM version (major.minor). Pull mode reads
# whole blocks, the last partial one included, and skips those that the decode server holds already.
WHOLE_BLOCKS = "whole blocks, the last partial one included"
BLOCK_RULE = {"0.31": WHOLE_BLOCKS, "0.26": WHOLE_BLOCKS}


@dataclass(frozen=True)
class KvShape:
    """What decides the size of a model's KV cache. ``dtype`` is the dtype of the cache."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    max_positions: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV cache for one token, over all layers."""
        return KEY_AND_VALUE * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV cache block of ``block_size`` tokens, over all layers."""
        return block_size * self.bytes_per_token


def blocks(tokens: int, block_size: int) -> int:
    """KV cache blocks that ``tokens`` occupy: ceil(tokens / block_size)."""
    return -(-tokens // block_size)


def blocks_to_move(tokens: int, block_size: int, vllm_version: str) -> int:
    """Blocks that the connector reads for a prompt of which the decode server holds nothing.

    Raises:
        ConfigError: if the rule of this vLLM version is not known.
    """
    release = ".".join(vllm_version.split("+")[0].split(".")[:2])
    if BLOCK_RULE.get(release) != WHOLE_BLOCKS:
        raise ConfigError(
            [
                Problem(
                    "disagglab/kv.py",
                    "BLOCK_RULE",
                    f"no block rule known for vLLM {vllm_version}",
                    "measure it on that version (tests/disagg/test_path.py), then add a line",
                )
            ]
        )
    return blocks(tokens, block_size)


def tokens_from_prefill(tokens: int) -> int:
    """Prompt tokens that the decode server counts as taken from prefill.

    vLLM recomputes the last prompt token to get its logits. With one token nothing else is left, so it counts
    as computed locally, although its block has moved.
    """
    return tokens if tokens > 1 else 0


def transfer_time_s(kv_bytes: int, link_bytes_per_s: float) -> float:
    """Time to move ``kv_bytes`` over a link at its full rate, s."""
    return kv_bytes / link_bytes_per_s


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ConfigError: if it is missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError([Problem(str(path), "(whole file)", "missing", "name a model folder")]) from error
    except ValueError as error:
        raise ConfigError(
            [Problem(str(path), "(whole file)", f"not JSON: {error}", "fetch the model anew")]
        ) from error
    return config


def shipped() -> tuple[str, ...]:
    """Hugging Face ids of the models whose config ships with the suite."""
    return tuple(path.stem.replace("--", "/") for path in sorted(CONFIGS_FOLDER.glob("*.json")))


def shipped_config(model_id: str) -> dict[str, Any]:
    """The shipped config of a model id from :func:`shipped`."""
    config: dict[str, Any] = json.loads((CONFIGS_FOLDER / f"{model_id.replace('/', '--')}.json").read_text())
    return config


def shape(config: Mapping[str, Any], dtype: str, origin: str = "config.json") -> KvShape:
    """The KV shape of a full-attention decoder.

    Args:
        config: the parsed ``config.json``.
        dtype: dtype of the KV cache (a key of DTYPE_BYTES).
        origin: where the config came from, for messages.

    Raises:
        ConfigError: if a value is missing, or the architecture stores something else than one key and one
        value per
            layer, KV head and token (MLA, sliding windows, recurrent state, encoder-decoder).
    """
    refused = {
        "kv_lora_rank": "multi-head latent attention (MLA)",
        "layer_types": "a mix of layer types",
        "is_encoder_decoder": "encoder-decoder cross attention",
        "mamba_d_state": "Mamba state",
        "ssm_cfg": "state-space layers",
    }
    for key, what in refused.items():
        value = config.get(key)
        if value and not (key == "layer_types" and set(value) == {"full_attention"}):
            raise ConfigError([Problem(origin, key, f"{what} is not computed", "use a full-attention model")])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ConfigError(
            [
                Problem(
                    origin,
                    "sliding_window",
                    "sliding-window attention is not computed",
                    "use a full-attention model",
                )
            ]
        )
    missing = [
        k for k in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings") if k not in config
    ]
    if missing:
        raise ConfigError(
            [Problem(origin, key, "missing", "use the config of a decoder model") for key in missing]
        )
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or int(config["hidden_size"]) // heads
    return KvShape(
        layers=int(config["num_hidden_layers"]),
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        dtype=dtype,
        max_positions=int(config["max_position_embeddings"]),
    )

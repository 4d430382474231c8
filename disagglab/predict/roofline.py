"""Speeds of an engine from a model's ``config.json`` and two nominal figures of its node: a roofline.

Prefill is bound by arithmetic, a decode step by reading weights and KV cache from memory (S. Williams, A.
Waterman, D. Patterson, Roofline, Commun. ACM 52(4), 2009). Neither reaches the nominal figure; what share of
it they reach is an assumption, and is handed in as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagglab.config.schema import SpeedSection
from disagglab.errors import ConfigError, Problem
from disagglab.kv import attention
from disagglab.kv.attention import HIDDEN, Config
from disagglab.kv.shape import DTYPES, KvShape
from disagglab.predict.breakeven import Prefill, Speeds, Step

FLOP = 2  # a multiplication and an addition for each weight and token
# Decoders whose feed-forward part is three matrices (gate, up, down), all used by every token.
GATED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "smollm3"),
}
# A config may name one of these in spite of its model_type: its experts are not read by every token.
SPARSE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "enable_moe_block")


@dataclass(frozen=True)
class Weights:
    """Numbers that a dense decoder multiplies with, norms and biases left out.

    ``layers``: for every token. ``head``: for every token that is generated. ``attention_pair``: products
    of one query with one key and one value, in all layers that look back without limit; ``attention_window``:
    the same in the others, times their window.
    """

    layers: int
    head: int
    attention_pair: int
    attention_window: int


@dataclass(frozen=True)
class Efficiency:
    """Shares of the nominal figures that are reached; assumptions."""

    prefill: float = 0.5
    decode: float = 0.7


def weights(config: Config, shape: KvShape, origin: str = "config.json") -> Weights:
    """Count the weights of a dense decoder.

    Raises:
        ConfigError: naming the key, if it is not one that is known to be dense, or if a number is missing.
    """
    text = attention.text_config(config)
    kind = str(text.get("model_type", ""))
    sparse = [key for key in SPARSE_KEYS if text.get(key)]
    if kind not in GATED or sparse:
        key = sparse[0] if sparse else "model_type"
        raise _refused(origin, key, f"speeds of {kind or 'a model of unsaid type'} are not computed")
    if config.get("quantization_config"):
        raise _refused(origin, "quantization_config", "speeds of quantized weights are not computed")
    hidden = next((text[key] for key in HIDDEN if text.get(key)), None)
    inner, vocabulary = text.get("intermediate_size"), text.get("vocab_size")
    for key, value in (("hidden_size", hidden), ("intermediate_size", inner), ("vocab_size", vocabulary)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _refused(origin, key, f"{value!r:.40} is not a whole number of 1 or more")
    heads = attention.query_heads(config, origin)
    layers = pair = window = 0
    for layer in shape.layers:
        width = layer.key_dim + layer.value_dim
        layers += hidden * width * (heads + layer.kv_heads) + 3 * hidden * inner  # type: ignore[operator]
        if layer.window is None:
            pair += heads * width
        else:
            window += heads * width * layer.window
    return Weights(layers, hidden * vocabulary, pair, window)  # type: ignore[operator]


def speeds(
    counted: Weights,
    shape: KvShape,
    dtype: str,
    node: SpeedSection,
    efficiency: Efficiency,
    link_bytes_per_s: float,
) -> Speeds:
    """Any step reads all weights; then it computes, a prompt by its length and a sequence its one token,
    and reads the KV cache of each sequence. Nothing of this overlaps; what does is in the efficiencies.

    Args:
        dtype: of the weights.
    """
    flop_per_s = node.peak_tflop_s * 1e12 * efficiency.prefill
    bytes_per_s = node.memory_gb_s * 1e9 * efficiency.decode
    read_s = (counted.layers + counted.head) * DTYPES[dtype][0] / bytes_per_s
    prefill = Prefill(
        base_s=read_s,
        per_token_s=FLOP * (counted.layers + counted.attention_window) / flop_per_s,
        per_token2_s=FLOP * counted.attention_pair / 2 / flop_per_s,  # a token looks back on half, on average
    )
    step = Step(
        base_s=read_s,
        per_sequence_s=FLOP * (counted.layers + counted.head) / flop_per_s,
        per_context_token_s=shape.bytes_per_token / bytes_per_s,
    )
    return Speeds(prefill, step, link_bytes_per_s)


def _refused(origin: str, key: str, wrong: str) -> ConfigError:
    mend = f"use a dense decoder: {', '.join(sorted(GATED))}"
    return ConfigError([Problem(origin, key, wrong, mend)])

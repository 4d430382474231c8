"""KV cache arithmetic: bytes per token, block and prompt, from what each layer keeps. No weights, no torch,
no vLLM.

Bytes per token and layer = KV heads x (key + value numbers per head) x bytes per number. MHA, GQA and MQA
differ only in the number of KV heads; MLA keeps one latent vector instead of keys and values. How a config
tells what each layer keeps is in disagglab/kv/attention.py, how vLLM puts it into blocks in
disagglab/kv/layout.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.errors import ConfigError, Problem

SCALE_BYTES = 4  # float32, one a side (key, value), head and token, stored inside the cache by these dtypes
# name: (bytes per number, bytes of scales per side, head and token). fp8 has one scale per layer, which is
# part of the layer and not of the cache (vllm/v1/attention/backends/triton_attn.py: customize_spec).
DTYPES = {
    "float32": (4, 0),
    "bfloat16": (2, 0),
    "float16": (2, 0),
    "fp8": (1, 0),
    "fp8_e4m3": (1, 0),
    "fp8_e5m2": (1, 0),
    "fp8_per_token_head": (1, SCALE_BYTES),
    "int8_per_token_head": (1, SCALE_BYTES),
}


@dataclass(frozen=True)
class Layer:
    """What one layer keeps of one token, on one rank.

    ``key_dim`` and ``value_dim``: numbers per KV head; an MLA layer has one head, whose latent vector is the
    key, and ``value_dim`` 0. ``window``: tokens that the layer looks back, itself included; None: all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV cache for one token in this layer."""
        size, scale = DTYPES[dtype]
        sides = 2 if self.value_dim else 1
        return self.kv_heads * ((self.key_dim + self.value_dim) * size + sides * scale)


@dataclass(frozen=True)
class KvShape:
    """What decides a KV cache's size: the layers that keep one, and its dtype (a key of DTYPES)."""

    layers: tuple[Layer, ...]
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV cache for one token, over all layers."""
        return sum(layer.bytes_per_token(self.dtype) for layer in self.layers)

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes that ``block_size`` tokens keep in all layers together."""
        return block_size * self.bytes_per_token

    def bytes_per_prompt(self, tokens: int, block_size: int) -> int:
        """Bytes of the whole blocks that a prompt occupies when no layer frees what left its window."""
        return blocks(tokens, block_size) * self.bytes_per_block(block_size)

    def on_rank(self, tensor_parallel: int) -> KvShape:
        """The shape on one of ``tensor_parallel`` ranks.

        KV heads are divided; where there are fewer heads than ranks, ranks hold copies (ModelConfig.
        get_num_kv_heads in vllm/config/model.py). An MLA latent is not divided: every rank holds all of it.

        Raises:
            ConfigError: if the KV heads of a layer cannot be divided evenly.
        """
        for layer in self.layers:
            low, high = sorted((layer.kv_heads, tensor_parallel))
            if low < 1 or high % low:
                raise ConfigError(
                    [
                        Problem(
                            "tensor parallel size",
                            str(tensor_parallel),
                            f"does not divide {layer.kv_heads} KV heads evenly",
                            "choose a divisor or a multiple of the number of KV heads",
                        )
                    ]
                )
        shares = (
            dataclasses.replace(layer, kv_heads=max(1, layer.kv_heads // tensor_parallel))
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=tuple(shares))


def blocks(tokens: int, block_size: int) -> int:
    """KV cache blocks that ``tokens`` occupy: ceil(tokens / block_size)."""
    return -(-tokens // block_size)


def reusable_tokens(tokens: int, block_size: int) -> int:
    """Tokens of a prompt that a prefix cache holding all of it contributes: whole blocks, never the last
    token.

    The last token is always computed, for its logits, so a prompt that ends at a block edge reuses one
    block less.
    """
    return (tokens - 1) // block_size * block_size


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what two sequences of token ids begin with, tokens."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def tokens_from_prefill(tokens: int) -> int:
    """Prompt tokens that the decode server counts as taken from prefill.

    vLLM recomputes the last prompt token to get its logits. With one token nothing else is left, so it counts
    as computed locally, although its block has moved.
    """
    return tokens if tokens > 1 else 0


def transfer_time_s(kv_bytes: int, link_bytes_per_s: float, latency_s: float = 0.0) -> float:
    """Time to move ``kv_bytes`` over a link, s: latency + bytes / rate."""
    return latency_s + kv_bytes / link_bytes_per_s

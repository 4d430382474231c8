"""Speeds of one engine that is spread over several nodes by tensor parallelism, from those of a node."""

from __future__ import annotations

from dataclasses import dataclass, replace

from disagglab.kv import attention
from disagglab.kv.attention import HIDDEN, LAYERS, Config
from disagglab.kv.shape import DTYPES
from disagglab.predict.speeds import Prefill, Speeds, Step

# Of a layer's forward pass: one behind attention, one behind the feed-forward part (M. Shoeybi et al.,
# Megatron-LM, arXiv 1909.08053, section 3).
ALL_REDUCES_PER_LAYER = 2


@dataclass(frozen=True)
class AllReduces:
    """What tensor parallelism sends. ``bytes_per_value``: of an activation; ``link_bytes_per_s``: that a rank
    sends and receives at once; ``latency_s``: of one all-reduce, beside its bytes.
    """

    layers: int
    hidden_size: int
    bytes_per_value: int
    link_bytes_per_s: float
    latency_s: float = 0.0

    def step_s(self) -> float:
        """What every step pays, whatever it holds."""
        return ALL_REDUCES_PER_LAYER * self.layers * self.latency_s

    def token_s(self, ranks: int) -> float:
        """What each token of a step adds: a rank of a ring sends 2 (n - 1) / n of the bytes that are reduced
        (P. Patarasuk, X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, J.
        Parallel Distrib. Comput. 69, 2009).
        """
        size = ALL_REDUCES_PER_LAYER * self.layers * self.hidden_size * self.bytes_per_value
        return 2 * (ranks - 1) / ranks * size / self.link_bytes_per_s


def all_reduces(config: Config, dtype: str, link_bytes_per_s: float, latency_s: float = 0.0) -> AllReduces:
    """What a model sends, from its ``config.json``.

    Args:
        dtype: of activations, such as bfloat16.

    Raises:
        KeyError: if the config has no number of layers, or no hidden size.
    """
    text = attention.text_config(config)
    layers, hidden = (next((text[key] for key in keys if text.get(key)), None) for keys in (LAYERS, HIDDEN))
    if layers is None or hidden is None:
        raise KeyError(LAYERS[0] if layers is None else HIDDEN[0])
    return AllReduces(int(layers), int(hidden), DTYPES[dtype][0], link_bytes_per_s, latency_s)


def sharded(speeds: Speeds, ranks: int, reduces: AllReduces, fixed_s: float = 0.0) -> Speeds:
    """Speeds of one engine over ``ranks`` nodes: weights, arithmetic and KV cache are divided by their
    number, and all-reduces come on top; nothing of them overlaps with arithmetic. The gather of the logits is
    left out.

    Args:
        speeds: of one node.
        fixed_s: part of a step's base that is no work on the model (scheduler, launches) and is not divided.

    Raises:
        ValueError: if there is no rank, or the fixed part is more than a base.
    """
    prefill, step = speeds.prefill, speeds.step
    if ranks < 1 or not 0 <= fixed_s <= min(prefill.base_s, step.base_s):
        raise ValueError(
            f"{ranks} ranks, {fixed_s:g} s fixed of bases {prefill.base_s:g} and {step.base_s:g} s"
        )
    if ranks == 1:
        return speeds
    token, every = reduces.token_s(ranks), fixed_s + reduces.step_s()
    return replace(
        speeds,
        prefill=Prefill(
            (prefill.base_s - fixed_s) / ranks + every,
            prefill.per_token_s / ranks + token,
            prefill.per_token2_s / ranks,
        ),
        step=Step(
            (step.base_s - fixed_s) / ranks + every,
            step.per_sequence_s / ranks + token,
            step.per_context_token_s / ranks,
        ),
    )

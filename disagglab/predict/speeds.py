"""What one engine can do: the time of its steps, its link, and what its scheduler lets into a step."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Prefill:
    """Time of a step that computes one prompt and nothing else: base + linear + quadratic in its tokens."""

    base_s: float
    per_token_s: float
    per_token2_s: float = 0.0

    def work_s(self, tokens: int) -> float:
        """What a prompt of so many tokens adds to a step."""
        return self.per_token_s * tokens + self.per_token2_s * tokens * tokens

    def time_s(self, tokens: int, pieces: int = 1) -> float:
        """Time of a prompt of so many tokens alone, cut into so many steps: what it adds to them is the same
        in all, because a piece looks back on those before it; each step has a base.
        """
        return pieces * self.base_s + self.work_s(tokens)


@dataclass(frozen=True)
class Step:
    """Time of one decode step: base, and for each sequence a constant and a part that grows with its
    context.
    """

    base_s: float
    per_sequence_s: float
    per_context_token_s: float = 0.0

    def sequence_s(self, context_tokens: float) -> float:
        """What one more sequence adds to a step."""
        return self.per_sequence_s + self.per_context_token_s * context_tokens

    def time_s(self, batch: float, context_tokens: float) -> float:
        """Time of a step of ``batch`` sequences that have so many tokens behind them."""
        return self.base_s + self.sequence_s(context_tokens) * batch


@dataclass(frozen=True)
class Speeds:
    """What one engine and one link can do.

    ``link_bytes_per_s``, ``link_latency_s``: of a KV transfer. ``request_s``: what a request costs outside
    the engine (client, router, HTTP), in either topology. ``handoff_s``: what passing it from prefill to
    decode costs beside the transfer and the step that follows it.
    """

    prefill: Prefill
    step: Step
    link_bytes_per_s: float
    link_latency_s: float = 0.0
    request_s: float = 0.0
    handoff_s: float = 0.0

    @property
    def mixed_base_s(self) -> float:
        """Base of a step that computes prompt tokens and gives tokens to sequences: not less than that of a
        step without prompt. A long prompt alone hides the time in which weights are read, and so may have a
        lower base; the kernels of decode in the same step do not.
        """
        return max(self.prefill.base_s, self.step.base_s)


@dataclass(frozen=True)
class Limits:
    """What a step of an engine may hold.

    ``step_tokens``: prompt tokens and sequences that decode, together (max-num-batched-tokens); 0: one whole
    prompt, whatever its length, beside any number of sequences. ``sequences``: under way, prompts that were
    begun among them (max-num-seqs); 0: any number.
    """

    step_tokens: int = 0
    sequences: int = 0

    @property
    def most_sequences(self) -> int:
        """Sequences under way; as vLLM demands, not more than a step has tokens for."""
        return min(self.sequences or sys.maxsize, self.step_tokens or sys.maxsize)

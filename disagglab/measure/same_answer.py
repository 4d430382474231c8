"""Whether two greedy answers to one prompt say the same, with the tie policy.

Greedy decoding picks the largest of the log-probabilities. Where the two largest lie closer than what the
dtype rounds, either choice is right and the rest of the text differs. So answers are compared up to their
first divergence, and what decides is the reference's gap between its best two tokens at that position.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagglab.serving.openai import Completion

GAP_NATS = 0.2  # bf16 keeps 8 bits: logits near 16 are rounded to 1/16, and two roundings meet in a gap
EQUAL, TIE, DIFFERENT = "equal", "tie", "different"


@dataclass(frozen=True)
class Agreement:
    """How far an answer follows its reference. ``gap``: nats, the reference's at the first divergence."""

    outcome: str
    compared: int
    gap: float | None

    def __str__(self) -> str:
        if self.gap is None:
            return f"{self.outcome} over {self.compared} tokens"
        return f"{self.outcome} at token {self.compared}, where the reference's gap is {self.gap:.2f} nat"


def agree(reference: Completion, answer: Completion) -> Agreement:
    """Compare token ids. ``compared``: tokens that are equal, from the first on.

    Raises:
        ValueError: if there is nothing to compare, or the reference has no gaps.
    """
    if not reference.token_ids or len(reference.token_ids) != len(reference.top2_gap):
        raise ValueError("the reference has no tokens, or not one log-probability gap per token")
    for position, gap in enumerate(reference.top2_gap):
        theirs = answer.token_ids[position] if position < len(answer.token_ids) else None
        if theirs != reference.token_ids[position]:
            tied = theirs is not None and gap < GAP_NATS
            return Agreement(TIE if tied else DIFFERENT, position, gap)
    same_length = len(answer.token_ids) == len(reference.token_ids)
    return Agreement(EQUAL if same_length else DIFFERENT, len(reference.token_ids), None)

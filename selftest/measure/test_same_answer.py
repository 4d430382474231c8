"""The tie policy: what counts as the same answer, decided on made-up answers."""

from __future__ import annotations

import pytest

from disagglab.measure.same_answer import DIFFERENT, EQUAL, GAP_NATS, TIE, agree
from disagglab.serving.openai import Completion

WIDE, NEAR = GAP_NATS, GAP_NATS - 0.01


def answer(tokens: tuple[int, ...], gaps: tuple[float, ...] = ()) -> Completion:
    """An answer of these tokens; nothing else of it matters here."""
    return Completion("", tokens, gaps, 5, len(tokens), 0.1, 0.2, ())


def test_equal_answers() -> None:
    """All tokens equal: gaps do not matter."""
    found = agree(answer((1, 2, 3), (NEAR, WIDE, NEAR)), answer((1, 2, 3)))
    assert (found.outcome, found.compared, found.gap) == (EQUAL, 3, None)
    assert str(found) == "equal over 3 tokens"


def test_a_divergence_at_a_near_tie_is_a_tie() -> None:
    """Where the reference hardly prefers its token, the answer may take the other; there it ends."""
    found = agree(answer((1, 2, 3), (WIDE, NEAR, WIDE)), answer((1, 9, 8)))
    assert (found.outcome, found.compared, found.gap) == (TIE, 1, NEAR)


def test_a_divergence_at_a_wide_gap_is_a_difference() -> None:
    """At the limit itself the gap counts as wide."""
    found = agree(answer((1, 2, 3), (NEAR, WIDE, NEAR)), answer((1, 9, 3)))
    assert (found.outcome, found.compared, found.gap) == (DIFFERENT, 1, WIDE)
    assert "at token 1" in str(found)


def test_a_near_tie_elsewhere_excuses_nothing() -> None:
    """What counts is the gap at the first divergence, not the smallest one of the answer."""
    assert agree(answer((1, 2, 3), (NEAR, NEAR, WIDE)), answer((1, 2, 9))).outcome == DIFFERENT


@pytest.mark.parametrize("tokens", [(1, 2), (1, 2, 3, 4), ()])
def test_another_length_is_a_difference(tokens: tuple[int, ...]) -> None:
    """An answer that ends early or late is none of the reference's, tie or not."""
    assert agree(answer((1, 2, 3), (NEAR, NEAR, NEAR)), answer(tokens)).outcome == DIFFERENT


@pytest.mark.parametrize(("tokens", "gaps"), [((), ()), ((1, 2), ()), ((1, 2), (WIDE,))])
def test_a_reference_that_cannot_tell_is_refused(tokens: tuple[int, ...], gaps: tuple[float, ...]) -> None:
    """No tokens, or fewer gaps than tokens: comparing would prove nothing."""
    with pytest.raises(ValueError, match="reference"):
        agree(answer(tokens, gaps), answer(tokens))

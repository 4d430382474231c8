"""Dialogues: text for enough people, what their prompts have in common, order, and stand-in answers.

Token counts are those of SmolLM2's tokenizer where a converted model lies in the cache; a tokenizer of words
stands in for it elsewhere.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import platformdirs
import pytest

from disagglab.config.traffic import Dialogue, Messages, chat, dialogue, sketch, stand_in
from disagglab.errors import InvalidRun

NONCE = "Case 3f2a91c4"
BLOCK = 16  # tokens; the smallest KV cache block of vLLM
CACHE = Path(os.environ.get("DISAGGLAB_CACHE") or platformdirs.user_cache_dir("disagglab"))


def made(conversations: int = 12, turns: int = 6, **other: Any) -> Dialogue:
    """A dialogue, as large as there is text for."""
    given = {"shared_system": False, "nonce": NONCE, "seed": 1, "output_tokens": 16, **other}
    return dialogue(conversations, turns, **given)


class Words:
    """A tokenizer of words. ``template``: begins an answer, ends a message."""

    def __init__(self, *, split: Sequence[str] = ()) -> None:
        self.known: dict[str, int] = {}
        self.split = split

    def __call__(self, messages: Messages) -> list[int]:
        text = "".join(f"<s>{message['role']} {message['content']}<e>" for message in messages)
        pieces = re.findall(r"<s>\w+|<e>|[^\s<>]+", text + "<s>assistant")
        return [
            self.known.setdefault(part, len(self.known))
            for piece in pieces
            for part in ([piece[:1], piece[1:]] if piece in self.split else [piece])
        ]


@pytest.fixture(scope="module")
def smollm() -> Callable[[Messages], list[int]]:
    """The embedded lab's tokenizer and chat template."""
    folder = next(iter(sorted(CACHE.glob("models/SmolLM2-135M-Instruct-*/tokenizer.json"))), None)
    if folder is None:
        pytest.skip("no-model: the embedded lab's model is not in the cache; any run of the lab makes it")
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder))
    template = jinja2.Template(folder.with_name("chat_template.jinja").read_text())

    def tokenize(messages: Messages) -> list[int]:
        text = template.render(messages=messages, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return tokenize


def test_every_person_says_something_else() -> None:
    """Twelve people of six turns; no message twice, and every system prompt begins with the nonce."""
    found = made()
    messages = [message for said in found.messages for message in said]
    assert (len(found.messages), len(messages), len(set(messages))) == (12, 72, 72)
    assert len(set(found.systems)) == 12
    assert len(set(made(shared_system=True).systems)) == 1
    assert all(system.startswith(NONCE) for system in (*found.systems, *made(shared_system=True).systems))


def test_lengths_of_the_embedded_lab(smollm: Callable[[Messages], list[int]]) -> None:
    """A message has 55 to 65 tokens, a system prompt about 205 with its place in the template."""
    empty = len(smollm([{"role": "system", "content": ""}]))
    for shared in (False, True):
        for system in made(shared_system=shared).systems:
            assert 195 <= len(smollm([{"role": "system", "content": system}])) - empty <= 210
    for message in (message for said in made().messages for message in said):
        before = {"role": "system", "content": ""}
        length = len(smollm([before, {"role": "user", "content": message}]))
        assert 55 <= length - len(smollm([before, {"role": "user", "content": ""}])) <= 65, message


def test_system_prompts_share_all_or_no_block(smollm: Callable[[Messages], list[int]]) -> None:
    """Shared: all of it. Each its own: they part within the first block, as do two nonces."""
    own, shared = made(), made(shared_system=True)
    other = made(shared_system=True, nonce="Case 77b0de15")
    first = [tuple(smollm(chat(own, number, 0, []))[:BLOCK]) for number in range(12)]
    assert len(set(first)) == 12
    prompts = [smollm(chat(shared, number, 0, [])) for number in range(12)]
    assert len({tuple(prompt[:195]) for prompt in prompts}) == 1
    assert smollm(chat(other, 0, 0, []))[:BLOCK] != prompts[0][:BLOCK]
    assert len({tuple(prompt[:224]) for prompt in prompts}) == 12, "users say different things from the start"


def test_each_round_is_a_new_shuffle() -> None:
    """Every conversation once a round, in another order than before; the seed and nothing else decides."""
    found = made(10, 5)
    rounds = [found.order[at : at + 10] for at in range(0, 50, 10)]
    for turn, places in enumerate(rounds):
        assert sorted(places) == [(number, turn) for number in range(10)]
    assert len({tuple(number for number, _ in places) for places in rounds}) == 5
    assert made(10, 5).order == found.order == made(10, 5, nonce="other", shared_system=True).order
    assert made(10, 5, seed=2).order != found.order


def test_the_nonce_names_the_dialogue() -> None:
    """So that two dialogues have no session id in common."""
    assert (made().name, made(nonce="Desk 77b0de").name) == ("Case-3f2a91c4", "Desk-77b0de")


def test_a_chat_holds_the_history() -> None:
    """System prompt, then message and answer by turns, then the message to be answered."""
    two = Dialogue(("sys",), (("one", "two"),), ((0, 0), (0, 1)), 4, "x")
    assert chat(two, 0, 0, []) == [{"role": "system", "content": "sys"}, {"role": "user", "content": "one"}]
    assert chat(two, 0, 1, ["yes?"])[2:] == [
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "two"},
    ]
    with pytest.raises(ValueError, match="turn 1: 0 answers for 1 turns"):
        chat(two, 0, 1, [])


@pytest.mark.parametrize("output_tokens", [1, 2, 16, 33])
def test_a_sketch_is_what_would_be_sent(smollm: Callable[[Messages], list[int]], output_tokens: int) -> None:
    """With the real tokenizer: a row a request; each prompt begins with the last one and its answer."""
    found = made(3, 4, output_tokens=output_tokens)
    rows = sketch(found, smollm)
    assert [(row.conversation, row.turn) for row in rows] == list(found.order)
    assert all(len(row.output_ids) == output_tokens for row in rows)
    for number in range(3):
        turns = [row for row in rows if row.conversation == number]
        for before, after in itertools.pairwise(turns):
            computed = before.prompt_ids + before.output_ids
            assert after.prompt_ids[: len(computed)] == computed
            assert after.prompt_ids[len(computed)] == 2, "<|im_end|> follows: the answer is no longer"


def test_a_stand_in_has_the_length_asked_for() -> None:
    """Words that are cut into two tokens are passed over, for one token asked for as well."""
    for wanted in (1, 2, 5):
        words = Words(split=["yes", "the"])
        answer, ids = stand_in(made(1, 1, output_tokens=wanted), words)
        assert answer == " ".join(["a"] * wanted)
        assert ids == (words.known["a"],) * wanted


def test_no_stand_in_is_told() -> None:
    """A tokenizer that cuts every word, and a template that rewrites what it made before."""
    cut = Words(split=["yes", "the", "a", "no", "and", "on"])
    cut.known.update({"": 0})
    with pytest.raises(InvalidRun, match="no stand-in for an answer of 4 tokens"):
        stand_in(made(1, 1, output_tokens=4), lambda messages: [len(messages), *cut(messages)])
    words = Words()
    with pytest.raises(InvalidRun, match="leave earlier messages as they are"):
        stand_in(made(1, 1, output_tokens=4), lambda messages: [len(messages), *words(messages)])


@pytest.mark.parametrize(("conversations", "turns"), [(0, 1), (13, 1), (1, 0), (1, 7)])
def test_more_than_there_is_text_for_is_refused(conversations: int, turns: int) -> None:
    """No text is used twice: conversations would share blocks that the forecast does not expect."""
    with pytest.raises(ValueError, match="there is text for 1 to 12 of 1 to 6"):
        made(conversations, turns)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a turn twice": ({"order": ((0, 0), (0, 0))}, "every turn once"),
    "turns the wrong way round": ({"order": ((0, 1), (0, 0))}, "every turn once"),
    "a turn too few": ({"order": ((0, 0),)}, "every turn once"),
    "a system prompt too many": ({"systems": ("s", "s")}, "2 system prompts for 1"),
    "nothing said": ({"messages": ((),)}, "a message in each"),
    "nobody": ({"systems": (), "messages": (), "order": ()}, "needs conversations"),
    "no answer": ({"output_tokens": 0}, "answers of a token"),
    "no name": ({"name": ""}, "no word of ASCII"),
    "a name of two words": ({"name": "Desk 1"}, "no word of ASCII"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_dialogue_that_cannot_be_held_is_refused(bad: str) -> None:
    """Each rule on its own."""
    change, message = BAD[bad]
    good: dict[str, Any] = {
        "systems": ("s",),
        "messages": (("one", "two"),),
        "order": ((0, 0), (0, 1)),
        "output_tokens": 2,
        "name": "Desk-1",
    }
    Dialogue(**good)
    with pytest.raises(ValueError, match=message):
        Dialogue(**{**good, **change})

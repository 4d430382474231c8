"""What several people say to one service, over several turns each, and in which order they say it.

The text is real (config/dialogues.toml): twelve sites ask a systems support desk. Every conversation
begins with a system prompt, the same for all or each site's own, so that a prefix cache can share it or not.

:func:`sketch` gives the prompts in token ids before anything ran, with stand-ins for the answers; a forecast
of the cache's hits needs lengths and what prompts have in common, not the words of an answer.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from disagglab.errors import InvalidRun
from disagglab.kv.prefixcache import Request

TEXTS = Path(__file__).with_name("dialogues.toml")
STAND_INS = ("yes", "the", "a", "no", "and", "on")  # short words; most tokenizers have one token for each

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Dialogue:
    """What is said to a service. Conversations and turns count from 0.

    ``systems``: the system prompt of each conversation. ``messages``: what its user says, by turn.
    ``order``: (conversation, turn) of every request, as they are to be sent. ``output_tokens``: how long each
    answer has to be. ``name``: of this dialogue, without blanks; headers name a conversation by it.

    Raises:
        ValueError: if nothing is said, an answer is to have no token, there is not one system prompt a
            conversation, ``order`` does not hold every turn once and those of a conversation in order, or the
            name cannot stand in a header.
    """

    systems: tuple[str, ...]
    messages: tuple[tuple[str, ...], ...]
    order: tuple[tuple[int, int], ...]
    output_tokens: int
    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-~]+", self.name):
            raise ValueError(f"a dialogue's name goes into a header: {self.name!r} is no word of ASCII")
        if not all(self.messages) or not self.messages or self.output_tokens < 1:
            raise ValueError(
                "a dialogue needs conversations, a message in each, and answers of a token or more"
            )
        if len(self.systems) != len(self.messages):
            raise ValueError(f"{len(self.systems)} system prompts for {len(self.messages)} conversations")
        every = [(number, turn) for number, said in enumerate(self.messages) for turn in range(len(said))]
        # a stable sort by conversation leaves the turns of each as they are ordered
        if sorted(self.order, key=lambda place: place[0]) != every:
            raise ValueError("order has to hold every turn once, and the turns of a conversation in order")


def dialogue(
    conversations: int, turns: int, *, shared_system: bool, nonce: str, seed: int, output_tokens: int
) -> Dialogue:
    """As many conversations of ``turns`` turns each.

    The order goes round by round: every conversation's first turn, then every second one. Each round is
    shuffled anew, because in a fixed order a router that takes its servers in turns would serve each
    conversation by the same server whenever the numbers divide.

    Args:
        shared_system: one system prompt for all. Else each names its own site right after the nonce, so that
            no two have a KV cache block in common; keep the nonce to a few words for that.
        nonce: the first words of every system prompt; another one shares no block with this one. With
            hyphens for blanks it is the dialogue's name.
        seed: of the order alone. The texts are always the same.

    Raises:
        ValueError: if there is no text for so many conversations or turns, or none is asked for.
    """
    texts = _texts()
    sites = texts["site"]
    most = min(len(site["messages"]) for site in sites)
    if not (1 <= conversations <= len(sites) and 1 <= turns <= most):
        raise ValueError(
            f"{conversations} conversations of {turns} turns: there is text for 1 to {len(sites)} of 1 to"
            f" {most}"
        )
    chosen = sites[:conversations]
    systems = [
        f"{nonce}. {place['name']}, {place['address']}. {texts['instructions']}"
        for place in ([texts["shared"]] * conversations if shared_system else chosen)
    ]
    shuffled = random.Random(seed)
    order: list[tuple[int, int]] = []
    for turn in range(turns):
        order += [(number, turn) for number in shuffled.sample(range(conversations), conversations)]
    said = tuple(tuple(site["messages"][:turns]) for site in chosen)
    return Dialogue(tuple(systems), said, tuple(order), output_tokens, "-".join(nonce.split()))


@cache
def _texts() -> dict[str, Any]:
    return tomllib.loads(TEXTS.read_text(encoding="utf-8"))


def chat(dialogue: Dialogue, conversation: int, turn: int, answers: Sequence[str]) -> Messages:
    """The messages (role, content) of one request: system prompt, history with its answers, what comes next.

    Args:
        answers: to the conversation's turns before this one.

    Raises:
        ValueError: if there is not one answer for each earlier turn.
    """
    said = dialogue.messages[conversation]
    if len(answers) != turn:
        raise ValueError(f"conversation {conversation}, turn {turn}: {len(answers)} answers for {turn} turns")
    messages = [{"role": "system", "content": dialogue.systems[conversation]}]
    for message, answer in zip(said, answers, strict=False):
        messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": said[turn]}]


def sketch(dialogue: Dialogue, tokenize: Callable[[Messages], Sequence[int]]) -> list[Request]:
    """The requests in the order of ``dialogue.order``, every answer a stand-in of ``output_tokens`` tokens.

    Args:
        tokenize: messages to the ids of the prompt that asks for an answer to them, such as
            :func:`disagglab.serving.openai.tokenize_chat` of a server.

    Raises:
        InvalidRun: see :func:`stand_in`.
    """
    answer, output_ids = stand_in(dialogue, tokenize)
    return [
        Request(number, turn, tuple(tokenize(chat(dialogue, number, turn, [answer] * turn))), output_ids)
        for number, turn in dialogue.order
    ]


def stand_in(
    dialogue: Dialogue, tokenize: Callable[[Messages], Sequence[int]]
) -> tuple[str, tuple[int, ...]]:
    """A text that is exactly ``output_tokens`` tokens long within a chat, and these tokens.

    It is one word, repeated. Checked on the first conversation with one word, two words and all of them: the
    prompt of a second turn has to begin with that of the first, and what follows after a token for each word
    has to be the same for all three.

    Raises:
        InvalidRun: if no word does, or the chat template does not append to what it made before.
    """
    wanted = dialogue.output_tokens
    first = chat(dialogue, 0, 0, [])
    prompt = tuple(tokenize(first))
    for word in STAND_INS:
        rests: set[tuple[int, ...]] = set()
        for length in (1, 2, wanted):
            answer = " ".join([word] * length)
            ids = tuple(tokenize([*first, {"role": "assistant", "content": answer}, first[-1]]))
            rests.add(ids[len(prompt) + length :] if ids[: len(prompt)] == prompt else ())
        if len(rests) == 1 and rests != {()}:
            return answer, ids[len(prompt) : len(prompt) + wanted]
    raise InvalidRun(
        f"no stand-in for an answer of {wanted} tokens: tried {', '.join(STAND_INS)}; one of them has to"
        " be one token, and the chat template has to leave earlier messages as they are"
    )

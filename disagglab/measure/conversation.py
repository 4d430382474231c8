"""Conversations: several at once, each turn's prompt the whole history and the next message.

``vllm bench serve`` cannot do this: what a turn sends depends on what the server said before. The history
holds the real answers. A conversation of text goes through the model's chat template
(``/v1/chat/completions``); one of token ids is appended id by id (``/v1/completions``), so that its prompts
are known exactly. One turn each makes a closed loop of independent requests.

Times are those of docs/reference/metrics.md, taken by the parser of serving/openai.py. They are as good as
the event loop is punctual, so its lag and the CPU share of the process are watched meanwhile
(measure/client_lag.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from disagglab.errors import InvalidRun
from disagglab.kv.shape import common_prefix, reusable_tokens
from disagglab.measure.client_lag import LoopLag
from disagglab.results.records import ClientLoad
from disagglab.serving.openai import CHAT, COMPLETIONS, TIMEOUT, Completion, complete_beside_others

Message = str | tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """What one user says, turn by turn, and how long every answer has to be, in tokens.

    ``says``: all text, or all token ids. ``extra``: keys that every request of this conversation carries
    besides, such as ``cache_salt``.

    Raises:
        ValueError: if nothing is said, or text and token ids are mixed.
    """

    says: tuple[Message, ...]
    output_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({isinstance(message, str) for message in self.says}) != 1 or not all(self.says):
            raise ValueError(
                "a conversation needs messages, none of them empty, all of text or all of token ids"
            )


@dataclass(frozen=True, kw_only=True)
class Turn(Completion):
    """One answer within a run. ``conversation`` and ``turn`` count from 0.

    ``start_s``: when the request was sent, from the beginning of the run.
    """

    conversation: int
    turn: int
    start_s: float


@dataclass(frozen=True)
class Transcript:
    """All turns of a run, by conversation and turn, and how long it took.

    ``client``: how busy the client was meanwhile; None where the run was too short to tell.
    """

    turns: tuple[Turn, ...]
    duration_s: float
    client: ClientLoad | None

    def of(self, conversation: int) -> tuple[Turn, ...]:
        """The turns of one conversation, in order."""
        return tuple(turn for turn in self.turns if turn.conversation == conversation)


def exact_request(model: str, output_tokens: int) -> dict[str, Any]:
    """What every request holds besides its prompt: greedy, exactly so many tokens, with their ids."""
    return {
        "model": model,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def request_of(model: str, conversation: Conversation, answers: Sequence[Completion]) -> tuple[str, Any]:
    """Path and body of the turn that follows ``answers``."""
    said = conversation.says[: len(answers) + 1]
    request = exact_request(model, conversation.output_tokens)
    if isinstance(said[0], str):
        messages: list[dict[str, Message]] = [{"role": "user", "content": said[0]}]
        for answer, message in zip(answers, said[1:], strict=True):
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": message}]
        return CHAT, {**request, "messages": messages, **conversation.extra}
    prompt = list(said[0])
    for answer, message in zip(answers, said[1:], strict=True):
        prompt += [*answer.token_ids, *message]
    return COMPLETIONS, {**request, "prompt": prompt, **conversation.extra}


def held_tokens(turns: Sequence[Turn], block_size: int) -> tuple[int, ...]:
    """Prompt tokens of each turn that a prefix cache finds, which holds this conversation's earlier turns.

    It keeps whole blocks of what was computed: an earlier prompt and its answer, without the answer's last
    token, which was sampled and never computed. Of a new prompt it finds the whole blocks of what both begin
    with, and never the last token. Compared are token ids, because a text that is sent back may be cut into
    other tokens than it was generated in, and comes back without special tokens.

    Args:
        turns: the turns of one conversation, in order.

    Raises:
        InvalidRun: if the server did not give the token ids.
    """
    found: list[int] = []
    kept: list[tuple[int, ...]] = []
    for turn in turns:
        if len(turn.prompt_ids) != turn.prompt_tokens or len(turn.token_ids) != turn.output_tokens:
            raise InvalidRun(
                f"conversation {turn.conversation}, turn {turn.turn}: {len(turn.prompt_ids)} ids of"
                f" {turn.prompt_tokens} prompt tokens and {len(turn.token_ids)} of {turn.output_tokens}"
                " output tokens came back; leave return_token_ids on"
            )
        common = max((common_prefix(turn.prompt_ids, earlier) for earlier in kept), default=0)
        found.append(min(common // block_size * block_size, reusable_tokens(turn.prompt_tokens, block_size)))
        kept.append(turn.prompt_ids + turn.token_ids[:-1])
    return tuple(found)


def converse(
    url: str, model: str, conversations: Sequence[Conversation], concurrency: int | None = None
) -> Transcript:
    """Hold all conversations with the server at ``url``.

    Args:
        concurrency: conversations under way at once; as soon as one is over the next begins. All by default.

    Raises:
        InvalidRun: if there is no conversation; if a turn fails or its answer has another length than asked
            for, with its conversation and turn. The others are broken off then.
    """
    if not conversations:
        raise InvalidRun("there is no conversation to hold")
    return asyncio.run(_hold_all(url, model, conversations, concurrency or len(conversations)))


async def _hold_all(
    url: str, model: str, conversations: Sequence[Conversation], concurrency: int
) -> Transcript:
    turns: list[Turn] = []
    waiting = iter(enumerate(conversations))  # shared: whoever is free takes the next
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as sender, LoopLag().watch() as lag:
        start = time.perf_counter()

        async def hold(left: Iterator[tuple[int, Conversation]]) -> None:
            for number, conversation in left:
                answers: list[Completion] = []
                while len(answers) < len(conversation.says):
                    sent = time.perf_counter() - start
                    try:
                        answer = await _next_answer(sender, url, model, conversation, answers)
                    except InvalidRun as error:
                        raise InvalidRun(f"conversation {number}, turn {len(answers)}: {error}") from error
                    turns.append(Turn(conversation=number, turn=len(answers), start_s=sent, **vars(answer)))
                    answers.append(answer)

        try:
            async with asyncio.TaskGroup() as users:
                for _ in range(min(concurrency, len(conversations))):
                    users.create_task(hold(waiting))
        except ExceptionGroup as failed:
            raise failed.exceptions[0]  # noqa: B904 - the first failure broke the others off; it has its cause
        end = time.perf_counter()
    turns.sort(key=lambda turn: (turn.conversation, turn.turn))
    return Transcript(tuple(turns), end - start, lag.between(start, end))


async def exact_answer(
    sender: httpx.AsyncClient,
    url: str,
    path: str,
    request: Mapping[str, Any],
    output_tokens: int,
    headers: Mapping[str, str] | None = None,
) -> Completion:
    """The answer to one request among others, of exactly ``output_tokens`` tokens.

    Raises:
        InvalidRun: if it fails or has another length.
    """
    answer = await complete_beside_others(sender, url, path, request, headers)
    if answer.output_tokens != output_tokens:
        raise InvalidRun(
            f"{url}: an answer of {answer.output_tokens} tokens, {output_tokens} were asked for; is"
            " ignore_eos passed on, and does the prompt leave room in max_model_len?"
        )
    return answer


async def _next_answer(
    sender: httpx.AsyncClient,
    url: str,
    model: str,
    conversation: Conversation,
    answers: Sequence[Completion],
) -> Completion:
    path, request = request_of(model, conversation, answers)
    asked = conversation.output_tokens
    answer = await exact_answer(sender, url, path, request, asked)
    more = len(answers) + 1 < len(conversation.says)
    if path == COMPLETIONS and more and len(answer.token_ids) != asked:
        raise InvalidRun(
            f"{url}: {len(answer.token_ids)} token ids for an answer of {asked}; the next prompt needs all of"
            " them: leave return_token_ids on"
        )
    return answer

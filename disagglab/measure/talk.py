"""Holds a dialogue with a service, request by request in its order; an error is data and not the end.

Unlike measure/conversation.py, where each user goes on as soon as an answer is there, the order of the
requests is given, since what a cache still holds depends on it. A place is given, as soon as it is free, to
the first request in the order whose conversation has none under way. So one that waits for its own
conversation's earlier turn lets those behind it pass, and with one place the order is exact.

Times are those of docs/reference/metrics.md, as in disagglab/measure/conversation.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from disagglab.config.traffic import Dialogue, chat
from disagglab.errors import InvalidRun
from disagglab.measure.client_lag import LoopLag
from disagglab.measure.conversation import Turn, exact_answer, exact_request
from disagglab.predict.strategies import SESSION_HEADER
from disagglab.results.records import ClientLoad
from disagglab.serving.openai import CHAT, TIMEOUT


@dataclass(frozen=True, kw_only=True)
class Spoken(Turn):
    """One answer. ``server``: who gave it, where ``served_by`` was asked."""

    server: str | None = None


@dataclass(frozen=True)
class Failure:
    """A request without a good answer. ``start_s``: when it was sent, from the beginning of the run."""

    conversation: int
    turn: int
    start_s: float
    what: str


@dataclass(frozen=True)
class Talk:
    """What came of a dialogue: the answers and the failures, each in the order in which they were sent.

    ``client``: how busy the client was meanwhile; None where the run was too short to tell.
    """

    turns: tuple[Spoken, ...]
    failures: tuple[Failure, ...]
    duration_s: float
    client: ClientLoad | None

    def of(self, conversation: int) -> tuple[Spoken, ...]:
        """The answered turns of one conversation, in order."""
        return tuple(turn for turn in self.turns if turn.conversation == conversation)


def session_id(dialogue: Dialogue, conversation: int) -> str:
    """What names a conversation in the header ``X-Session-ID``: another one in each dialogue.

    A hash puts equal names on equal servers, so with the same names each dialogue would have the same split
    of conversations between servers, and its rounds would be no replicates.
    """
    return f"{dialogue.name}-{conversation}"


def talk(
    url: str,
    model: str,
    dialogue: Dialogue,
    *,
    session_header: bool = False,
    concurrency: int = 1,
    served_by: Callable[[], str | None] | None = None,
    ids: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Talk:
    """Hold ``dialogue`` with the service at ``url``, through ``/v1/chat/completions``.

    An answer that is not 200, breaks off, holds an error or has another length is a :class:`Failure`. It ends
    its conversation, whose later turns are not sent; the others go on.

    Args:
        session_header: name the conversation of each request in a header.
        concurrency: most requests under way at once.
        served_by: asked after each answer, before the next request is sent, which server gave it. It may
            block; it is called in a thread, outside of the answer's times. What it raises ends the talk.
        ids: ask for token ids. A server that knows no ``return_token_ids`` may refuse the key.
        extra: keys that every request carries besides; they win over those it has.

    Raises:
        ValueError: if ``concurrency`` is below 1, or above it where ``served_by`` is given: which of several
            answers a server gave cannot be told then.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency {concurrency}: at least one request has to be under way")
    if served_by is not None and concurrency > 1:
        raise ValueError(f"served_by tells servers apart at concurrency 1 alone, this is {concurrency}")
    request = exact_request(model, dialogue.output_tokens)
    if not ids:
        del request["return_token_ids"]
    speaker = _Speaker(url, dialogue, {**request, **(extra or {})}, session_header, served_by)
    return asyncio.run(speaker.hold(concurrency))


@dataclass
class _Speaker:
    """One run. ``answers``: text by conversation; ``turns`` and ``failures`` as they come in."""

    url: str
    dialogue: Dialogue
    request: Mapping[str, Any]
    session_header: bool
    served_by: Callable[[], str | None] | None
    answers: dict[int, list[str]] = field(default_factory=dict)
    turns: list[Spoken] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    async def hold(self, places: int) -> Talk:
        limits = httpx.Limits(max_connections=places, max_keepalive_connections=places)
        async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as sender, LoopLag().watch() as lag:
            start = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as requests:
                    await self._in_order(sender, start, places, requests)
            except ExceptionGroup as failed:
                raise failed.exceptions[0]  # noqa: B904 - what served_by raised; it has its own cause
            end = time.perf_counter()
        self.turns.sort(key=lambda turn: turn.start_s)
        self.failures.sort(key=lambda failure: failure.start_s)
        return Talk(tuple(self.turns), tuple(self.failures), end - start, lag.between(start, end))

    async def _in_order(
        self, sender: httpx.AsyncClient, start: float, places: int, requests: asyncio.TaskGroup
    ) -> None:
        waiting = list(self.dialogue.order)
        under_way: dict[asyncio.Task[None], int] = {}
        while waiting or under_way:
            ended = {failure.conversation for failure in self.failures}
            waiting = [place for place in waiting if place[0] not in ended]
            while len(under_way) < places:
                busy = set(under_way.values())
                following = next((place for place in waiting if place[0] not in busy), None)
                if following is None:
                    break
                waiting.remove(following)
                task = requests.create_task(self._speak(sender, start, *following))
                under_way[task] = following[0]
            if under_way:
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del under_way[task]

    async def _speak(self, sender: httpx.AsyncClient, start: float, conversation: int, turn: int) -> None:
        """One request: its answer goes to ``turns``, what is wrong with it to ``failures``."""
        answers = self.answers.setdefault(conversation, [])
        request = {"messages": chat(self.dialogue, conversation, turn, answers), **self.request}
        name = session_id(self.dialogue, conversation)
        headers = {SESSION_HEADER: name} if self.session_header else None
        asked = self.dialogue.output_tokens
        sent = time.perf_counter() - start
        try:
            answer = await exact_answer(sender, self.url, CHAT, request, asked, headers)
        except InvalidRun as error:
            self.failures.append(Failure(conversation, turn, sent, str(error)))
            return
        server = await asyncio.to_thread(self.served_by) if self.served_by else None
        answers.append(answer.text)
        self.turns.append(
            Spoken(conversation=conversation, turn=turn, start_s=sent, server=server, **vars(answer))
        )

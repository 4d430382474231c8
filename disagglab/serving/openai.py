"""A small streaming client for what the load engine cannot do: single requests, token ids, the handshake by
hand. disagglab/measure/conversation.py holds conversations with it.

Times follow docs/reference/metrics.md: TTFT from just before the request is sent to the first chunk with a
choice, chunk gaps between such chunks, end to end to the last of them. The HTTP client is made before that.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from disagglab.errors import InvalidRun, TransferError
from disagglab.serving.http import NO_AUTHORITIES

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TIMEOUT = httpx.Timeout(300.0, connect=10.0)  # a slow hour may stretch one request to minutes
REMOTE_DECODE: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True)
class Completion:
    """One answer. Seconds from just before the request was sent; ``gaps_s`` between chunks with a choice.

    ``top2_gap``: by position, log-probability of the chosen token minus that of the best other one (nats).
    ``cached_tokens``: of the prompt, as the server says; None where it does not say. ``prompt_ids``: the
    prompt as the server saw it, where the request asked for token ids.
    """

    text: str
    token_ids: tuple[int, ...]
    top2_gap: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    e2e_s: float
    gaps_s: tuple[float, ...]
    cached_tokens: int | None = None
    prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Handshake:
    """What a prefill server answered: where its KV blocks lie, and how long its part took (s)."""

    kv_transfer_params: dict[str, Any]
    prefill_s: float


class AnswerStream:
    """One streamed answer as it arrives: bytes and the times of their arrival in, a :class:`Completion` out.

    Events are split at newlines alone, because text may hold characters that also count as line ends
    elsewhere. A chat begins with an event that names a role and carries no token; it is no chunk.

    Args:
        url: whom messages blame.
        start_s: the clock just before the request was sent.
    """

    def __init__(self, url: str, start_s: float) -> None:
        self._url = url
        self._start_s = start_s
        self._rest = b""
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._prompt_ids: list[int] = []
        self._top2: list[float] = []
        self._times: list[float] = []
        self._usage: dict[str, Any] | None = None

    def feed(self, data: bytes, now_s: float) -> None:
        """Take what arrived at ``now_s``.

        Raises:
            InvalidRun: if it holds an error, or something else than JSON.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = line.strip().removeprefix(b"data:").strip()
            if line.startswith(b"data:") and event != b"[DONE]":
                self._take(event, now_s)

    def _take(self, event: bytes, now_s: float) -> None:
        try:
            chunk = json.loads(event)
        except ValueError as error:
            raise InvalidRun(f"{self._url} sent an event that is no JSON: {event[:300]!r}") from error
        if "error" in chunk:
            raise InvalidRun(f"{self._url} sent an error inside the stream: {chunk['error']}")
        if "choices" not in chunk:
            raise InvalidRun(f"{self._url} sent an event without choices: {event[:300]!r}")
        self._usage = chunk.get("usage") or self._usage
        self._prompt_ids.extend(chunk.get("prompt_token_ids") or [])
        extension = chunk.get("nvext") or {}  # where Dynamo's frontend puts token ids
        self._prompt_ids.extend(extension.get("prompt_token_ids") or [])
        self._ids.extend(extension.get("completion_token_ids") or [])
        for choice in chunk["choices"]:
            self._prompt_ids.extend(choice.get("prompt_token_ids") or [])
            ids = choice.get("token_ids") or []
            delta = choice.get("delta")
            text = (choice["text"] if delta is None else delta.get("content")) or ""
            if delta is not None and delta.get("role") and not text and not ids:
                continue
            self._times.append(now_s)
            self._texts.append(text)
            self._ids.extend(ids)
            if delta is None:
                self._top2.extend(_top2_gaps(choice.get("logprobs")))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Those of the answer that have come so far."""
        return tuple(self._ids)

    def completion(self) -> Completion:
        """The answer, when the stream has ended.

        Raises:
            InvalidRun: if it ended without a token or without usage.
        """
        if self._usage is None or not self._times:
            missing = "usage" if self._times else "any token"
            raise InvalidRun(f"{self._url}: the stream ended without {missing}")
        details = self._usage.get("prompt_tokens_details") or {}
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._ids),
            top2_gap=tuple(self._top2),
            prompt_tokens=self._usage["prompt_tokens"],
            output_tokens=self._usage["completion_tokens"],
            ttft_s=self._times[0] - self._start_s,
            e2e_s=self._times[-1] - self._start_s,
            gaps_s=tuple(late - early for early, late in itertools.pairwise(self._times)),
            cached_tokens=details.get("cached_tokens"),
            prompt_ids=tuple(self._prompt_ids),
        )


def _top2_gaps(logprobs: Mapping[str, Any] | None) -> list[float]:
    if not logprobs:
        return []
    gaps = []
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        others = sorted(top.values(), reverse=True)
        gaps.append(chosen - (others[1] if len(others) > 1 else float("-inf")))
    return gaps


def prompt_of(length: int, salt: int) -> list[int]:
    """Exactly ``length`` token ids that share no KV block with those of another ``salt`` (below 40,000)."""
    return [1000 + salt, *(2000 + position % 997 for position in range(length - 1))]


def body(model: str, prompt: str | list[int], output_tokens: int) -> dict[str, Any]:
    """A greedy completion request of exactly ``output_tokens`` tokens."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
        "return_token_ids": True,
    }


def _streamed(request: Mapping[str, Any]) -> dict[str, Any]:
    return {**request, "stream": True, "stream_options": {"include_usage": True}}


def _refused(url: str, answer: httpx.Response, text: bytes) -> InvalidRun:
    return InvalidRun(f"{url} answered {answer.status_code}: {text.decode(errors='replace')[:500]}")


def _broken(url: str, start_s: float, error: httpx.HTTPError) -> InvalidRun:
    return InvalidRun(f"{url}: the request broke off after {time.perf_counter() - start_s:.1f} s: {error!r}")


def complete(url: str, request: Mapping[str, Any]) -> Completion:
    """Send one streaming completion request.

    Raises:
        InvalidRun: if the answer is not 200, breaks off, or carries no usage.
    """
    payload = _streamed(request)
    with httpx.Client(timeout=TIMEOUT, verify=NO_AUTHORITIES) as sender:
        start = time.perf_counter()
        stream = AnswerStream(url, start)
        try:
            with sender.stream("POST", f"{url}{COMPLETIONS}", json=payload) as answer:
                if answer.status_code != 200:
                    raise _refused(url, answer, answer.read())
                for data in answer.iter_bytes():
                    stream.feed(data, time.perf_counter())
        except httpx.HTTPError as error:
            raise _broken(url, start, error) from error
    return stream.completion()


async def complete_beside_others(
    sender: httpx.AsyncClient,
    url: str,
    path: str,
    request: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Completion:
    """Send one streaming request on an event loop that has other ones under way.

    Args:
        sender: shared with the others, with connections for all of them.
        path: COMPLETIONS or CHAT.
        headers: what the request carries besides, such as the one a router keeps a session by.

    Raises:
        InvalidRun: see :func:`complete`.
    """
    payload = _streamed(request)
    start = time.perf_counter()
    stream = AnswerStream(url, start)
    try:
        async with sender.stream("POST", f"{url}{path}", json=payload, headers=headers) as answer:
            if answer.status_code != 200:
                raise _refused(url, answer, await answer.aread())
            async for data in answer.aiter_bytes():
                stream.feed(data, time.perf_counter())
    except httpx.HTTPError as error:
        raise _broken(url, start, error) from error
    return stream.completion()


def prefill(url: str, request: Mapping[str, Any]) -> Handshake:
    """Ask a prefill server for its part alone: compute the prompt, keep the KV blocks for a remote decode.

    Raises:
        TransferError: if it does not answer with the place of its blocks.
    """
    payload = {**request, "max_tokens": 1, "stream": False, "kv_transfer_params": dict(REMOTE_DECODE)}
    with httpx.Client(timeout=TIMEOUT, verify=NO_AUTHORITIES) as sender:
        start = time.perf_counter()
        answer = sender.post(f"{url}{COMPLETIONS}", json=payload)
        elapsed = time.perf_counter() - start
    params = answer.json().get("kv_transfer_params") if answer.status_code == 200 else None
    if not params or not params.get("remote_block_ids"):
        raise TransferError(f"{url} offered no KV blocks: {answer.status_code} {answer.text[:300]}")
    return Handshake(params, elapsed)


def decode(url: str, request: Mapping[str, Any], handshake: Handshake) -> Completion:
    """Let a decode server fetch the blocks of ``handshake`` and stream the answer."""
    return complete(url, {**request, "kv_transfer_params": handshake.kv_transfer_params})


def tokenize(url: str, model: str, text: str) -> list[int]:
    """Token ids of a text, as the server sees them.

    Raises:
        InvalidRun: if the server does not answer with 200.
    """
    return _tokens(url, {"model": model, "prompt": text})


def tokenize_chat(url: str, model: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the prompt that the server makes of ``messages`` (role, content) and answers.

    Raises:
        InvalidRun: if the server does not answer with 200.
    """
    chat = [dict(message) for message in messages]
    return _tokens(url, {"model": model, "messages": chat, "add_generation_prompt": True})


def _tokens(url: str, request: Mapping[str, Any]) -> list[int]:
    answer = httpx.post(f"{url}/tokenize", json=request, timeout=TIMEOUT, verify=NO_AUTHORITIES)
    if answer.status_code != 200:
        raise InvalidRun(f"{url}/tokenize answered {answer.status_code}: {answer.text[:300]}")
    tokens: list[int] = answer.json()["tokens"]
    return tokens

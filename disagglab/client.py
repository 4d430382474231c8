"""A small streaming client for what the load engine cannot do: single requests, token ids, the handshake by
hand.

Times follow docs/metrics.md: TTFT from just before the request is sent to the first chunk with a choice,
chunk gaps between such chunks, end to end to the last of them.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from disagglab.errors import InvalidRun, TransferError

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
    """

    text: str
    token_ids: tuple[int, ...]
    top2_gap: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    e2e_s: float
    gaps_s: tuple[float, ...]


@dataclass(frozen=True)
class Handshake:
    """What a prefill server answered: where its KV blocks lie, and how long its part took (s)."""

    kv_transfer_params: dict[str, Any]
    prefill_s: float


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


def complete(url: str, request: Mapping[str, Any]) -> Completion:
    """Send one streaming completion request.

    Raises:
        InvalidRun: if the answer is not 200, breaks off, or carries no usage.
    """
    payload = {**request, "stream": True, "stream_options": {"include_usage": True}}
    texts: list[str] = []
    ids: list[int] = []
    gaps: list[float] = []
    times: list[float] = []
    usage: dict[str, int] | None = None
    start = time.perf_counter()
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=payload, timeout=TIMEOUT) as answer:
            if answer.status_code != 200:
                raise InvalidRun(f"{url} answered {answer.status_code}: {answer.read().decode()[:500]}")
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise InvalidRun(f"{url} sent an error inside the stream: {chunk['error']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    times.append(time.perf_counter())
                    texts.append(choice["text"])
                    ids.extend(choice.get("token_ids") or [])
                    gaps.extend(_top2_gaps(choice.get("logprobs")))
    except httpx.HTTPError as error:
        raise InvalidRun(
            f"{url}: the request broke off after {time.perf_counter() - start:.1f} s: {error!r}"
        ) from error
    if usage is None or not times:
        raise InvalidRun(f"{url}: the stream ended without {'usage' if times else 'any token'}")
    return Completion(
        text="".join(texts),
        token_ids=tuple(ids),
        top2_gap=tuple(gaps),
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        ttft_s=times[0] - start,
        e2e_s=times[-1] - start,
        gaps_s=tuple(late - early for early, late in itertools.pairwise(times)),
    )


def _top2_gaps(logprobs: Mapping[str, Any] | None) -> list[float]:
    if not logprobs:
        return []
    gaps = []
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        others = sorted(top.values(), reverse=True)
        gaps.append(chosen - (others[1] if len(others) > 1 else float("-inf")))
    return gaps


def prefill(url: str, request: Mapping[str, Any]) -> Handshake:
    """Ask a prefill server for its part alone: compute the prompt, keep the KV blocks for a remote decode.

    Raises:
        TransferError: if it does not answer with the place of its blocks.
    """
    payload = {**request, "max_tokens": 1, "stream": False, "kv_transfer_params": dict(REMOTE_DECODE)}
    start = time.perf_counter()
    answer = httpx.post(f"{url}/v1/completions", json=payload, timeout=TIMEOUT)
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
    answer = httpx.post(f"{url}/tokenize", json={"model": model, "prompt": text}, timeout=TIMEOUT)
    if answer.status_code != 200:
        raise InvalidRun(f"{url}/tokenize answered {answer.status_code}: {answer.text[:300]}")
    tokens: list[int] = answer.json()["tokens"]
    return tokens

"""What clients see while workers come and go: requests whose failure is data, traffic that does not pause.

A request that breaks off is what these lessons are about, so it is kept as it was seen, with the tokens that
had come and the last event as it was sent. Here everything waits in threads and by HTTP alone; processes are
the business of whoever starts and ends workers meanwhile.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import httpx

from disagglab import waiting
from disagglab.errors import InvalidRun, LabError
from disagglab.serving.dynamo.deployment import DynamoDeployment
from disagglab.serving.dynamo.etcd import Change, EtcdClient
from disagglab.serving.dynamo.parts import body
from disagglab.serving.openai import COMPLETIONS, AnswerStream, Completion, prompt_of
from disagglab.serving.service import POLL_S

TIMEOUT = httpx.Timeout(120.0, connect=10.0)  # longer than any answer here; only a failing test waits so long
KEPT_BYTES = 4096  # of the end of an answer: an error of Dynamo's frontend has 100 bytes
SALTS = 40_000  # of client.prompt_of
PROMPT_TOKENS, ANSWER_TOKENS = 33, 8  # of steady traffic: it has to flow and not to load the machine
PAUSE_S = 0.25  # the same user's, after each answer


@dataclass(frozen=True)
class Attempt:
    """One request as its client saw it. Times: ``time.monotonic()``, s.

    ``status``: of HTTP, 0 without an answer. ``token_ids``: those that came, also where the answer broke off.
    ``completion``: the answer if it is whole; else ``wrong`` says what is not. ``last``: the last event, or
    the body, verbatim.
    """

    sent_s: float
    ended_s: float
    status: int
    token_ids: tuple[int, ...]
    completion: Completion | None
    wrong: str
    last: str


class AskedStream:
    """A streamed request under way, in a thread of its own.

    Args:
        sender: may be shared.
        url: of a frontend.
        request: what :func:`disagglab.serving.dynamo.parts.body` made.
    """

    def __init__(self, sender: httpx.Client, url: str, request: Mapping[str, Any]) -> None:
        self._sender = sender
        self._url = url
        self._request = {**request, "stream": True, "stream_options": {"include_usage": True}}
        self._stream = AnswerStream(url, time.perf_counter())
        self._begun = threading.Event()
        self._found: Attempt | None = None
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> int:
        """How many tokens have come so far."""
        return len(self._stream.token_ids)

    def begun(self, limit_s: float) -> AskedStream:
        """Return when the first token is there.

        Raises:
            InvalidRun: if there is none after ``limit_s``, or the request has ended without one.
        """
        if not self._begun.wait(limit_s) or not self.tokens:
            found = self._found
            raise InvalidRun(
                f"{self._url}: no token after {limit_s:g} s; the request"
                f" {f'ended: {found.status} {found.wrong} {found.last}' if found else 'is under way'}"
            )
        return self

    def attempt(self) -> Attempt:
        """What became of it, when it has ended."""
        self._thread.join()
        assert self._found is not None
        return self._found

    def _send(self) -> None:
        sent_s, status, tail, wrong = time.monotonic(), 0, b"", ""
        completion = None
        try:
            with self._sender.stream("POST", f"{self._url}{COMPLETIONS}", json=self._request) as answer:
                status = answer.status_code
                for data in answer.iter_bytes():
                    tail = (tail + data)[-KEPT_BYTES:]
                    if status == httpx.codes.OK:
                        self._stream.feed(data, time.perf_counter())
                        if self.tokens:
                            self._begun.set()
            if status == httpx.codes.OK:
                completion = self._stream.completion()
                wrong = _wrong_length(completion, self._request["max_tokens"])
            else:
                wrong = f"answered {status}"
        except httpx.HTTPError as error:
            wrong = f"broke off: {error!r}"
        except InvalidRun as error:
            wrong = str(error)
        whole = None if wrong else completion
        ids, ended_s = self._stream.token_ids, time.monotonic()
        self._found = Attempt(sent_s, ended_s, status, ids, whole, wrong, last_event(tail))
        self._begun.set()


def _wrong_length(found: Completion, asked: int) -> str:
    if found.output_tokens == asked == len(found.token_ids):
        return ""
    return f"{asked} tokens asked for, {found.output_tokens} counted, {len(found.token_ids)} ids"


def last_event(tail: bytes) -> str:
    """The last event that says something, of the end of an answer; an error before all that is no error."""
    lines = [line.strip() for line in tail.decode(errors="replace").split("\n")]
    said = [line for line in lines if line and line != "data: [DONE]"]
    errors = [line for line in said if '"error"' in line]
    return (errors or said or [""])[-1]


class SteadyClients:
    """Short requests with prompts of their own, from entry to exit of the block; nothing is sent again.

    Args:
        url: of a frontend; ``model``: the name that requests carry.
        users: how many requests are under way at most.
        pause_s: between an answer and the same user's next request, s.
        sender: makes the requests; one of its own by default.
    """

    def __init__(
        self,
        url: str,
        model: str,
        users: int = 2,
        pause_s: float = PAUSE_S,
        sender: httpx.Client | None = None,
    ) -> None:
        self._url = url
        self._model = model
        self._pause_s = pause_s
        self._sender = sender or httpx.Client(timeout=TIMEOUT)
        self._salts: Iterator[int] = itertools.count(secrets.randbelow(SALTS))
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._attempts: list[Attempt] = []
        self._users: list[threading.Thread] = []
        self._first = users

    def __enter__(self) -> SteadyClients:
        self.add(self._first)
        return self

    def add(self, users: int) -> None:
        """From now on have so many users more."""
        for _ in range(users):
            user = threading.Thread(target=self._go_on, daemon=True)
            with self._lock:
                self._users.append(user)
            user.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for user in self._users:
            user.join()
        self._sender.close()

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Those that have ended, in the order in which they were sent; after the block: all of them."""
        with self._lock:
            return tuple(sorted(self._attempts, key=lambda attempt: attempt.sent_s))

    def await_sent(self, count: int, after_s: float, limit_s: float) -> None:
        """Return when ``count`` requests that were sent after ``after_s`` (``time.monotonic()``) have ended.

        Raises:
            InvalidRun: if they have not after ``limit_s``.
        """
        waiting.until(
            lambda: len(self.sent(after_s)) >= count,
            limit_s,
            lambda: InvalidRun(
                f"{self._url}: {len(self.sent(after_s))} of {count} requests have ended after {limit_s:g} s"
            ),
            POLL_S,
        )

    def sent(self, from_s: float, to_s: float = float("inf")) -> tuple[Attempt, ...]:
        """Those that were sent in a time, ``time.monotonic()``."""
        return tuple(attempt for attempt in self.attempts if from_s <= attempt.sent_s < to_s)

    def _go_on(self) -> None:
        while not self._over.is_set():
            with self._lock:
                salt = next(self._salts) % SALTS
            request = body(self._model, prompt_of(PROMPT_TOKENS, salt), ANSWER_TOKENS)
            attempt = AskedStream(self._sender, self._url, request).attempt()
            with self._lock:
                self._attempts.append(attempt)
            self._over.wait(self._pause_s)


class Watching:
    """Watches etcd in a thread until so many changes under a prefix were as wanted. It has begun on return.

    Args:
        client: of its own; closed when it ends.
        limit_s: how long there may be no change at all, s.

    Raises:
        LabError: if etcd does not take the watch.
    """

    def __init__(
        self, client: EtcdClient, prefix: str, wanted: Callable[[Change], bool], count: int, limit_s: float
    ) -> None:
        self._client = client
        self._error: Exception | None = None
        self._found: list[Change] = []
        self._begun = threading.Event()
        self._confirmed = False
        self._thread = threading.Thread(
            target=self._watch, args=(prefix, wanted, count, limit_s), daemon=True
        )
        self._thread.start()
        self._begun.wait()
        if self._error and not self._confirmed:
            raise self._error

    @property
    def so_far(self) -> tuple[Change, ...]:
        """What has come as wanted so far."""
        return tuple(self._found)

    def changes(self) -> tuple[Change, ...]:
        """All of them, when they have come.

        Raises:
            LabError: if there was no change for too long.
        """
        self._thread.join()
        if self._error:
            raise self._error
        return self.so_far

    def _watch(self, prefix: str, wanted: Callable[[Change], bool], count: int, limit_s: float) -> None:
        try:
            with self._client.watch(prefix, limit_s) as changes:
                self._confirmed = True
                self._begun.set()
                for change in changes:
                    if wanted(change):
                        self._found.append(change)
                    if len(self._found) == count:
                        return
        except (LabError, httpx.HTTPError) as error:  # raised again where the result is asked for
            self._error = error
        finally:
            self._begun.set()
            self._client.close()


def joining(present: DynamoDeployment, tag: str, drain_s: float, lease_s: int) -> DynamoDeployment:
    """A deployment without workers yet, whose workers will serve beside those of ``present``.

    Its frontends find them by themselves; ``present`` itself stays as it is.

    Args:
        drain_s: what its workers leave their requests when they are asked to go.
        lease_s: how long they stay in etcd without a sign of life.
    """
    planes = replace(present.planes, lease_s=lease_s)
    found = DynamoDeployment(
        present.hosts,
        present.lab,
        present.model,
        present.python,
        planes,
        present.mode,
        nodes=present.nodes,
        events_host=present.events_host,
        drain_s=drain_s,
        tag=f"{present.tag}{tag}",
    )
    found.namespace, found.served_name = present.namespace, present.served_name
    return found

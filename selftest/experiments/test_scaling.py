"""Requests whose failure is data, traffic that does not pause, and a watch in a thread; nothing is started.

Answers have the form of Dynamo 1.6.1's frontend. They come through httpx's own machinery for reading an
answer, from a function of the test, which is the oracle: it keeps what it was asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import httpx
import pytest

from disagglab.errors import InvalidRun, LabError
from disagglab.experiments.scaling import AskedStream, Attempt, SteadyClients, Watching, joining, last_event
from disagglab.serving.dynamo.deployment import DynamoDeployment
from disagglab.serving.dynamo.etcd import EtcdClient
from disagglab.serving.dynamo.parts import Planes, body

URL = "http://127.0.0.1:1"
PATIENCE_S = 20.0  # for what happens at once; only a failing test waits this long
UNAVAILABLE = (
    'data: {"error":{"message":"Service temporarily unavailable","type":"service_unavailable","code":503}}'
)
WATCH_BEGINS = '{"result":{"header":{"revision":"1"},"created":true}}\n'
PUT = '{"result":{"events":[{"kv":{"key":"YQ==","mod_revision":"2","value":"YQ=="}}]}}\n'
DELETE = '{"result":{"events":[{"type":"DELETE","kv":{"key":"YQ==","mod_revision":"3"}}]}}\n'

Script = Callable[[dict[str, Any]], httpx.Response]


class Pieces(httpx.SyncByteStream):
    """An answer that arrives piece by piece; an exception among them is raised, an event is waited for."""

    def __init__(self, *pieces: str | Exception | threading.Event) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, threading.Event):
                assert piece.wait(PATIENCE_S), "the test did not let the answer go on"
            else:
                yield piece.encode()


def tokens(*ids: int) -> list[str]:
    """Events of one token each."""
    events = [
        {"choices": [{"text": "x", "index": 0}], "nvext": {"completion_token_ids": [one]}} for one in ids
    ]
    return [f"data: {json.dumps(event)}\n\n" for event in events]


def end(count: int) -> list[str]:
    """The events after the last token."""
    usage = {"prompt_tokens": 3, "completion_tokens": count}
    return [f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n", "data: [DONE]\n\n"]


def whole(request: dict[str, Any]) -> httpx.Response:
    """As many tokens as were asked for."""
    count = request["max_tokens"]
    return httpx.Response(200, stream=Pieces(*tokens(*range(count)), *end(count)))


def sender(script: Script) -> httpx.Client:
    """A client whose requests end in ``script``."""
    return httpx.Client(transport=httpx.MockTransport(lambda request: script(json.loads(request.content))))


def attempt(*pieces: str | Exception | threading.Event, status: int = 200, asked: int = 3) -> Attempt:
    """What becomes of a request that is answered so."""
    answering = sender(lambda _: httpx.Response(status, stream=Pieces(*pieces)))
    return AskedStream(answering, URL, body("m", [1, 2, 3], asked)).attempt()


def test_a_whole_answer_has_its_tokens_and_no_fault() -> None:
    """What arrives whole is a completion; the request asked for a stream with usage."""
    requests: list[dict[str, Any]] = []

    def script(request: dict[str, Any]) -> httpx.Response:
        requests.append(request)
        return whole(request)

    found = AskedStream(sender(script), URL, body("m", [1, 2, 3], 3)).attempt()

    assert found.completion is not None
    assert (found.status, found.token_ids, found.wrong) == (200, (0, 1, 2), "")
    assert found.completion.token_ids == found.token_ids
    assert found.sent_s <= found.ended_s
    assert [(one["stream"], one["stream_options"]) for one in requests] == [(True, {"include_usage": True})]


def test_an_error_inside_a_stream_is_kept_word_for_word() -> None:
    """Tokens that had come stay, the status is the one that was sent, and the error is as it was sent."""
    found = attempt(*tokens(7, 8), UNAVAILABLE + "\n\n", "data: [DONE]\n\n")

    assert found.completion is None
    assert (found.status, found.token_ids, found.last) == (200, (7, 8), UNAVAILABLE)
    assert "temporarily unavailable" in found.wrong


def test_a_refusal_is_kept_with_its_body() -> None:
    """An answer that is not 200 is no stream; its body is what the client saw."""
    found = attempt('{"message":"no worker","code":503}', status=503)

    assert found.completion is None
    assert (found.status, found.token_ids) == (503, ())
    assert (found.wrong, found.last) == ("answered 503", '{"message":"no worker","code":503}')


def test_a_connection_that_breaks_is_data() -> None:
    """A stream without an end is not whole, and keeps what had come."""
    found = attempt(*tokens(7), httpx.ReadError("reset by peer"))

    assert found.completion is None
    assert (found.status, found.token_ids) == (200, (7,))
    assert "reset by peer" in found.wrong


def test_nobody_listens() -> None:
    """No answer at all has status 0."""

    def refuse(_: dict[str, Any]) -> httpx.Response:
        raise httpx.ConnectError("refused")

    found = AskedStream(sender(refuse), URL, body("m", [1], 1)).attempt()

    assert (found.status, found.completion, found.last) == (0, None, "")
    assert "refused" in found.wrong


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([*tokens(7, 8), *end(2)], "3 tokens asked for, 2 counted, 2 ids"),
        ([*tokens(7, 8), *end(3)], "3 tokens asked for, 3 counted, 2 ids"),
        ([*tokens(7, 8)], "without usage"),
    ],
)
def test_an_answer_of_another_length_is_not_whole(pieces: list[str], said: str) -> None:
    """The number asked for, the usage and the token ids have to agree."""
    found = attempt(*pieces)

    assert found.completion is None
    assert said in found.wrong


def test_a_request_is_under_way_with_its_first_token() -> None:
    """``begun`` returns while the answer is still coming, and ``tokens`` counts what has."""
    go_on = threading.Event()
    answering = sender(lambda _: httpx.Response(200, stream=Pieces(*tokens(7), go_on, *tokens(8), *end(2))))

    asked = AskedStream(answering, URL, body("m", [1], 2)).begun(PATIENCE_S)
    had = asked.tokens
    go_on.set()

    assert had == 1
    assert asked.attempt().token_ids == (7, 8)


def test_a_request_that_ends_without_a_token_has_not_begun() -> None:
    """Who waits for the first token is told why there is none."""
    refusing = sender(lambda _: httpx.Response(503, stream=Pieces("full")))

    with pytest.raises(InvalidRun, match="503 answered 503 full"):
        AskedStream(refusing, URL, body("m", [1], 1)).begun(PATIENCE_S)


@pytest.mark.parametrize(
    ("tail", "last"),
    [
        (b"", ""),
        (b'data: {"a":1}\n\ndata: [DONE]\n\n', 'data: {"a":1}'),
        (b'data: {"error":1}\n\ndata: {"b":1}\n\n', 'data: {"error":1}'),
        (b'{"message":"x"}', '{"message":"x"}'),
        (b"\xa9 cut within a character\n", "\N{REPLACEMENT CHARACTER} cut within a character"),
    ],
)
def test_the_last_event_is_the_one_that_says_something(tail: bytes, last: str) -> None:
    """The end mark says nothing, and an error says more than what follows it."""
    assert last_event(tail) == last


def test_steady_traffic_repeats_no_prompt_and_keeps_every_outcome() -> None:
    """Each request has a prompt of its own, at most ``users`` are under way, and a failure ends nothing."""
    lock, seen, under_way, most = threading.Lock(), [], 0, 0

    def script(request: dict[str, Any]) -> httpx.Response:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            seen.append(tuple(request["prompt"]))
            number = len(seen)
        answer = whole(request) if number % 2 else httpx.Response(503, text="no")
        with lock:
            under_way -= 1
        return answer

    with SteadyClients(URL, "m", 2, 0.0, sender(script)) as steady:
        steady.add(1)
        steady.await_sent(10, 0.0, PATIENCE_S)

    assert len(steady.attempts) == len(seen) >= 10
    assert len(set(seen)) == len(seen), "a prompt was sent twice: a worker's cache would know it"
    assert 1 <= most <= 3
    failed = [one for one in steady.attempts if one.completion is None]
    assert len(failed) == len(seen) // 2
    times = [one.sent_s for one in steady.attempts]
    assert times == sorted(times)
    assert len(steady.sent(times[3], times[-1])) == len([one for one in times[3:] if one < times[-1]])


def test_traffic_that_does_not_come_is_an_error() -> None:
    """Who waits for requests hears how many there were."""
    with (
        SteadyClients(URL, "m", 1, 0.0, sender(whole)) as steady,
        pytest.raises(InvalidRun, match="0 of 1 requests have ended after 0 s"),
    ):
        steady.await_sent(1, float("inf"), 0.0)


def etcd(*pieces: str | Exception | threading.Event) -> EtcdClient:
    """An etcd that sends this when it is asked for a watch."""
    answering = httpx.MockTransport(lambda _: httpx.Response(200, stream=Pieces(*pieces)))
    return EtcdClient(URL, httpx.Client(transport=answering))


def test_a_watch_ends_with_the_changes_that_were_wanted() -> None:
    """It has begun before anything happens, leaves out what was not wanted, and stops at the count."""
    happens = threading.Event()

    watching = Watching(etcd(WATCH_BEGINS, happens, PUT, DELETE, PUT), "a", lambda one: one.deleted, 1, 5.0)
    before = watching.so_far
    happens.set()
    found = watching.changes()

    assert before == ()
    assert [(change.key, change.deleted, change.revision) for change in found] == [("a", True, 3)]
    assert watching.so_far == found


def test_a_watch_that_fails_says_so_to_who_waits() -> None:
    """What goes wrong in the thread is raised where the result is asked for, or at once if it never began."""
    silent = Watching(etcd(WATCH_BEGINS, httpx.ReadTimeout("")), "a", lambda _: True, 1, 5.0)

    with pytest.raises(LabError, match="no change of a for 5 s"):
        silent.changes()
    with pytest.raises(LabError, match="closed the watch"):
        Watching(etcd(WATCH_BEGINS), "a", lambda _: True, 1, 5.0).changes()
    with pytest.raises(LabError, match="did not confirm"):
        Watching(etcd(PUT), "a", lambda _: True, 1, 5.0)


def test_guests_join_what_serves_already() -> None:
    """They have the namespace and the name that requests carry; drain, lease and tag are their own."""
    anything = cast(Any, object())
    lab = cast(Any, type("Lab", (), {"nodes": ("a", "b")}))
    model = cast(Any, type("Model", (), {"name": "m"}))
    present = DynamoDeployment(anything, lab, model, "python", Planes(etcd=URL), tag="-x")

    guests = joining(present, "-guest", 7.0, 30)

    assert (guests.namespace, guests.served_name) == (present.namespace, present.served_name)
    assert (guests.drain_s, guests.planes, guests.tag) == (7.0, Planes(etcd=URL, lease_s=30), "-x-guest")
    assert (guests.nodes, guests.hosts, guests.workers) == (present.nodes, present.hosts, ())
    assert present.planes.lease_s != 30, "the guests' lease has become that of the others"

"""Dialogues with a small server that streams what it is told: order, headers, failures as data, server names.

The server is a stand-in that keeps what it was sent, and that is the oracle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from disagglab.config.traffic import Dialogue
from disagglab.errors import LabError
from disagglab.measure.talk import Spoken, Talk, talk
from disagglab.serving import openai

ORDER = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2))
TWO = Dialogue(("sys a", "sys b"), (("a0", "a1", "a2"), ("b0", "b1", "b2")), ORDER, 2, "Desk-1")
SAID = ["a0", "b0", "b1", "a1", "a2", "b2"]
SLOW_S = 0.2
PATIENCE_S = 20.0  # for what happens at once; only a failing test waits this long
BREAK = b"(the connection ends here)"

Script = Callable[[dict[str, Any]], list[bytes]]


class Server:
    """Streams what ``script`` says about a request. ``asked``: path, headers and body of each, in order."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.status = 200
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.under_way = 0
        self.most_under_way = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked, without paths and headers."""
        return [body for _, _, body in self.asked]

    def close(self) -> None:
        """Answer nothing more."""
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with server._lock:
                    server.asked.append((self.path, headers, body))
                    server.under_way += 1
                    server.most_under_way = max(server.most_under_way, server.under_way)
                events = server.script(body)
                with server._lock:  # before the answer ends, since the client may send the next one then
                    server.under_way -= 1
                with contextlib.suppress(OSError):
                    self._answer(events)

            def _answer(self, events: list[bytes]) -> None:
                self.send_response(server.status)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in events:
                    if event == BREAK:
                        self.close_connection = True
                        return
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the test's output clean."""

        return Handler


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chat(*texts: str) -> list[bytes]:
    """A chat answer as vLLM streams it: the role first, then a chunk a token, then usage."""
    role: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}}
    events = [event({"choices": [role], "prompt_token_ids": [1, 2, 3]})]
    for number, text in enumerate(texts):
        choice = {"index": 0, "delta": {"content": text}, "token_ids": [100 + number]}
        events.append(event({"choices": [choice]}))
    counts = {"prompt_tokens": 3, "completion_tokens": len(texts)}
    return [*events, event({"choices": [], "usage": counts}), b"data: [DONE]\n\n"]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    """Servers that are gone when the test is."""
    started: list[Server] = []

    def start(script: Script) -> Server:
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.close()


def last(body: dict[str, Any]) -> str:
    """What the user says in this request."""
    return str(body["messages"][-1]["content"])


def echo(body: dict[str, Any]) -> list[bytes]:
    """An answer of two tokens that names its question."""
    return chat("re ", last(body))


def places(found: Talk) -> list[tuple[int, int]]:
    """(conversation, turn) of the answers, as they were sent."""
    return [(turn.conversation, turn.turn) for turn in found.turns]


def test_requests_go_out_in_order_with_the_real_answers(serve: Callable[[Script], Server]) -> None:
    """One at a time, exactly as the dialogue orders them; history holds what the server said."""
    server = serve(echo)
    found = talk(server.url, "m", TWO, extra={"seed": 3})
    assert [last(body) for body in server.bodies()] == SAID
    assert {path for path, _, _ in server.asked} == {openai.CHAT}
    assert server.bodies()[-1]["messages"] == [
        {"role": "system", "content": "sys b"},
        {"role": "user", "content": "b0"},
        {"role": "assistant", "content": "re b0"},
        {"role": "user", "content": "b1"},
        {"role": "assistant", "content": "re b1"},
        {"role": "user", "content": "b2"},
    ]
    for body in server.bodies():
        assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (2, 0, True)
        assert (body["stream"], body["return_token_ids"], body["seed"]) == (True, True, 3)
    assert (tuple(places(found)), found.failures, server.most_under_way) == (ORDER, (), 1)
    assert [turn.turn for turn in found.of(1)] == [0, 1, 2]
    first = found.turns[0]
    assert (first.text, first.token_ids, first.server) == ("re a0", (100, 101), None)
    assert first.ttft_s + sum(first.gaps_s) == pytest.approx(first.e2e_s)


def test_a_session_header_names_the_conversation(serve: Callable[[Script], Server]) -> None:
    """The same value for all turns of a conversation, another for the other one, and in another dialogue.

    None unless asked for. With equal names every dialogue would have the same split between servers.
    """
    for name in ("Desk-1", "Desk-2"):
        server = serve(echo)
        talk(server.url, "m", dataclasses.replace(TWO, name=name), session_header=True)
        by_conversation: dict[str, set[str | None]] = {"a": set(), "b": set()}
        for _, headers, body in server.asked:
            by_conversation[last(body)[0]].add(headers.get("x-session-id"))
        assert by_conversation == {"a": {f"{name}-0"}, "b": {f"{name}-1"}}
    plain = serve(echo)
    talk(plain.url, "m", TWO)
    assert all("x-session-id" not in headers for _, headers, _ in plain.asked)


def test_token_ids_may_be_left_out(serve: Callable[[Script], Server]) -> None:
    """A server that refuses the key return_token_ids is not sent it."""
    server = serve(echo)
    talk(server.url, "m", TWO, ids=False)
    assert all("return_token_ids" not in body for body in server.bodies())


FAILURES: dict[str, tuple[int, list[bytes], str]] = {
    "refused": (503, [b"no worker"], "answered 503: no worker"),
    "error in the stream": (200, [*chat("a")[:3], event({"error": {"message": "no KV left"}})], "no KV left"),
    "disconnect": (200, [*chat("a")[:3], BREAK], "broke off"),
    "too short": (200, chat("a"), "an answer of 1 tokens, 2 were asked for"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_data_and_ends_its_conversation(serve: Callable[[Script], Server], failure: str) -> None:
    """The failed turn is told, its conversation's later turn is not sent, the other one goes on."""
    status, events, message = FAILURES[failure]

    def script(body: dict[str, Any]) -> list[bytes]:
        failing = last(body) == "b1"
        server.status = status if failing else 200
        return events if failing else echo(body)

    server = serve(script)
    found = talk(server.url, "m", TWO)
    assert [last(body) for body in server.bodies()] == ["a0", "b0", "b1", "a1", "a2"]
    assert places(found) == [(0, 0), (1, 0), (0, 1), (0, 2)]
    (failed,) = found.failures
    assert (failed.conversation, failed.turn) == (1, 1)
    assert message in failed.what
    assert found.turns[1].start_s < failed.start_s < found.turns[2].start_s


def test_concurrency_is_reached_and_never_exceeded(serve: Callable[[Script], Server]) -> None:
    """Four conversations of one turn, two places: two are under way at once, a third never is."""
    pair = threading.Barrier(2)

    def script(body: dict[str, Any]) -> list[bytes]:
        pair.wait(PATIENCE_S)
        return echo(body)

    four = Dialogue(("s",) * 4, (("a",), ("b",), ("c",), ("d",)), tuple((n, 0) for n in (2, 0, 3, 1)), 2, "x")
    server = serve(script)
    found = talk(server.url, "m", four, concurrency=2)
    assert (server.most_under_way, len(found.turns), found.failures) == (2, 4, ())
    assert {last(body) for body in server.bodies()[:2]} == {"c", "a"}


def test_a_request_that_waits_lets_others_pass(serve: Callable[[Script], Server]) -> None:
    """Three places: b1 waits for b0, so a0 and b0 are all there is; when b0 is over, b1 goes and not a1.

    The server answers a0 only when b2 has come: were a place or the order held up by a0, it never would.
    """
    b2_came = threading.Event()
    together: list[bool] = []

    def script(body: dict[str, Any]) -> list[bytes]:
        if last(body) == "b2":
            b2_came.set()
        if last(body) == "a0":
            together.append(b2_came.wait(PATIENCE_S))
        return echo(body)

    server = serve(script)
    found = talk(server.url, "m", TWO, concurrency=3)
    assert together == [True], "b2 waited for the other conversation"
    sent = [last(body) for body in server.bodies()]
    assert set(sent[:2]) == {"a0", "b0"}
    assert (sent[2:], server.most_under_way) == (["b1", "b2", "a1", "a2"], 2)
    assert len(found.turns) == 6


def test_the_server_is_asked_after_each_answer(serve: Callable[[Script], Server]) -> None:
    """In a thread, before the next request goes out; its time is in no answer, and it blocks no clock."""
    seen: list[list[str]] = []
    threads: set[int] = set()

    def served_by() -> str:
        seen.append([last(body) for body in server.bodies()])
        threads.add(threading.get_ident())
        time.sleep(SLOW_S)
        return f"worker {len(seen) % 2}"

    server = serve(echo)
    found = talk(server.url, "m", TWO, served_by=served_by)
    assert seen == [SAID[: count + 1] for count in range(6)]
    assert [turn.server for turn in found.turns] == ["worker 1", "worker 0"] * 3
    assert all(isinstance(turn, Spoken) and turn.e2e_s < SLOW_S for turn in found.turns)
    assert threading.get_ident() not in threads
    assert found.client is not None
    assert found.client.lag_max_s < SLOW_S
    assert found.duration_s >= 6 * SLOW_S


def test_what_served_by_raises_ends_the_talk(serve: Callable[[Script], Server]) -> None:
    """A server that cannot be told is no failure of the service: the error comes through as it is."""

    def served_by() -> str:
        raise LabError("two servers counted one request")

    server = serve(echo)
    with pytest.raises(LabError, match="two servers counted one request"):
        talk(server.url, "m", TWO, served_by=served_by)
    assert len(server.asked) == 1


def test_a_failed_request_names_no_server(serve: Callable[[Script], Server]) -> None:
    """served_by is asked after answers alone, since a request that failed may be counted nowhere."""
    asked: list[None] = []
    server = serve(lambda _: chat("short"))
    found = talk(server.url, "m", TWO, served_by=lambda: asked.append(None))
    assert (len(found.failures), found.turns, asked) == (2, (), [])


def test_arguments_that_cannot_hold_are_refused() -> None:
    """No place at all, and server names where several answers come at once; nothing is sent."""
    with pytest.raises(ValueError, match="at concurrency 1 alone"):
        talk("http://127.0.0.1:9", "m", TWO, concurrency=2, served_by=lambda: "x")
    with pytest.raises(ValueError, match="at least one request"):
        talk("http://127.0.0.1:9", "m", TWO, concurrency=0)


def test_nobody_listens() -> None:
    """A service that is not there is a failure of each conversation, not an exception."""
    found = talk("http://127.0.0.1:9", "m", TWO)
    assert [failure.conversation for failure in found.failures] == [0, 1]
    assert all("broke off" in failure.what for failure in found.failures)

"""Conversations with a small server that streams what it is told: history, errors, concurrency, lag.

The server is a stand-in: it keeps the bodies that it was sent, and those are the oracle of what a turn says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from disagglab.errors import InvalidRun
from disagglab.measure.conversation import Conversation, Turn, converse, held_tokens, request_of
from disagglab.serving import openai

PATIENCE_S = 20.0  # for what happens at once; only a failing test waits this long
BLOCKED_S = 0.3
GAP_S = 0.05

Event = bytes | float  # bytes are sent as they are; a number is a pause, s
Script = Callable[[dict[str, Any]], list[Event]]


class Server:
    """Streams what ``script`` says about a request. ``asked``: path and body of each, in order.

    ``headers``: of each, by lower-case name.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.status = 200
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = 0
        self.most_under_way = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked, without the paths."""
        return [body for _, body in self.asked]

    def close(self) -> None:
        """Answer nothing more."""
        self._http.shutdown()
        self._http.server_close()

    @contextlib.contextmanager
    def _counted(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[None]:
        with self._lock:
            self.asked.append((path, body))
            self.headers.append(headers)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with server._counted(self.path, body, headers), contextlib.suppress(OSError):
                    self._answer(server.script(body))

            def _answer(self, events: list[Event]) -> None:
                self.send_response(server.status)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in events:
                    if isinstance(event, float):
                        time.sleep(event)
                    elif event == BREAK:
                        self.close_connection = True
                        return
                    else:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the test's output clean."""

        return Handler


BREAK = b"(the connection ends here)"


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


def event(value: Any) -> bytes:
    """A server-sent event, without escapes for what is not ASCII, as vLLM writes it."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def usage(prompt: int, output: int, **more: Any) -> bytes:
    """The last event of a stream."""
    counts = {"prompt_tokens": prompt, "completion_tokens": output, **more}
    return event({"choices": [], "usage": counts}) + b"data: [DONE]\n\n"


def chat(*texts: str, prompt: int = 5, gap_s: float = 0.0) -> list[Event]:
    """A chat answer as vLLM streams it: the role first, then a chunk a token, then usage."""
    role: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}}
    events: list[Event] = [event({"choices": [role], "prompt_token_ids": list(range(prompt))})]
    for number, text in enumerate(texts):
        choice = {"index": 0, "delta": {"content": text}, "token_ids": [100 + number]}
        events += [gap_s, event({"choices": [choice]})]
    return [*events, usage(prompt, len(texts))]


def completion(*ids: int, prompt: int = 5, **more: Any) -> list[Event]:
    """An answer in token ids, a chunk a token, then usage."""
    events: list[Event] = [
        event({"choices": [{"index": 0, "text": f"<{token}>", "token_ids": [token]}]}) for token in ids
    ]
    return [*events, usage(prompt, len(ids), **more)]


def user(body: dict[str, Any]) -> str:
    """The last message of a chat."""
    return str(body["messages"][-1]["content"])


def test_history_holds_the_real_answers(serve: Callable[[Script], Server]) -> None:
    """Each turn sends what was said and answered so far, word by word, then the next message."""
    server = serve(lambda body: chat("You said ", user(body)))
    found = converse(
        server.url, "m", [Conversation(("one", "two", "three"), 2, {"cache_salt": "s", "temperature": 1})]
    )
    assert [path for path, _ in server.asked] == [openai.CHAT] * 3
    assert server.bodies()[2]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "You said two"},
        {"role": "user", "content": "three"},
    ]
    for body in server.bodies():
        assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (2, True, True)
        assert (body["cache_salt"], body["temperature"]) == ("s", 1)
    assert [turn.text for turn in found.turns] == ["You said one", "You said two", "You said three"]
    assert [turn.start_s for turn in found.turns] == sorted(turn.start_s for turn in found.turns)


def test_token_ids_are_appended_as_they_are(serve: Callable[[Script], Server]) -> None:
    """A conversation in token ids needs no template: its prompt is prompt, answer ids, next ids."""
    server = serve(lambda body: completion(len(body["prompt"]), 9))
    converse(server.url, "m", [Conversation(((1, 2), (3,), (4, 5, 6)), 2)])
    assert [path for path, _ in server.asked] == [openai.COMPLETIONS] * 3
    assert [body["prompt"] for body in server.bodies()] == [
        [1, 2],
        [1, 2, 2, 9, 3],
        [1, 2, 2, 9, 3, 5, 9, 4, 5, 6],
    ]


def test_the_event_that_names_the_role_is_no_chunk(serve: Callable[[Script], Server]) -> None:
    """TTFT is the first token's; there is a gap less than tokens, and TTFT + gaps = E2E."""
    server = serve(lambda _: chat("a", "b", "c", gap_s=GAP_S))
    turn = converse(server.url, "m", [Conversation(("hi",), 3)]).turns[0]
    assert len(turn.gaps_s) == 2
    assert turn.ttft_s >= GAP_S
    assert all(gap > 0 for gap in turn.gaps_s)
    assert turn.ttft_s + sum(turn.gaps_s) == pytest.approx(turn.e2e_s)
    assert (turn.prompt_ids, turn.token_ids) == ((0, 1, 2, 3, 4), (100, 101, 102))
    assert (turn.prompt_tokens, turn.output_tokens, turn.cached_tokens) == (5, 3, None)


def test_cached_tokens_are_those_that_the_server_tells(serve: Callable[[Script], Server]) -> None:
    """usage.prompt_tokens_details.cached_tokens, where there is one."""
    server = serve(lambda _: completion(7, prompt=300, prompt_tokens_details={"cached_tokens": 256}))
    turn = converse(server.url, "m", [Conversation(((1,),), 1)]).turns[0]
    assert (turn.prompt_tokens, turn.cached_tokens) == (300, 256)


def test_both_clients_read_one_stream_alike(serve: Callable[[Script], Server]) -> None:
    """Events cut in the middle, comments, and line ends inside of text: one parser, one answer."""
    whole = b"".join(part for part in completion(1, 2) if isinstance(part, bytes))
    text = event({"choices": [{"index": 0, "text": "a\u2028b\x85c", "token_ids": [3]}]})
    data = b": ping\n\n" + text + whole.replace(b'"completion_tokens": 2', b'"completion_tokens": 3')
    server = serve(lambda _: [data[at : at + 7] for at in range(0, len(data), 7)])
    turn = converse(server.url, "m", [Conversation(((1,),), 3)]).turns[0]
    answer = openai.complete(server.url, openai.body("m", [1], 3))
    assert answer.text == turn.text == "a\u2028b\x85c<1><2>"
    assert answer.token_ids == turn.token_ids == (3, 1, 2)
    assert len(answer.gaps_s) == len(turn.gaps_s) == 2


FAILURES: dict[str, tuple[list[Event], str]] = {
    "error in the stream": ([*chat("a")[:3], event({"error": {"message": "no KV left"}})], "no KV left"),
    "disconnect": ([*chat("a")[:3], BREAK], "broke off"),
    "no choices": ([event({"object": "error", "message": "gone"})], "without choices.*gone"),
    "not JSON": ([b"data: {oops\n\n"], "no JSON"),
    "no usage": (chat("a", "b")[:-1], "without usage"),
    "no token": ([chat("a")[0], usage(5, 0)], "without any token"),
    "too short": (chat("a"), "an answer of 1 tokens, 2 were asked for"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_failure_ends_the_run(serve: Callable[[Script], Server], failure: str) -> None:
    """The error names conversation and turn; the other one is broken off, and nothing more is sent."""
    events, message = FAILURES[failure]
    endless: list[Event] = [*chat("still here", gap_s=PATIENCE_S)]
    started = threading.Event()

    def script(body: dict[str, Any]) -> list[Event]:
        if user(body) == "talk on":
            started.set()
            return endless
        if user(body) == "fail":
            assert started.wait(PATIENCE_S)
            return events
        return chat("a", "b")

    server = serve(script)
    begin = time.monotonic()
    with pytest.raises(InvalidRun, match=f"conversation 1, turn 2: .*{message}"):
        converse(
            server.url,
            "m",
            [Conversation(("talk on", "more"), 2), Conversation(("x", "y", "fail", "z"), 2)],
        )
    assert time.monotonic() - begin < PATIENCE_S, "the other conversation was waited for"
    assert sorted(user(body) for body in server.bodies()) == ["fail", "talk on", "x", "y"]


def test_a_refusal_is_shown(serve: Callable[[Script], Server]) -> None:
    """Status and reason of an answer that is not 200; a port where nobody listens."""
    server = serve(lambda _: [b'{"message": "prompt too long"}'])
    server.status = 400
    one = [Conversation(("hi",), 1)]
    with pytest.raises(InvalidRun, match=r"conversation 0, turn 0: .*answered 400: .*prompt too long"):
        converse(server.url, "m", one)
    with pytest.raises(InvalidRun, match=r"answered 400: .*prompt too long"):
        openai.complete(server.url, openai.body("m", [1], 1))
    server.close()
    with pytest.raises(InvalidRun, match=r"conversation 0, turn 0: .*broke off"):
        converse(server.url, "m", one)


def test_concurrency_is_reached_and_never_exceeded(serve: Callable[[Script], Server]) -> None:
    """Six conversations, two at a time: the server waits until two are under way, and never sees a third.

    Nor does the client count one as sent that waits for a connection, which would lengthen its TTFT.
    """
    pair = threading.Barrier(2)

    def script(body: dict[str, Any]) -> list[Event]:
        pair.wait(PATIENCE_S)
        return completion(*body["prompt"])

    server = serve(script)
    found = converse(server.url, "m", [Conversation(((n,),), 1) for n in range(1, 7)], concurrency=2)
    assert server.most_under_way == 2
    for one in found.turns:
        begun = [other for other in found.turns if other.start_s <= one.start_s]
        assert sum(other.start_s + other.e2e_s > one.start_s for other in begun) <= 2
    assert [turn.token_ids for turn in found.turns] == [(n,) for n in range(1, 7)]
    assert [turn.conversation for turn in found.turns] == list(range(6))


def test_a_blocked_client_is_noticed(
    serve: Callable[[Script], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that keeps the event loop from running makes every time late; the lag says by how much."""
    feed = openai.AnswerStream.feed

    def slow(self: openai.AnswerStream, data: bytes, now_s: float) -> None:
        if b"block here" in data:
            time.sleep(BLOCKED_S)
        feed(self, data, now_s)

    monkeypatch.setattr(openai.AnswerStream, "feed", slow)
    server = serve(lambda _: chat("a", "block here", "b", gap_s=GAP_S))
    found = converse(server.url, "m", [Conversation(("hi",), 3)])
    assert found.client is not None
    assert found.client.lag_max_s > BLOCKED_S / 2
    assert found.client.cpu_share < 1, "sleeping is not computing"
    assert found.duration_s > BLOCKED_S


def turn(number: int, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Turn:
    """A turn of which only the tokens matter."""
    return Turn(
        "",
        answer,
        (),
        len(prompt),
        len(answer),
        0.1,
        0.2,
        (),
        None,
        prompt,
        conversation=0,
        turn=number,
        start_s=0.0,
    )


def test_held_tokens_are_whole_blocks_of_what_was_computed() -> None:
    """By hand, blocks of 4: the last token of an answer was never computed, that of a prompt always is."""
    first = turn(0, (1, 2, 3, 4, 5, 6), (7, 8))  # computed: 1 to 7
    same = (1, 2, 3, 4, 5, 6, 7, 8)
    assert held_tokens([first, turn(1, (*same, 9), (0, 0))], 4) == (0, 4)
    longer = turn(0, (1, 2, 3, 4, 5, 6), (7, 8, 9))  # computed: 1 to 8
    assert held_tokens([longer, turn(1, (*same, 9), (0, 0))], 4) == (0, 8)
    assert held_tokens([longer, turn(1, same, (0, 0))], 4) == (0, 4)  # the last token of a prompt
    cut_otherwise = (1, 2, 3, 4, 5, 66, 7, 8, 9)
    assert held_tokens([longer, turn(1, cut_otherwise, (0, 0))], 4) == (0, 4)
    assert held_tokens([longer, turn(1, (99, *same), (0, 0))], 4) == (0, 0)
    back_again = turn(2, (*same, 9), (0, 0))
    assert held_tokens([longer, turn(1, cut_otherwise, (0, 0)), back_again], 4) == (0, 4, 8)


def test_held_tokens_need_the_ids() -> None:
    """Without token ids there is no prediction, and no zero in its place."""
    bare = Turn("", (), (), 5, 1, 0.1, 0.2, (), conversation=3, turn=0, start_s=0.0)
    with pytest.raises(InvalidRun, match="conversation 3, turn 0: 0 ids of 5 prompt tokens"):
        held_tokens([bare], 4)


@pytest.mark.parametrize("says", [(), ("text", (1, 2)), ("",), ((1,), ())])
def test_a_conversation_that_cannot_be_held_is_refused(says: Any) -> None:
    """Nothing said, text mixed with token ids, an empty message."""
    with pytest.raises(ValueError, match="a conversation needs messages"):
        Conversation(says, 1)


def test_a_run_needs_a_conversation() -> None:
    """An empty run measures nothing and is refused before a connection is made."""
    with pytest.raises(InvalidRun, match="no conversation"):
        converse("http://127.0.0.1:9", "m", [])


def test_extra_keys_win() -> None:
    """What a conversation asks for besides replaces what every request holds."""
    _, request = request_of("m", Conversation(((1,),), 4, {"return_token_ids": False, "seed": 3}), [])
    assert (request["return_token_ids"], request["seed"], request["max_tokens"]) == (False, 3, 4)


def test_headers_go_with_one_request(serve: Callable[[Script], Server]) -> None:
    """A request among others may carry a header; the next one over the same connection does not."""
    server = serve(lambda _: completion(1))

    async def two() -> None:
        async with httpx.AsyncClient() as sender:
            request = openai.body("m", [1], 1)
            for headers in ({"X-Session-ID": "one"}, None):
                await openai.complete_beside_others(sender, server.url, openai.COMPLETIONS, request, headers)

    asyncio.run(two())
    assert [headers.get("x-session-id") for headers in server.headers] == ["one", None]


def test_a_chat_is_tokenized_with_the_prompt_for_an_answer(serve: Callable[[Script], Server]) -> None:
    """/tokenize is given the messages and asked for the generation prompt; a refusal is shown."""
    server = serve(lambda _: [json.dumps({"tokens": [4, 5], "count": 2}).encode()])
    messages = [{"role": "user", "content": "hi"}]
    assert openai.tokenize_chat(server.url, "m", messages) == [4, 5]
    assert server.asked == [
        ("/tokenize", {"model": "m", "messages": messages, "add_generation_prompt": True})
    ]
    server.status = 404
    with pytest.raises(InvalidRun, match="/tokenize answered 404"):
        openai.tokenize_chat(server.url, "m", messages)

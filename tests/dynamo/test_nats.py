"""NATS as a broker: who gets a message, and what is left of it when the broker dies.

Dynamo 1.6.1 needs no NATS: requests go over TCP and KV events over ZeroMQ. With ``DYN_REQUEST_PLANE=nats``
requests go through this broker, which spares frontends and workers from knowing each other's addresses
(test_planes.py). No engine runs here.

The oracle is the list of what was sent. That nothing more will come is known without waiting: a client's
message to itself goes through its own buffer, the server and back behind everything before it, so what has
not come by then was not sent. (nats-py's ``flush`` proves less: in 2.16.0 its PING overtakes what still lies
in the client's buffer, Client._send_ping.) The server's own account (``/connz``, ``/jsz``) has to agree.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import nats
import pytest
from nats.errors import NoRespondersError

from disagglab.results.recorder import Recorder
from disagglab.serving.dynamo.nats import NatsServer

MESSAGES = 300
WORKERS = 3  # that one of them gets none of 300 messages by chance: 3 * (2/3)**300, 1e-52
REQUESTS = 200
LIMIT_S = 30.0  # of one scenario, each of which takes a second or two
ANSWER_LIMIT_S = 5.0
POLL_S = 0.02


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    """What a scenario returns; it fails when it takes longer than LIMIT_S."""
    return asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


async def settle(client: Any) -> None:
    """Return when the server has taken all that a client sent, and the client all that was there for it."""
    inbox = client.new_inbox()
    loop = await client.subscribe(inbox)
    await client.publish(inbox, b"")
    await loop.next_msg(timeout=ANSWER_LIMIT_S)
    await loop.unsubscribe()


async def arrived(client: Any, subscription: Any) -> list[str]:
    """Everything that has been sent to a subscription up to now; see the module's docstring."""
    await settle(client)
    waiting = subscription.pending_msgs
    return [(await subscription.next_msg(timeout=ANSWER_LIMIT_S)).data.decode() for _ in range(waiting)]


async def send(client: Any, subject: str, texts: list[str]) -> None:
    """Publish, and return when the server has taken all of it."""
    for text in texts:
        await client.publish(subject, text.encode())
    await settle(client)


@pytest.fixture
def subject() -> str:
    """A subject that no other test uses."""
    return f"lesson-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def texts() -> list[str]:
    """What is sent: each message different from all others."""
    return [f"message {number}" for number in range(MESSAGES)]


def test_every_subscriber_gets_every_message(nats_server: NatsServer, subject: str, texts: list[str]) -> None:
    """Each subscriber of a subject gets every message, in order; one that comes late gets none of them.

    Publish and subscribe: KV events are one worker's news for all routers, and the worker need not know how
    many routers there are. The broker keeps nothing (at most once): a router that starts later has to learn
    what the caches hold in another way, or begin with an empty picture.
    """

    async def scenario() -> tuple[list[list[str]], list[str]]:
        clients = [await nats.connect(nats_server.url) for _ in range(WORKERS + 1)]
        *early, publisher = clients
        there = [(client, await client.subscribe(f"{subject}.*")) for client in early]
        for client in early:
            await settle(client)
        await send(publisher, f"{subject}.stored", texts)
        late = await publisher.subscribe(f"{subject}.*")
        got = [await arrived(*one) for one in there], await arrived(publisher, late)
        for client in clients:
            await client.close()
        return got

    early, late = run(scenario())

    for number, got in enumerate(early):
        assert got == texts, (
            f"subscriber {number} got {len(got)} of {len(texts)} messages, or in another order"
        )
    assert late == [], f"a subscriber that came late got {len(late)} messages"


def test_a_queue_group_shares_the_messages(
    nats_server: NatsServer, subject: str, texts: list[str], record: Recorder
) -> None:
    """Of a queue group, exactly one member gets each message; an observer outside of it still gets all.

    A load balancer without a balancer: members join by subscribing, and the broker picks one at random. That
    is right where workers are interchangeable. Where they are not, because one of them has the prefix in its
    KV cache, the choice belongs to a router: Dynamo gives each worker instance a subject of its own.
    """

    async def scenario() -> tuple[list[list[str]], list[str]]:
        clients = [await nats.connect(nats_server.url) for _ in range(WORKERS + 1)]
        *members, observer = clients
        group = [(client, await client.subscribe(subject, queue="workers")) for client in members]
        outside = await observer.subscribe(subject)
        for client in clients:
            await settle(client)
        await send(observer, subject, texts)
        got = [await arrived(*one) for one in group], await arrived(observer, outside)
        for client in clients:
            await client.close()
        return got

    shares, all_of_them = run(scenario())

    for number, share in enumerate(shares):
        record.numbers("share of a queue group's messages", [len(share)], "count", arm=f"member {number}")
        assert share, f"member {number} of the group got none of {len(texts)} messages"
    assert all_of_them == texts
    assert sorted(text for share in shares for text in share) == sorted(texts), (
        f"the members got {[len(share) for share in shares]} of {len(texts)} messages: some lost or twice"
    )


def test_a_request_gets_its_own_answer(nats_server: NatsServer, subject: str, record: Recorder) -> None:
    """Requests in flight together each get the answer to their own question; their round trips are recorded.

    A request is a message with a return address, an inbox that the client made up and subscribed to. What
    came over HTTP as a connection is here two messages that pass the broker, so any worker can answer any
    client without either knowing the other's address.
    """

    async def scenario() -> tuple[list[tuple[str, str]], list[float]]:
        client, worker = [await nats.connect(nats_server.url) for _ in range(2)]

        async def answer(message: Any) -> None:
            await message.respond(b"answer to " + message.data)

        await worker.subscribe(subject, cb=answer)
        await settle(worker)

        async def ask(number: int) -> tuple[str, str]:
            got = await client.request(subject, f"{number}".encode(), timeout=ANSWER_LIMIT_S)
            return f"answer to {number}", got.data.decode()

        together = await asyncio.gather(*(ask(number) for number in range(REQUESTS)))
        took = []
        for number in range(REQUESTS):
            start = time.perf_counter()
            await ask(number)
            took.append(time.perf_counter() - start)
        for one in (client, worker):
            await one.close()
        return list(together), took

    together, took = run(scenario())

    record.numbers("round trip of a request through NATS", took, "s", what="requests, one at a time")
    assert len(together) == REQUESTS
    wrong = [(wanted, got) for wanted, got in together if wanted != got]
    assert not wrong, f"{len(wrong)} answers went to another request: {wrong[:3]}"


def test_a_request_to_nobody_fails_at_once(nats_server: NatsServer, subject: str, record: Recorder) -> None:
    """A request that nobody listens for is refused by the broker, long before its time is over.

    The broker knows who subscribes. A worker that dies takes its connection with it, the broker notices, and
    tells the next client that nobody is there, while the worker's lease in etcd lives on for seconds. What
    the broker cannot tell is whether a worker that is connected will ever answer: for that there is the
    timeout.
    """

    async def scenario() -> tuple[str, float]:
        client = await nats.connect(nats_server.url)
        worker = await nats.connect(nats_server.url, name=subject)

        async def answer(message: Any) -> None:
            await message.respond(b"here")

        await worker.subscribe(subject, cb=answer)
        await settle(worker)
        answered = await client.request(subject, b"", timeout=ANSWER_LIMIT_S)
        await worker.close()  # closes the connection and does not unsubscribe
        while subject in {connection.name for connection in nats_server.connections()}:
            await asyncio.sleep(POLL_S)
        start = time.perf_counter()
        with pytest.raises(NoRespondersError):
            await client.request(subject, b"", timeout=ANSWER_LIMIT_S)
        took_s = time.perf_counter() - start
        await client.close()
        return answered.data.decode(), took_s

    answered, took_s = run(scenario())

    record.numbers("refusal of a request to nobody", [took_s], "s", what="requests")
    assert answered == "here", "the worker did not answer while it was there; its absence proves nothing"
    assert took_s < ANSWER_LIMIT_S / 2, f"refused only after {took_s:.2f} s: that is a timeout"


def test_a_stream_survives_the_death_of_the_broker(
    start_nats: Callable[[str], NatsServer],
    subject: str,
    texts: list[str],
    record: Recorder,
) -> None:
    """After SIGKILL and a restart, JetStream has every acknowledged message; of core NATS nothing is left.

    The same messages are published twice: on a subject that a stream keeps, each answered by its sequence
    number, and on one that nobody keeps. JetStream is a log on disk, and reading is moving along it, so a
    late or restarted router can replay. What was acknowledged is in the kernel's memory, and is forced to the
    disk only every ``sync_interval`` (recorded): the death of the process loses nothing, that of the machine
    may.
    """
    server = start_nats("nats-killed")

    async def before() -> tuple[list[int], list[str]]:
        client = await nats.connect(server.url)
        stream = client.jetstream()
        await stream.add_stream(name=subject, subjects=[f"{subject}.kept"])
        listener = await client.subscribe(f"{subject}.*")
        acknowledged = [(await stream.publish(f"{subject}.kept", text.encode())).seq for text in texts]
        await send(client, f"{subject}.fleeting", texts)
        heard = await arrived(client, listener)
        await client.close()
        return acknowledged, heard

    async def after() -> tuple[list[tuple[int, str]], list[str], int]:
        client = await nats.connect(server.url)
        core = await client.subscribe(f"{subject}.fleeting")
        stream = client.jetstream()
        replay = await stream.subscribe(f"{subject}.kept", ordered_consumer=True)
        kept = [await replay.next_msg(timeout=ANSWER_LIMIT_S) for _ in texts]
        nothing = await arrived(client, core)
        following = await stream.publish(f"{subject}.kept", b"one more")
        await client.close()
        return [(one.metadata.sequence.stream, one.data.decode()) for one in kept], nothing, following.seq

    acknowledged, heard = run(before())
    held = server.jetstream()
    killed_s = time.monotonic()
    server.kill()
    server.restart()
    down_s = time.monotonic() - killed_s
    again = server.jetstream()
    kept, nothing, following = run(after())

    record.numbers("SIGKILL until the broker is ready again", [down_s], "s", what="restarts")
    record.numbers(
        "time that acknowledged messages may be in memory alone", [held.sync_interval_s], "s", what="settings"
    )
    assert heard == texts + texts, "a listener that was there did not hear both subjects: the control failed"
    assert acknowledged == list(range(1, len(texts) + 1))
    assert held.streams == again.streams, f"before {held.streams}, after {again.streams}"
    assert [stream.messages for stream in again.streams] == [len(texts)]
    assert kept == list(zip(acknowledged, texts, strict=True))
    assert nothing == [], f"{len(nothing)} messages of core NATS came back from the dead"
    assert following == len(texts) + 1, "the sequence did not go on where it was"


def test_the_server_knows_who_listens_and_what_is_kept(
    nats_server: NatsServer, subject: str, texts: list[str]
) -> None:
    """``/connz`` names each client's subscriptions and queue groups; ``/jsz`` counts what each stream holds.

    A broker is a place to look from: what in a mesh of direct connections is spread over all hosts is one
    page here. A router that gets no events is either missing from this page or subscribed to another subject.
    """

    async def scenario() -> tuple[Any, Any, Any]:
        worker = await nats.connect(nats_server.url, name=f"{subject}-worker")
        router = await nats.connect(nats_server.url, name=f"{subject}-router")
        await worker.subscribe(f"{subject}.requests", queue="workers")
        await router.subscribe(f"{subject}.events")
        await settle(worker)
        await send(worker, f"{subject}.events", texts)
        await settle(router)
        stream = worker.jetstream()
        await stream.add_stream(name=subject, subjects=[f"{subject}.kept"])
        for text in texts[:10]:
            await stream.publish(f"{subject}.kept", text.encode())
        listed, held = nats_server.connections(), nats_server.jetstream()
        await stream.delete_stream(subject)
        left = nats_server.jetstream()
        for client in (worker, router):
            await client.close()
        return listed, held, left

    listed, held, left = run(scenario())

    found = {
        connection.name: {
            (one.subject, one.queue, one.messages)
            for one in connection.subscriptions
            if one.subject.startswith(subject)  # and not an inbox
        }
        for connection in listed
        if connection.name.startswith(subject)
    }
    assert found[f"{subject}-router"] == {(f"{subject}.events", "", len(texts))}
    assert found[f"{subject}-worker"] == {(f"{subject}.requests", "workers", 0)}
    (stream,) = [one for one in held.streams if one.name == subject]
    assert (stream.subjects, stream.storage) == ((f"{subject}.kept",), "file")
    assert (stream.messages, stream.first_sequence, stream.last_sequence) == (10, 1, 10)
    assert subject not in {one.name for one in left.streams}, "a deleted stream is still listed"

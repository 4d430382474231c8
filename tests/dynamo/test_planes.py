"""Other planes: discovery by files in place of etcd, requests over NATS in place of TCP.

A setting that is ignored serves as well as one that is followed. So each plane is asked for what Dynamo left
on it: the files, or the subjects that its processes listen to and the messages that came.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from disagglab.config.schema import Lab
from disagglab.experiments import routing
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.serving import openai
from disagglab.serving.dynamo.etcd import EtcdServer
from disagglab.serving.dynamo.nats import NatsServer
from disagglab.serving.dynamo.parts import ROUND_ROBIN, Planes, body
from tests.dynamo.conftest import StartDynamo

pytestmark = pytest.mark.lab_has("one_host")

REQUESTS, OUTPUT_TOKENS = 3, 6


@dataclass(frozen=True)
class Plane:
    """A way to join the parts, and what is seen on it: names, each with how much came."""

    name: str
    planes: Planes
    seen: Callable[[], dict[str, int]]


@pytest.fixture(params=["files", "nats"])
def plane(request: pytest.FixtureRequest, live: Session) -> Iterator[Plane]:
    """Discovery by files, in the full form; requests over NATS."""
    if request.param == "files":
        if live.short:
            pytest.skip("SHORT: discovery by files is tried in the full form")
        folder = live.store.folder / "discovery"
        folder.mkdir()
        try:
            yield Plane("files", Planes(folder=str(folder)), lambda: sizes(folder))
        finally:
            shutil.rmtree(folder)
        return
    etcd_server: EtcdServer = request.getfixturevalue("etcd_server")
    start_nats: Callable[[str], NatsServer] = request.getfixturevalue("start_nats")
    server = start_nats("nats-requests")
    yield Plane("NATS", Planes(etcd=etcd_server.url, nats=server.url), lambda: deliveries(server))


def sizes(folder: Path) -> dict[str, int]:
    """Files below a folder, and their bytes."""
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }


def deliveries(server: NatsServer) -> dict[str, int]:
    """Subjects that a server's clients listen to, and messages that each was delivered."""
    found: dict[str, int] = {}
    for connection in server.connections():
        for one in connection.subscriptions:
            found[one.subject] = found.get(one.subject, 0) + one.messages
    return found


def test_other_planes_carry_what_they_are_given(
    lab: Lab, routing_size: routing.Size, start_dynamo: StartDynamo, plane: Plane, record: Recorder
) -> None:
    """Discovery by files and requests over NATS serve the same answers, and leave their traces there.

    Files need a folder that all share, and no daemon; etcd needs a daemon, and tells watchers by itself. NATS
    puts a broker between frontend and worker, so that neither has to reach the other directly: the worker
    listens to a subject of its own, and every request is a message to it.
    """
    small = routing.workers_lab(lab, routing_size)
    node = routing.workers_nodes(lab)[:1]
    deployed = start_dynamo(small, f"@{plane.name.lower()}", planes=plane.planes, nodes=node)
    try:
        (worker,) = deployed.workers
        with deployed.routed(ROUND_ROBIN) as topology:
            prompt = openai.prompt_of(40, secrets.randbelow(40_000))
            before = plane.seen()
            request = body(topology.served_name, prompt, OUTPUT_TOKENS)
            answers = [openai.complete(topology.router.url, request) for _ in range(REQUESTS)]
            after = plane.seen()
        instance = worker.instance
    finally:
        deployed.stop()
    assert [len(answer.token_ids) for answer in answers] == [OUTPUT_TOKENS] * REQUESTS
    record.numbers("TTFT", [answer.ttft_s for answer in answers], "s", what="requests", arm=plane.name)
    own = {name: count for name, count in after.items() if instance in name}
    record.numbers("names with the worker's number", [len(own)], "names", arm=plane.name,
                   command=worker.plan.command, note="; ".join(sorted(own)))  # fmt: skip
    assert own, f"{plane.name}: nothing names worker {instance}; there is {sorted(after)}"
    if plane.planes.nats:
        came = sum(count - before.get(name, 0) for name, count in own.items())
        assert came == REQUESTS, f"{REQUESTS} requests, {came} messages to the worker's subjects: {own}"

"""NATS: a message broker that Dynamo can send requests and events through; the server, and what it says of
itself.

Messages are sent and received with nats-py, the client of the NATS authors; this module does without it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import httpx

from disagglab.address import url_of
from disagglab.config.schema import Lab
from disagglab.errors import LabError
from disagglab.hosts.host import Host, HostProcess
from disagglab.serving import http
from disagglab.serving.service import HTTP_TIMEOUT_S, Service

MEND = "make setup DYNAMO=1"
READY_DEADLINE_S = 60.0  # ready after less than a second where nothing else runs
NS_PER_S = 1e9


@dataclass(frozen=True)
class Subscription:
    """What a connection listens to. ``queue``: its queue group, or empty; ``messages``: delivered so far."""

    subject: str
    queue: str
    messages: int


@dataclass(frozen=True)
class NatsClient:
    """A client, by the name it gave itself."""

    name: str
    subscriptions: tuple[Subscription, ...]


@dataclass(frozen=True)
class Stream:
    """A stream that JetStream keeps. ``storage``: file or memory; sequence numbers count from 1."""

    name: str
    subjects: tuple[str, ...]
    storage: str
    messages: int
    first_sequence: int
    last_sequence: int
    consumers: int


@dataclass(frozen=True)
class JetStream:
    """The part of the server that keeps messages. ``sync_interval_s``: how long what it has acknowledged may
    lie in the kernel's memory alone.
    """

    store: str
    sync_interval_s: float
    streams: tuple[Stream, ...]


@dataclass
class NatsServer(Service):
    """A NATS server. ``url`` is what clients and Dynamo's ``NATS_SERVER`` take.

    ``monitor``: URL of its HTTP answers. ``store``: folder of JetStream on the host, which outlives the
    process.
    """

    name: str
    url: str
    monitor: str
    store: str
    argv: tuple[str, ...]
    process: HostProcess
    cpus: tuple[int, ...]
    ports: tuple[int, ...]

    @property
    def command(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.argv)

    def connections(self) -> tuple[NatsClient, ...]:
        """The clients that are connected now, with their subscriptions."""
        return parse_connections(self._read("/connz?subs=detail"))

    def jetstream(self) -> JetStream:
        """What JetStream holds now."""
        return parse_jetstream(self._read("/jsz?streams=true&config=true"))

    def is_ready(self) -> bool:
        """Whether it says that it is healthy, JetStream included."""
        try:
            answer = http.get(f"{self.monitor}/healthz", HTTP_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK and answer.json().get("status") == "ok"

    def kill(self) -> None:
        """End it as a crash would, with SIGKILL; return when it is gone. Its store stays."""
        super().kill()
        self.process.stop()

    def restart(self) -> None:
        """Start it again after :meth:`kill`, on the same ports and the same store; return when it is ready.

        Raises:
            StartError: if it ends or is not ready in time; the message holds the end of its log.
        """
        self.process = self.process.host.start(self.name, self.argv, {}, self.cpus, self.ports)
        self.await_ready(READY_DEADLINE_S)

    def stop(self) -> None:
        """End it and delete its store."""
        super().stop()
        self.process.host.facts.check_output("rm -rf -- %s", self.store)

    def _read(self, path: str) -> dict[str, Any]:
        try:
            answer = http.get(f"{self.monitor}{path}", HTTP_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise LabError(f"{self.name} {self.monitor}{path}: {error}; see {self.process.log}") from error
        if answer.status_code != httpx.codes.OK:
            raise LabError(f"{self.name} {self.monitor}{path} answers {answer.status_code}: {answer.text}")
        found: dict[str, Any] = answer.json()
        return found


def parse_connections(answer: Mapping[str, Any]) -> tuple[NatsClient, ...]:
    """``/connz?subs=detail``, in the order of the server.

    Raises:
        LabError: if the answer is only a part of them.
    """
    if len(answer["connections"]) < answer["total"]:
        raise LabError(f"NATS listed {len(answer['connections'])} of {answer['total']} connections")
    return tuple(
        NatsClient(
            row.get("name", ""),
            tuple(
                Subscription(one["subject"], one.get("qgroup", ""), one["msgs"])
                for one in row.get("subscriptions_list_detail", ())
            ),
        )
        for row in answer["connections"]
    )


def parse_jetstream(answer: Mapping[str, Any]) -> JetStream:
    """``/jsz?streams=true&config=true``: the streams of every account, by name."""
    rows = [
        row for account in answer.get("account_details", ()) for row in account.get("stream_detail") or ()
    ]
    streams = [
        Stream(
            name=row["name"],
            subjects=tuple(row["config"]["subjects"]),
            storage=row["config"]["storage"],
            messages=row["state"]["messages"],
            first_sequence=row["state"]["first_seq"],
            last_sequence=row["state"]["last_seq"],
            consumers=row["state"]["consumer_count"],
        )
        for row in rows
    ]
    config = answer["config"]
    ordered = tuple(sorted(streams, key=lambda stream: stream.name))
    return JetStream(config["store_dir"], config["sync_interval"] / NS_PER_S, ordered)


def find_nats(host: Host, beside: str) -> str:
    """Path of the program on a host. ``beside``: the folder there that is looked into before PATH.

    Raises:
        LabError: if it is in neither.
    """
    path = str(PurePosixPath(beside) / "nats-server")
    if host.exists(path):
        return path
    try:
        return str(host.facts.find_command("nats-server"))
    except ValueError as error:
        raise LabError(f"host {host.name} has no nats-server in {beside} or PATH; {MEND}") from error


def nats_argv(program: str, address: str, port: int, monitor_port: int, store: str) -> list[str]:
    """The command of a server alone, with JetStream."""
    return [
        *(program, "-a", address, "-p", str(port), "-m", str(monitor_port)),
        *("-js", "-sd", store),
    ]


def start_nats(host: Host, lab: Lab, program: str, name: str = "nats") -> NatsServer:
    """Start a NATS server beside the controller, its store in this run's folder; return when it is ready.

    Raises:
        StartError: if it ends or is not ready in time; the message holds the end of its log. Nothing of it
            is left then.
    """
    address = lab.controller.address
    ports = (host.reserve_port(address), host.reserve_port(address))
    store = str(PurePosixPath(host.about["logs"]) / f"{name}-store")
    argv = nats_argv(program, address, *ports, store)
    cpus = tuple(lab.controller.cpus)
    process = host.start(name, argv, {}, cpus, ports)
    urls = (url_of(address, ports[0], "nats"), url_of(address, ports[1]))
    server = NatsServer(name, *urls, store, tuple(argv), process, cpus, ports)
    return server.brought_up(READY_DEADLINE_S)

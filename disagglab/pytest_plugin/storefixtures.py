"""Fixtures of the two stores that Dynamo can stand on: etcd and NATS, ready, and gone afterwards.

Who never asked for them need not have them: a missing program is a skip with the command that mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagglab.config.schema import Lab
from disagglab.errors import LabError
from disagglab.hosts.hosts import Hosts
from disagglab.install.environments import dynamo_python
from disagglab.results.run_folder import Store
from disagglab.serving.dynamo import etcd, nats
from disagglab.serving.dynamo.etcd import EtcdServer
from disagglab.serving.dynamo.nats import NatsServer


@pytest.fixture(scope="session")
def etcd_program(hosts: Hosts) -> str:
    """Path of etcd on the controller."""
    try:
        return etcd.find_etcd(hosts.controller)
    except LabError as error:
        pytest.skip(f"NO-ETCD: {error}")


@pytest.fixture(scope="session")
def etcd_server(hosts: Hosts, lab: Lab, store: Store, etcd_program: str) -> Iterator[EtcdServer]:
    """An etcd of one member, empty at the start of the session."""
    server = etcd.start_etcd(hosts.controller, lab, etcd_program)
    store.commands["etcd"] = server.command
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nats_program(hosts: Hosts) -> str:
    """Path of the NATS server on the controller."""
    checkout = Path(hosts.controller.suite_python).parents[2]
    try:
        return nats.find_nats(hosts.controller, str(dynamo_python(checkout).parent))
    except LabError as error:
        pytest.skip(f"NO-NATS: {error}")


@pytest.fixture(scope="session")
def nats_server(hosts: Hosts, lab: Lab, store: Store, nats_program: str) -> Iterator[NatsServer]:
    """A NATS server with JetStream, which no test ends."""
    server = nats.start_nats(hosts.controller, lab, nats_program)
    store.commands["nats"] = server.command
    yield server
    server.stop()


@pytest.fixture
def start_nats(hosts: Hosts, lab: Lab, nats_program: str) -> Iterator[Callable[[str], NatsServer]]:
    """Starts a NATS server of the test's own, by name, which it may end."""
    started: list[NatsServer] = []

    def start(name: str) -> NatsServer:
        started.append(nats.start_nats(hosts.controller, lab, nats_program, name))
        return started[-1]

    yield start
    for server in started:
        server.stop()

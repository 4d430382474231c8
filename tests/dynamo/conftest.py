"""Fixtures of the Dynamo lesson: the stores that it can stand on, workers that are ready and registered,
frontends that have found them, and what was seen while workers came and went.

Who never asked for etcd or NATS need not have them: a missing program is a skip with the command that mends
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import LabError
from disagglab.experiments import routing, scaling_events
from disagglab.experiments.scaling_events import Added, Crew, Killed, Removed
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.install.environments import dynamo_python
from disagglab.pytest_plugin.session import Session
from disagglab.results.run_folder import Store
from disagglab.serving.boot import USUAL_START_S
from disagglab.serving.dynamo import etcd, nats
from disagglab.serving.dynamo.deployment import PAIR_TAG, WORKERS_TAG, DynamoDeployment
from disagglab.serving.dynamo.etcd import EtcdServer
from disagglab.serving.dynamo.nats import NatsServer
from disagglab.serving.dynamo.parts import AGGREGATED, KV, ROUND_ROBIN, Planes, Worker
from disagglab.serving.topology import DISAGGREGATED, Topology

StartDynamo = Callable[..., DynamoDeployment]


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
    with etcd.start_etcd(hosts.controller, lab, etcd_program) as server:
        store.commands["etcd"] = server.command
        yield server


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
    with nats.start_nats(hosts.controller, lab, nats_program) as server:
        store.commands["nats"] = server.command
        yield server


@pytest.fixture
def start_nats(hosts: Hosts, lab: Lab, nats_program: str) -> Iterator[Callable[[str], NatsServer]]:
    """Starts a NATS server of the test's own, by name, which it may end."""
    with contextlib.ExitStack() as ended:
        yield lambda name: ended.enter_context(nats.start_nats(hosts.controller, lab, nats_program, name))


@pytest.fixture(scope="session")
def dynamo(hosts: Hosts) -> str:
    """The Python that has Dynamo; for labs of one host."""
    python = dynamo_python(Path(hosts.controller.suite_python).parents[2])
    if not hosts.controller.exists(str(python)):
        pytest.skip(f"NO-DYNAMO: {python} is not there; mend: make setup DYNAMO=1")
    return str(python)


@pytest.fixture(scope="session")
def start_dynamo(
    live: Session, hosts: Hosts, weights: Model, dynamo: str, etcd_server: EtcdServer
) -> Callable[..., Any]:
    """Starts a deployment and waits for it: a lab, a tag, then arguments of
    :class:`~disagglab.serving.dynamo.deployment.DynamoDeployment`. Who asks for it ends it.
    """

    def start(
        lab: Lab,
        tag: str,
        mode: str = AGGREGATED,
        planes: Planes | None = None,
        nodes: Sequence[NodeSection] | None = None,
        **settings: Any,
    ) -> DynamoDeployment:
        joined = planes or Planes(etcd=etcd_server.url)
        deployed = DynamoDeployment(
            hosts, lab, weights, dynamo, joined, mode, nodes=nodes, tag=tag, **settings
        )
        with contextlib.ExitStack() as undo:
            undo.enter_context(deployed)
            with live.uncaptured():
                deployed.start(live.progress(f"workers{tag}", USUAL_START_S))
            for worker in deployed.workers:
                note(live, worker, tag)
            undo.pop_all()
        return deployed

    return start


def note(live: Session, worker: Worker, tag: str) -> None:
    """Keep a worker's command and how long its start took, for the report."""
    name = f"{worker.name}{tag}"
    live.store.commands[f"server {name}"] = worker.plan.command
    live.store.write_meta(ready_s={**live.store.meta.get("ready_s", {}), name: worker.ready_s})


@pytest.fixture(scope="session")
def dynamo_workers(
    lab: Lab, routing_size: routing.Size, start_dynamo: StartDynamo
) -> Iterator[DynamoDeployment]:
    """Two equal workers, each with a small cache of blocks of 32 tokens, as the routing tests have them."""
    small = routing.workers_lab(lab, routing_size)
    with start_dynamo(small, WORKERS_TAG, nodes=routing.workers_nodes(lab)) as deployed:
        yield deployed


@pytest.fixture(scope="module")
def dynamo_pair(lab: Lab, start_dynamo: StartDynamo) -> Iterator[DynamoDeployment]:
    """One worker that prefills and one that decodes, KV over [transport]."""
    with start_dynamo(lab, PAIR_TAG, DISAGGREGATED, nodes=(lab.prefill[0], lab.decode[0])) as deployed:
        yield deployed


@pytest.fixture(scope="module")
def round_robin(live: Session, dynamo_workers: DynamoDeployment) -> Iterator[Topology]:
    """The two workers behind a frontend that takes them in turns."""
    with dynamo_workers.routed(ROUND_ROBIN) as topology:
        live.store.commands[f"router {topology.name}"] = topology.router.command
        yield topology


@pytest.fixture(scope="module")
def kv_routed(live: Session, dynamo_workers: DynamoDeployment) -> Iterator[Topology]:
    """The two workers behind a frontend that goes by what their caches hold."""
    with dynamo_workers.routed(KV) as topology:
        live.store.commands[f"router {topology.name}"] = topology.router.command
        yield topology


@pytest.fixture(scope="module")
def crew(live: Session, store: Store, dynamo_workers: DynamoDeployment) -> Iterator[Crew]:
    """Frontends over the session's workers, and room for guests whose drain suits this machine's speed."""
    with scaling_events.gathered(dynamo_workers, live.short) as found:
        store.commands["frontend that migrates"] = found.migrating.command
        yield found


@pytest.fixture(scope="module")
def added(live: Session, crew: Crew) -> Added:
    """Two workers, started while requests flow."""
    with live.uncaptured():
        return scaling_events.add(crew, live.progress("two workers more"))


@pytest.fixture(scope="module")
def removed(crew: Crew, added: Added) -> Removed:
    """The first guest, asked to go while three streams come from it and others flow."""
    return scaling_events.remove(crew, added)


@pytest.fixture(scope="module")
def killed(crew: Crew, added: Added, removed: Removed) -> Killed:
    """The second guest, killed while three streams come from it; requests flow until its key has gone."""
    return scaling_events.kill(crew, added)

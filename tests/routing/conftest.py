"""The fixture of the routing tests: two equal plain servers, whatever the lab's nodes do otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from disagglab.config import ipv4
from disagglab.config.schema import Lab
from disagglab.experiments import routing
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.pytest_plugin.session import Session
from disagglab.serving.topology import Deployment

START_BUDGET_S = 60.0  # shown beside the elapsed time of a start, not enforced


@pytest.fixture(scope="session")
def workers(
    live: Session, lab: Lab, hosts: Hosts, weights: Model, shape: KvShape, routing_size: routing.Size
) -> Iterator[Deployment]:
    """Two equal servers on the lab's first nodes, without a KV connector, with small caches and KV events."""
    if len(layout(shape, routing.BLOCK_SIZE).groups) > 1:
        pytest.skip("HYBRID: sliding layers free blocks while a request runs, so hits follow another rule")
    for problem in ipv4.problems(lab, routing.workers_nodes(lab), ipv4.KV_EVENTS):
        pytest.skip(f"IPV6: {problem.key}: {problem.wrong}")
    deployed = routing.workers(hosts, lab, weights, routing_size)
    try:
        with live.uncaptured():
            deployed.start(live.progress("workers", START_BUDGET_S))
        for server in deployed.servers:
            name = f"{server.name}{routing.TAG}"
            live.store.commands[f"server {name}"] = server.plan.command
            live.store.write_meta(ready_s={**live.store.meta.get("ready_s", {}), name: server.ready_s})
        yield deployed
    finally:
        deployed.stop()

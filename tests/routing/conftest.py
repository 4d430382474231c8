"""The fixture of the routing tests: two equal plain servers, whatever the lab's nodes do otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from disagglab.config.schema import Lab
from disagglab.experiments import routing
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.pytest_plugin.session import Session
from disagglab.serving.boot import USUAL_START_S
from disagglab.serving.topology import Deployment, running


@pytest.fixture(scope="session")
def workers(
    live: Session,
    lab: Lab,
    one_table: None,
    prefix_cache: None,
    hosts: Hosts,
    weights: Model,
    routing_size: routing.Size,
) -> Iterator[Deployment]:
    """Two equal servers on the lab's first nodes, without a KV connector, with small caches and KV events."""
    deployed = routing.workers(hosts, lab, weights, routing_size)
    with contextlib.ExitStack() as ended:
        with live.uncaptured():
            ended.enter_context(running([deployed], lambda _: live.progress("workers", USUAL_START_S)))
        for server in deployed.servers:
            name = f"{server.name}{routing.TAG}"
            live.store.commands[f"server {name}"] = server.plan.command
            live.store.write_meta(ready_s={**live.store.meta.get("ready_s", {}), name: server.ready_s})
        yield deployed

"""What runs over IPv4 alone, and which addresses of a lab stand in its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from disagglab.address import is_ipv6
from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import ConfigError, Problem

# vLLM 0.31.0, distributed/kv_events.py: a publisher binds tcp://*:PORT on a socket without ZMQ_IPV6, and
# tcp://[::]:PORT fails with "No such device".
KV_EVENTS = "vLLM publishes KV events over IPv4 alone"
DYNAMO = f"Dynamo's workers publish KV events, and {KV_EVENTS}"


def problems(lab: Lab, nodes: Sequence[NodeSection], why: str, controller: bool = False) -> Iterator[Problem]:
    """Addresses of these nodes, and of the controller if it takes part, that are IPv6."""
    names = {node.name for node in nodes}
    asked = [
        (f"node[{number}].address", node.address)
        for number, node in enumerate(lab.nodes)
        if node.name in names
    ]
    asked += [("controller.address", lab.controller.address)] if controller else []
    for key, address in asked:
        if is_ipv6(address):
            mend = "write an IPv4 address, or leave out what needs it: tests/routing, tests/dynamo"
            yield Problem(lab.where(key), key, f"{address} is IPv6, and {why}", mend)


def require(lab: Lab, nodes: Sequence[NodeSection], why: str, controller: bool = False) -> None:
    """Refuse to start what runs over IPv4 alone on other addresses.

    Raises:
        ConfigError: see :func:`problems`.
    """
    if found := list(problems(lab, nodes, why, controller)):
        raise ConfigError(found)

"""Hosts that a lab makes on this machine: what their two nodes have to say, the addresses of their links."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from disagglab.config.schema import HostSection, NodeSection, TransportSection
from disagglab.errors import Problem


def problems(
    hosts: tuple[HostSection, ...],
    nodes: tuple[NodeSection, ...],
    transport: TransportSection | None,
    file: str,
) -> Iterator[Problem]:
    """What is wrong with a lab that makes its hosts; nothing where it makes none."""
    made = [(index, host) for index, host in enumerate(hosts) if host.namespace]
    if not made:
        return
    first = f"host[{made[0][0]}]"
    on = {host.name: [i for i, node in enumerate(nodes) if node.host == host.name] for _, host in made}
    if len(made) != 2 or any(len(indexes) != 1 for indexes in on.values()):
        wrong = "two hosts with one node each can be made"
        yield Problem(file, f"{first}.namespace", wrong, "set namespace = true on two hosts, or on none")
        return
    names = {host.name for _, host in made}
    for index, node in enumerate(nodes):
        if node.host not in names:
            wrong = f"{node.host} beside made hosts"
            yield Problem(file, f"node[{index}].host", wrong, "put every node on a made host, or none")
    for index, host in made:
        for key in ("address", "port", "user", "key_file", "known_hosts", "jump"):
            if getattr(host, key) is not None:
                yield Problem(file, f"host[{index}].{key}", "given for a host that is made", "remove it")
    asked = [indexes[0] for indexes in on.values()]
    for index in asked:
        for name in ("data_address", "interface"):
            if getattr(nodes[index], name) is None:
                yield Problem(file, f"node[{index}].{name}", "missing on a made host", f"add {name} = …")
        try:
            control_peer(nodes[index])
        except ValueError as error:
            mend = "write a usable IPv4 address of a /30 of its own, such as 198.18.1.2"
            yield Problem(file, f"node[{index}].address", str(error), mend)
    for name, bits, joined in (("address", 30, False), ("data_address", 24, True)):
        given = [getattr(nodes[index], name) for index in asked if getattr(nodes[index], name)]
        try:
            networks = {ipaddress.IPv4Network(f"{address}/{bits}", strict=False) for address in given}
        except ValueError as error:
            mend = "write an IPv4 address, such as 198.18.9.1; a made host has no other names"
            yield Problem(file, f"node[{asked[0]}].{name}", str(error), mend)
            continue
        if len(given) == 2 and (len(networks) == 1) != joined:
            wrong = f"{' and '.join(given)} are {'not ' * joined}in one /{bits}"
            mend = "put them into one" if joined else "give each control link a network of its own"
            yield Problem(file, f"node[{asked[0]}].{name}", wrong, mend)
    if transport is not None and set(transport.ucx_tls or ["any"]) - {"tcp", "self"}:
        wrong = "shared memory does not join hosts"
        yield Problem(file, "transport.ucx_tls", wrong, 'set it to ["tcp", "self"]')


def control_peer(node: NodeSection) -> str:
    """This machine's end of a made host's control link: the other address of its /30.

    Raises:
        ValueError: if the node's address is not one of the two usable ones of a /30.
    """
    network = ipaddress.IPv4Network(f"{node.address}/30", strict=False)
    hosts = [str(host) for host in network.hosts()]
    if node.address not in hosts:
        raise ValueError(f"{node.address} is not a usable address of {network}")
    return next(host for host in hosts if host != node.address)

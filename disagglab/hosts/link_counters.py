"""The third ledger: what the network interface of a node's data link counted.

Connector and scheduler are told by the software that they count; the interface counts frames. It must have
carried at least the connector's bytes, and not more than those with the headers of their protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.config.schema import NodeSection
from disagglab.errors import InvalidRun, StartError, TransferError
from disagglab.hosts import facts
from disagglab.hosts.host import Host

RDMA_UNIT = 4  # bytes: port_*_data count 32-bit words (InfiniBand specification, PortCounters)
RDMA_MTU = 1024  # bytes, the smallest that RoCE links use; smaller frames, more headers
ETHERNET, IP, TCP = 14, 20, 32  # bytes of header a frame; TCP with time stamps
UCX_SHARE = 0.01  # UCX's own headers, and acknowledgements
REQUEST_BYTES = 64 * 1024  # a request's handshake, lease renewals and notification


@dataclass(frozen=True)
class Wire:
    """Counters of a node's data link at one moment, bytes since the interface came up. ``mtu``: bytes."""

    node: str
    source: str
    received: int
    sent: int
    mtu: int


def read(host: Host, node: NodeSection) -> Wire | None:
    """Counters of a node's data link, on its host; None where the lab file names neither interface nor RDMA
    device.

    RDMA devices are preferred: their traffic does not show in the interface's own counters.

    Raises:
        InvalidRun: if the device is named and exposes no counters.
    """
    if node.rdma:
        ports = [f"/sys/class/infiniband/{device}/ports/1/counters" for device in node.rdma]
        received, sent = (
            RDMA_UNIT * sum(_number(host, node, f"{port}/port_{side}_data") for port in ports)
            for side in ("rcv", "xmit")
        )
        return Wire(node.name, " + ".join(ports), received, sent, RDMA_MTU)
    if node.interface is None:
        return None
    source = "/proc/net/dev"
    for line in host.read_text(source).splitlines():
        name, _, values = line.partition(":")
        if name.strip() == node.interface:
            numbers = [int(value) for value in values.split()]  # 8 receive columns, then 8 transmit columns
            mtu = int(facts.network(host.facts, node.kv_address)["MTU"])
            return Wire(node.name, source, numbers[0], numbers[8], mtu)
    raise InvalidRun(f"{node.name} has no interface {node.interface}; look: cat {source}")


def read_all(places: Sequence[tuple[Host, NodeSection]]) -> Wire | None:
    """The data links of several nodes as one; None where a node names neither interface nor RDMA device.

    Bytes are summed, and a link that nodes of one host share counts once; ``mtu`` is the smallest.

    Raises:
        InvalidRun: see :func:`read`.
    """
    links = {(host.name, node.interface, *node.rdma): (host, node) for host, node in places}
    found = [wire for host, node in links.values() if (wire := read(host, node)) is not None]
    if len(found) < len(links):
        return None
    return Wire(
        " + ".join(wire.node for wire in found),
        " + ".join(dict.fromkeys(wire.source for wire in found)),
        sum(wire.received for wire in found),
        sum(wire.sent for wire in found),
        min(wire.mtu for wire in found),
    )


def _number(host: Host, node: NodeSection, path: str) -> int:
    try:
        return int(host.read_text(path))
    except (OSError, ValueError, StartError) as error:
        raise InvalidRun(f"{node.name} exposes no {path} ({error}); look: rdma link show") from error


def received(before: Wire, after: Wire) -> int:
    """Bytes that a node received between two readings.

    Raises:
        InvalidRun: if the counter fell or another source was read.
    """
    if before.source != after.source:
        raise InvalidRun(f"{after.node}: the wire was read from {before.source} and then from {after.source}")
    grown = after.received - before.received
    if grown < 0:
        raise InvalidRun(f"{after.node}: the receive counter of {after.source} fell by {-grown:,} B")
    return grown


def most(kv_bytes: int, requests: int, mtu: int) -> int:
    """Bytes that ``kv_bytes`` in ``requests`` transfers may take on a wire, headers included."""
    headers = (ETHERNET + IP + TCP) / (mtu - IP - TCP)
    return round(kv_bytes * (1 + headers + UCX_SHARE)) + requests * REQUEST_BYTES


def prove(before: Wire, after: Wire, kv_bytes: int, requests: int) -> int:
    """Check that the wire carried the connector's bytes to a decode node; return what it carried.

    Raises:
        InvalidRun: see :func:`received`.
        TransferError: if it carried less than the connector counted, or more than protocol overhead explains.
    """
    carried = received(before, after)
    limit = most(kv_bytes, requests, after.mtu)
    if not kv_bytes <= carried <= limit:
        raise TransferError(
            f"{after.node}: the connector counted {kv_bytes:,} B in {requests} requests, the wire carried"
            f" {carried:,} B; expected {kv_bytes:,} to {limit:,} B; look: cat {after.source}"
        )
    return carried

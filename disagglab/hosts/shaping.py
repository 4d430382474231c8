"""The rate of a link, set and read back: a token bucket filter at each end (``tc … tbf``, man 8 tc-tbf).

For links that are ours, so for made hosts alone: another's network is not reshaped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import InvalidRun
from disagglab.hosts.host import Host
from disagglab.hosts.hosts import Hosts

BITS = 8
LIMIT_S = 30.0
LATENCY = "100ms"  # longest wait of a packet in the queue before it is dropped
BURST_S = 0.008  # of the rate: the bucket is refilled once a timer tick, 4 to 10 ms
SMALLEST_BURST = 256 * 1024  # bytes; a veth pair hands over segments of 64 KiB
TOLERANCE = 0.01  # tc keeps the rate in whole bytes a second


def command(node: NodeSection, bit_s: float | None) -> list[str]:
    """What sets the rate of a node's data link; None takes the limit away.

    Raises:
        ValueError: if the node names no interface.
    """
    if node.interface is None:
        raise ValueError(f"{node.name} names no interface")
    if bit_s is None:
        return ["tc", "qdisc", "delete", "dev", node.interface, "root"]
    burst = max(SMALLEST_BURST, round(bit_s / BITS * BURST_S))
    words = ["tc", "qdisc", "replace", "dev", node.interface, "root", "tbf"]
    return [*words, "rate", f"{bit_s:.0f}bit", "burst", f"{burst}b", "latency", LATENCY]


def rate_of(host: Host, node: NodeSection) -> float | None:
    """The rate that the kernel limits a node's data link to, bit/s; None if it is not limited."""
    text = host.facts.check_output("tc -json qdisc show dev %s", node.interface)
    return rate_in(text)


def rate_in(text: str) -> float | None:
    """The rate in what ``tc -json qdisc show`` prints, bit/s."""
    for row in json.loads(text):
        if row["kind"] == "tbf":
            return float(row["options"]["rate"]) * BITS
    return None


def set_rate(hosts: Hosts, lab: Lab, bit_s: float | None) -> None:
    """Limit both directions of the link between the made hosts, or lift the limit; see that it is so.

    Raises:
        InvalidRun: if the kernel says another rate afterwards.
    """
    for node in lab.nodes:
        host = hosts.of(node)
        if bit_s is None and rate_of(host, node) is None:
            continue
        host.run(f"tc-{node.name}", command(node, bit_s), {}, LIMIT_S)
        found = rate_of(host, node)
        if (found is None) != (bit_s is None) or (bit_s and abs((found or 0) / bit_s - 1) > TOLERANCE):
            raise InvalidRun(
                f"{node.name}: the link was set to {bit_s} bit/s, the kernel says {found};"
                f" look: tc qdisc show dev {node.interface}"
            )


@contextlib.contextmanager
def lifted_afterwards(hosts: Hosts, lab: Lab) -> Iterator[None]:
    """Whatever rate is set within, the link has no limit afterwards."""
    try:
        yield
    finally:
        set_rate(hosts, lab, None)

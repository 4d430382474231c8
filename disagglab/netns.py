"""Network namespaces of this machine as nodes' networks: own addresses, own ports, a link of their own
between them.

Each namespace is held by an owned process and has no name in the file system, so it disappears with its last
process, and its interfaces with it: nothing can be left behind, however a session ends. A node in a namespace
is reached over a control link to this machine's own namespace; KV blocks go over the data link, which nothing
else uses, so its counters are a ledger of the wire. Needs root, and iproute2 and util-linux's nsenter.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disagglab.errors import StartError
from disagglab.process import OwnedProcess
from disagglab.section import NodeSection

CLONE_NEWNET = 0x40000000  # linux/sched.h
CONTROL_INTERFACE = "control0"
# UCX finds interfaces in /sys, so the holder also has a /sys of its own namespace.
# A connection whose process was killed would keep the namespace alive for minutes, sending to nobody.
SETTINGS = ("net/ipv4/tcp_orphan_retries", "net/ipv4/tcp_fin_timeout")
MOUNT_SYS = " && ".join(
    ["mount -t sysfs sysfs /sys", *(f"echo 1 > /proc/sys/{name}" for name in SETTINGS), 'exec "$@"']
)
WAIT = "import signal; signal.pause()"
HOLD = [
    *("unshare", "--net", "--mount", "--propagation", "private", "--"),
    *("sh", "-c", MOUNT_SYS, "sh", sys.executable, "-c", WAIT),
]
READY_DEADLINE_S = 10.0
POLL_S = 0.02


@dataclass(frozen=True)
class Namespace:
    """A network namespace, held by a process of ours."""

    holder: OwnedProcess

    @property
    def pid(self) -> int:
        """Process that holds it."""
        assert self.holder.identity is not None
        return self.holder.identity.pid

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` in this namespace."""
        spaces = [f"--{kind}=/proc/{self.pid}/ns/{file}" for kind, file in (("net", "net"), ("mount", "mnt"))]
        return ["nsenter", *spaces, "--", *argv]

    def socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket of this namespace, for a process outside of it."""
        made: list[socket.socket | OSError] = []

        def enter() -> None:  # a thread of its own: setns moves the calling thread only
            try:
                enter_namespace(self.pid)
                made.append(socket.socket(family, kind))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise StartError(f"cannot open a socket in the namespace of process {self.pid}: {made[0]}")
        return made[0]


def enter_namespace(pid: int) -> None:
    """Move the calling thread into the network namespace of a process.

    Raises:
        OSError: if the process is gone, or this one is not root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")


def wait_until_own(namespace: Namespace) -> None:
    """Wait until the holder has a network namespace and a /sys other than ours.

    Raises:
        StartError: if it ends first (it needs root), or takes too long.
    """
    deadline = time.monotonic() + READY_DEADLINE_S
    python = os.path.realpath(sys.executable)
    while time.monotonic() < deadline and namespace.holder.alive:
        try:
            if os.readlink(f"/proc/{namespace.pid}/exe") == python:  # the last step of HOLD
                return
        except OSError:
            break
        time.sleep(POLL_S)
    last = namespace.holder.log.read_text(errors="replace").strip().splitlines()[-1:]
    raise StartError(
        f"no network namespace for {namespace.holder.name}: {' '.join(last) or 'no reason given'};"
        " nodes with namespace = true need root: run as root, or use another lab"
    )


def control_peer(node: NodeSection) -> str:
    """This machine's end of a node's control link: the other address of its /30.

    Raises:
        ValueError: if the node's address is not one of the two usable ones of a /30.
    """
    network = ipaddress.ip_network(f"{node.address}/30", strict=False)
    hosts = [str(host) for host in network.hosts()]
    if node.address not in hosts:
        raise ValueError(f"{node.address} is not a usable address of {network}")
    return next(host for host in hosts if host != node.address)


def outer_script(nodes: Sequence[NodeSection], namespaces: Sequence[Namespace]) -> list[str]:
    """``ip -batch`` lines for our own namespace: a control link a node, and the data link between the two."""
    lines = []
    for node, namespace in zip(nodes, namespaces, strict=True):
        mine = f"dl{namespace.pid}"
        lines += [
            f"link add {mine} type veth peer name {CONTROL_INTERFACE} netns {namespace.pid}",
            f"addr add {control_peer(node)}/30 dev {mine}",
            f"link set {mine} up",
        ]
    (first, second), (here, there) = nodes, namespaces
    lines.append(
        f"link add {first.interface} netns {here.pid} type veth"
        f" peer name {second.interface} netns {there.pid}"
    )
    return lines


def inner_script(node: NodeSection) -> list[str]:
    """``ip -batch`` lines for a node's namespace."""
    return [
        "link set lo up",
        f"addr add {node.address}/30 dev {CONTROL_INTERFACE}",
        f"link set {CONTROL_INTERFACE} up",
        f"addr add {node.data_address}/24 dev {node.interface}",
        f"link set {node.interface} up",
    ]


def write_script(folder: Path, name: str, lines: Sequence[str]) -> Path:
    """Keep a batch beside the logs, where a reader finds what was run."""
    path = folder / f"{name}.ip"
    path.write_text("\n".join(lines) + "\n")
    return path

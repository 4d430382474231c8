"""Two hosts made on this machine: own name, addresses, process list, /dev/shm, OpenSSH server and cores each,
joined by a link of their own.

A made host is a set of Linux namespaces held by one owned process; it has no name in the file system, so it
disappears with that process, and all its processes and interfaces with it: nothing is left behind, however a
session ends. It is reached over a control link by SSH, as any other host; KV blocks go over the data link,
which nothing else uses. Needs root, iproute2, util-linux and OpenSSH's server. Files are shared with this
machine, but for /dev/shm, /run and /sys.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from disagglab.agent.port import accepts
from disagglab.config.madehosts import control_peer
from disagglab.config.schema import HostSection, NodeSection
from disagglab.errors import StartError

if TYPE_CHECKING:
    from disagglab.hosts.host import Host, HostProcess

CONTROL_INTERFACE = "control0"
PREFIX = "made-host-"  # of the names of the processes that hold them
SSHD = "/usr/sbin/sshd"
SSH_PORT = 22  # of a network namespace of its own, where nobody else listens
READY_DEADLINE_S = 20.0
NETWORK_LIMIT_S = 30.0
GRACE_S = 0.2  # unshare ignores SIGTERM; its children die with it
POLL_S = 0.02
PROGRAMS = {
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "unshare": "util-linux",
}
SEARCH_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
SSHD_OPTIONS = (
    "AuthorizedKeysFile=$TMPDIR/client_key.pub",
    "HostKey=$TMPDIR/host_key",
    "PermitRootLogin=prohibit-password",
    "PasswordAuthentication=no",
    "KbdInteractiveAuthentication=no",
    "UsePAM=no",
    "StrictModes=no",  # its files lie below the temporary folder, which others may write to
    "UseDNS=no",
    "PidFile=none",
    "MaxSessions=100",
)
# UCX finds interfaces in /sys, so it has to be that of the host's own network namespace. A connection whose
# process was killed would keep the namespace alive for minutes, sending to nobody.
SETTINGS = ("net/ipv4/tcp_orphan_retries", "net/ipv4/tcp_fin_timeout")
BOOT = "\n".join(
    [
        "set -e",
        "mount -t sysfs sysfs /sys",
        "mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
        "mount -t tmpfs -o mode=755 tmpfs /run",
        "mkdir -m 755 /run/sshd",
        'hostname "$1"',
        *(f"echo 1 > /proc/sys/{name}" for name in SETTINGS),
        'for key in host_key client_key; do ssh-keygen -q -t ed25519 -N "" -C "" -f "$TMPDIR/$key"; done',
        'exec "$2" -D -e -f /dev/null ' + " ".join(f'-o "{option}"' for option in SSHD_OPTIONS),
    ]
)
UNSHARE = (
    *("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL"),
    *("--mount-proc", "--propagation", "private", "--"),
)


def make(
    local: Host, hosts: Sequence[HostSection], nodes: Mapping[str, NodeSection]
) -> tuple[dict[str, HostSection], list[str]]:
    """Make two hosts and the links.

    Args:
        nodes: the node of each host, by the host's name.

    Returns:
        the hosts by name, with address, key and known host key filled in; names of the processes that hold
        them, which have to be ended last.

    Raises:
        StartError: if they cannot be made; see :func:`require_programs` before.
    """
    started = [_hold(local, host) for host in hosts]
    for process in started:
        _wait(process, functools.partial(_has_own_network, process), "a network namespace of its own")
    ends = [nodes[host.name] for host in hosts]
    pids = [process.pid for process in started]
    outer = _write(local, "made-hosts", outer_script(ends, pids))
    local.run("made-hosts-links", ["ip", "-batch", outer], {}, NETWORK_LIMIT_S)
    found = {}
    for host, node, process in zip(hosts, ends, started, strict=True):
        inner = _write(local, f"{PREFIX}{host.name}", inner_script(node))
        enter = ["nsenter", f"--net=/proc/{process.pid}/ns/net", "--"]
        name = f"{PREFIX}{host.name}-addresses"
        local.run(name, [*enter, "ip", "-batch", inner], {}, NETWORK_LIMIT_S)
        _wait(process, functools.partial(accepts, node.address, SSH_PORT), "an SSH server that answers")
        found[host.name] = _reachable(local, host, node, process.scratch)
    return found, [process.name for process in started]


def require_programs() -> None:
    """Refuse to make hosts without root or without a program that it takes.

    Raises:
        StartError: naming what is missing, and its package.
    """
    path = f"{os.environ.get('PATH', '')}:{SEARCH_PATH}"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    if missing:
        raise StartError(
            f"hosts with namespace = true need {', '.join(missing)}: apt-get install {' '.join(missing)}"
        )
    if os.geteuid() != 0:
        raise StartError("hosts with namespace = true need root: run as root, or use another lab")


def _hold(local: Host, host: HostSection) -> HostProcess:
    """Start the process that holds a host's namespaces and is its SSH server."""
    path = f"{os.environ.get('PATH', '')}:{SEARCH_PATH}"
    argv = [*UNSHARE, "sh", "-c", BOOT, "sh", host.name, shutil.which("sshd", path=path) or SSHD]
    return local.start(f"{PREFIX}{host.name}", argv, {"PATH": path}, host.cpus, grace_s=GRACE_S)


def _has_own_network(process: HostProcess) -> bool:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return False


def _wait(process: HostProcess, condition: Callable[[], bool], what: str) -> None:
    def without(_: bool) -> StartError:
        last = process.log.read_text(errors="replace").strip().splitlines()[-3:]
        said = " | ".join(last) or "no reason given"
        return StartError(f"{process.name} has not got {what}: {said}; log: {process.log}")

    process.await_that(condition, READY_DEADLINE_S, without, POLL_S)


def _reachable(local: Host, host: HostSection, node: NodeSection, scratch: str) -> HostSection:
    """The host with what an SSH client needs, taken from the files that it made when it booted."""
    public = local.read_text(f"{scratch}/host_key.pub")
    known = f"{scratch}/known_hosts"
    local.write_text(known, f"{node.address} {public}")
    return host.model_copy(
        update={
            "address": node.address,
            "port": SSH_PORT,
            "user": "root",
            "key_file": f"{scratch}/client_key",
            "known_hosts": known,
        }
    )


def outer_script(nodes: Sequence[NodeSection], pids: Sequence[int]) -> list[str]:
    """``ip -batch`` lines for our own namespace: a control link a host, and the data link between the two.

    ``pids``: a process in each host's network namespace.
    """
    lines = []
    for node, pid in zip(nodes, pids, strict=True):
        mine = f"dl{pid}"
        lines += [
            f"link add {mine} type veth peer name {CONTROL_INTERFACE} netns {pid}",
            f"addr add {control_peer(node)}/30 dev {mine}",
            f"link set {mine} up",
        ]
    (first, second), (here, there) = nodes, pids
    lines.append(
        f"link add {first.interface} netns {here} type veth peer name {second.interface} netns {there}"
    )
    return lines


def inner_script(node: NodeSection) -> list[str]:
    """``ip -batch`` lines for a made host."""
    return [
        "link set lo up",
        f"addr add {node.address}/30 dev {CONTROL_INTERFACE}",
        f"link set {CONTROL_INTERFACE} up",
        f"addr add {node.data_address}/24 dev {node.interface}",
        f"link set {node.interface} up",
    ]


def _write(local: Host, name: str, lines: Sequence[str]) -> str:
    """Keep a batch beside the logs, where a reader finds what was run; its path."""
    path = str(local.logs / f"{name}.ip")
    local.write_text(path, "\n".join(lines) + "\n")
    return path

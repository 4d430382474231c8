"""A host of the lab: where processes are started, ports are taken and facts are read."""

from __future__ import annotations

import functools
import os
import shlex
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from disagglab import lease, netns
from disagglab.errors import StartError
from disagglab.netns import Namespace
from disagglab.port import PortPool
from disagglab.process import OwnedProcess
from disagglab.section import Lab, NodeSection
from disagglab.supervisor import session_members

NETWORK_LIMIT_S = 30.0


class LocalHost:
    """This machine.

    Args:
        run_id: the run that everything started here belongs to.
        lab: gives the port range.
        logs: folder for the logs of what is started.
    """

    name = "local"

    def __init__(self, run_id: str, lab: Lab, logs: Path) -> None:
        self.run_id = run_id
        self.logs = logs
        self._range = (lab.ports.first, lab.ports.last)
        self._pools: dict[str, PortPool] = {}
        self._namespaces: dict[str, Namespace] = {}  # by address in it
        self._processes: list[OwnedProcess] = []

    def reap(self) -> list[lease.Reaped]:
        """End what earlier sessions left on this host."""
        lease.wait_for_orphaned_supervisors()
        return lease.reap()

    def reserve_port(self, address: str) -> int:
        """A TCP port on ``address`` that is ours until :meth:`close`."""
        if address not in self._pools:
            self._pools[address] = self.port_pool(address)
        return self._pools[address].reserve()

    def port_pool(self, address: str) -> PortPool:
        """A pool of the lab's ports where ``address`` is; its maker closes it."""
        namespace = self.namespace_of(address)
        return PortPool(address, *self._range, namespace.socket if namespace else socket.socket)

    def make_network(self, nodes: Sequence[NodeSection]) -> None:
        """Make the network namespaces of two nodes, and the links (disagglab/netns.py).

        Raises:
            StartError: if it cannot be made; without root, mostly.
        """
        made = [Namespace(self.start(f"netns-{node.name}", netns.HOLD, {})) for node in nodes]
        for node, namespace in zip(nodes, made, strict=True):
            netns.wait_until_own(namespace)
            self._namespaces |= {node.address: namespace, node.kv_address: namespace}
        outer = netns.write_script(self.logs, "netns-links", netns.outer_script(nodes, made))
        self.run("netns-links", ["ip", "-batch", str(outer)], {}, NETWORK_LIMIT_S)
        for node in nodes:
            script = netns.write_script(self.logs, f"netns-{node.name}-inside", netns.inner_script(node))
            argv = ["ip", "-batch", str(script)]
            self.run(f"netns-{node.name}-inside", argv, {}, NETWORK_LIMIT_S, node.address)

    def inside(self, address: str) -> str:
        """What a command is prefixed with to run where ``address`` is; empty for this machine itself."""
        namespace = self.namespace_of(address)
        return shlex.join(namespace.inside([])) if namespace else ""

    def network_file(self, node: NodeSection, name: str) -> str:
        """Path of a file of ``/proc/net`` as the node sees it."""
        return f"/proc/{self.namespace_pid(node) or 'self'}/net/{name}"

    def namespace_of(self, address: str) -> Namespace | None:
        """The network namespace that an address is in; None for this machine's own."""
        return self._namespaces.get(address)

    def namespace_pid(self, node: NodeSection) -> int | None:
        """A process in the node's network namespace; None where it has none of its own."""
        namespace = self.namespace_of(node.address)
        return namespace.pid if namespace else None

    def read_text(self, path: str) -> str:
        """Content of a text file of this host."""
        return Path(path).read_text()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cpus: Sequence[int] = (),
        ports: Sequence[int] = (),
        address: str = "",
    ) -> OwnedProcess:
        """Start an owned process with a log of its own and a scratch folder as its TMPDIR.

        ``env`` is added to a minimal environment (PATH, HOME, LANG, and what names caches and tokens). It
        runs in the network namespace that ``address`` belongs to, if one was made.
        """
        namespace = self.namespace_of(address)
        argv = namespace.inside(argv) if namespace else argv
        scratch = Path(tempfile.mkdtemp(prefix="dl-"))  # short: unix socket paths end at 107 characters
        process = OwnedProcess(
            name=name,
            argv=argv,
            env={**inherited_environment(), "TMPDIR": str(scratch), **env},
            log=self.logs / f"{name}.log",
            scratch=scratch,
            run_id=self.run_id,
            cpus=cpus,
            ports=ports,
        )
        self._processes.append(process)
        return process.start()

    def run(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        limit_s: float,
        address: str = "",
        cpus: Sequence[int] = (),
    ) -> list[str]:
        """Run an owned program to its end; return what it printed, line by line.

        Raises:
            LabError: if it fails or exceeds ``limit_s``; the message holds its last lines.
        """
        process = self.start(name, argv, env, cpus, address=address)
        return process.wait(limit_s)

    def memory_available(self) -> int:
        """MemAvailable, bytes."""
        return int(psutil.virtual_memory().available)

    @functools.cached_property
    def facts(self) -> Any:
        """A testinfra host, which facts are read through."""
        import testinfra

        return testinfra.get_host("local://")

    def close(self) -> None:
        """End every process of this run, all at once; prove that nothing is left; give the ports back.

        Raises:
            StartError: naming the processes that still live or the ports that still answer.
        """
        errors: list[StartError] = []
        holders = [namespace.holder for namespace in self._namespaces.values()]
        others = [process for process in self._processes if process not in holders]
        for process in others:
            process.ask_to_stop()
        for process in reversed(others):
            try:
                process.stop()
            except StartError as error:  # the others must be ended too; the first is raised below
                errors.append(error)
        answering: list[int] = []
        try:
            answering = [port for pool in self._pools.values() for port in pool.listening()]
        except StartError as error:  # a namespace that was killed takes its ports along
            errors.append(error)
        for pool in self._pools.values():
            pool.close()
        for holder in holders:  # the namespaces end with them
            holder.stop()
        started = [process.identity for process in self._processes if process.identity is not None]
        left = [member for leader in started for member in session_members(leader.pid, leader.start_ticks)]
        self._namespaces.clear()
        self._processes.clear()
        if errors:
            raise errors[0]
        if left:
            raise StartError(f"processes of this run still live: {left}; look: ps -fp {left[0].pid}")
        if answering:
            raise StartError(f"ports of this run still answer: {answering}; look: ss -tlnp")


INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "XDG_CACHE_HOME",
    "SSL_CERT_FILE",
    "CUDA_HOME",
)


def inherited_environment() -> dict[str, str]:
    """The part of our own environment that started processes get; all else is set explicitly and recorded."""
    return {key: os.environ[key] for key in INHERITED if key in os.environ}

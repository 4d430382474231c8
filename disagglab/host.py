"""A host of the lab: where processes are started, ports are taken and facts are read."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from disagglab import lease
from disagglab.errors import StartError
from disagglab.port import PortPool
from disagglab.process import OwnedProcess
from disagglab.section import Lab
from disagglab.supervisor import session_members


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
        self._processes: list[OwnedProcess] = []

    def reap(self) -> list[lease.Reaped]:
        """End what earlier sessions left on this host."""
        lease.wait_for_orphaned_supervisors()
        return lease.reap()

    def reserve_port(self, address: str) -> int:
        """A TCP port on ``address`` that is ours until :meth:`close`."""
        pool = self._pools.setdefault(address, PortPool(address, *self._range))
        return pool.reserve()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cpus: Sequence[int] = (),
        ports: Sequence[int] = (),
    ) -> OwnedProcess:
        """Start an owned process with a log of its own and a scratch folder as its TMPDIR.

        ``env`` is added to a minimal environment (PATH, HOME, LANG, and what names caches and tokens).
        """
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

    def run(self, name: str, argv: Sequence[str], env: Mapping[str, str], limit_s: float) -> list[str]:
        """Run an owned program to its end; return what it printed, line by line.

        Raises:
            LabError: if it fails or exceeds ``limit_s``; the message holds its last lines.
        """
        process = self.start(name, argv, env)
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
        for process in self._processes:
            process.ask_to_stop()
        for process in reversed(self._processes):
            try:
                process.stop()
            except StartError as error:  # the others must be ended too; the first is raised below
                errors.append(error)
        started = [process.identity for process in self._processes if process.identity is not None]
        left = [member for leader in started for member in session_members(leader.pid, leader.start_ticks)]
        answering = [port for pool in self._pools.values() for port in pool.listening()]
        for pool in self._pools.values():
            pool.close()
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

"""A host of the lab: where processes are started, ports are taken and facts are read.

One class for this machine and for remote ones. What happens on the host itself is its deputy's work
(disagglab/agent/deputy.py); a host differs from another only in how its deputy is called.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from disagglab import waiting
from disagglab.agent.deputy import Deputy
from disagglab.agent.supervisor import Process
from disagglab.errors import LabError

WAIT_POLL_S = 0.1
LOG_TAIL_LINES = 20

Call = Callable[..., Any]  # method of Deputy, then its arguments


class HostProcess:
    """A process that a host's deputy owns. ``log``: on this machine, kept up to date while it runs."""

    recorded = False  # whether it was only noted and never started (hosts/recording.py)

    def __init__(self, host: Host, name: str, argv: Sequence[str], started: Mapping[str, Any]) -> None:
        self.host = host
        self.name = name
        self.argv = tuple(argv)
        self.identity = Process(int(started["pid"]), int(started["start_ticks"]))
        self.scratch = str(started["scratch"])
        self.log = host.logs / f"{name}.log"
        self.ended: dict[str, Any] | None = None
        self._stopped = False
        self.asked = False  # whether somebody here wants it to end, or waits for its end
        self.died = False

    @property
    def pid(self) -> int:
        """Its pid, on its host."""
        return self.identity.pid

    @property
    def alive(self) -> bool:
        """Whether the command itself still runs."""
        return not self._stopped and bool(self.host.call("alive", self.name))

    def has_died(self) -> bool:
        """Whether it ended though nobody here asked it to. What it left is ended then; see ``ended``."""
        if not self.asked and not self.alive:
            self.stop()
            self.died = True
        return self.died

    def tree(self) -> list[int]:
        """Pids, on its host, of the command and its living descendants."""
        return [] if self._stopped else list(self.host.call("tree", self.name))

    def cpu_s(self) -> float:
        """CPU time used by its living processes so far, s."""
        return 0.0 if self._stopped else float(self.host.call("cpu_s", self.name))

    def cores_of_threads(self) -> dict[str, set[int]]:
        """Cores that each of its threads may run on, by thread id."""
        found: dict[str, str] = self.host.call("cores_of_threads", self.name)
        return {thread: cores(text) for thread, text in found.items()}

    def is_anothers_port(self, port: int) -> bool:
        """Whether somebody listens on a port of the host, and it is none of this process's tree."""
        return bool(self.host.call("is_anothers_port", self.name, port))

    def lines_so_far(self) -> list[str]:
        """The lines of its log up to now."""
        self.host.follow(self.name)
        return self.log.read_text(errors="replace").splitlines()

    def await_that(
        self,
        condition: Callable[[], bool],
        limit_s: float,
        without: Callable[[bool], Exception],
        poll_s: float = WAIT_POLL_S,
    ) -> None:
        """Return when a condition holds that this process is to bring about.

        Args:
            without: makes the error; it is told whether the process still runs.

        Raises:
            Exception: what ``without`` makes, after ``limit_s`` or as soon as the process has ended.
        """

        def holds() -> bool:
            if condition():
                return True
            if not self.alive:
                raise without(False)
            return False

        waiting.until(holds, limit_s, lambda: without(True), poll_s)

    def wait(self, limit_s: float, tick: Callable[[], None] = lambda: None) -> list[str]:
        """Wait until the command has ended by itself; return the lines of its log. ``tick`` is called
        meanwhile.

        Raises:
            LabError: if it ends with another status than 0 or exceeds ``limit_s``; the message holds its last
            lines.
        """

        def over() -> bool:
            tick()
            return not self.alive

        self.asked = True
        running = not waiting.last_answer(over, limit_s, WAIT_POLL_S)
        self.stop()
        lines = self.log.read_text(errors="replace").splitlines()
        if running or self.ended is None or self.ended["code"] != 0:
            how = f"did not end within {limit_s:g} s" if running else f"ended with {self.ended}"
            tail = "\n".join(lines[-LOG_TAIL_LINES:])
            where = "" if self.host.is_local else f" on {self.host.name}"
            raise LabError(f"{self.name}{where} {how}; command: {shlex.join(self.argv)}\nlast lines:\n{tail}")
        return lines

    def kill(self) -> None:
        """End the command itself as a crash would (SIGKILL); :meth:`stop` waits for what it started."""
        self.asked = True
        if not self._stopped:
            self.host.call("kill", self.name)

    def ask_to_stop(self) -> None:
        """Begin to end it; :meth:`stop` waits until it has ended."""
        self.asked = True
        if not self._stopped:
            self.host.call("ask_to_stop", self.name)

    def stop(self) -> None:
        """End the command and everything it started; return when all of it is gone and its log is here.

        Raises:
            StartError: if something of it is still alive after the deadline.
        """
        self.asked = True
        if self._stopped:
            return
        self.ended = self.host.call("stop", self.name)
        self._stopped = True
        self.host.follow(self.name)


class Host:
    """A host, by the way its deputy is called.

    Args:
        name: as the lab file calls it; ``local`` is this machine.
        call: calls a method of the host's :class:`~disagglab.agent.deputy.Deputy`.
        logs: folder on this machine for the logs of what is started.
        suite_python: Python there that has this package and the suite's other dependencies.
    """

    is_local = True

    def __init__(self, name: str, call: Call, logs: Path, suite_python: str) -> None:
        self.name = name
        self.call = call
        self.logs = logs
        self.suite_python = suite_python
        self.about: dict[str, Any] = call("about")
        self.started: list[HostProcess] = []

    def reap(self) -> list[dict[str, Any]]:
        """End what earlier sessions left on this host: rows of run_id, command, pids."""
        rows: list[dict[str, Any]] = self.call("reap")
        return rows

    def reserve_port(self, address: str) -> int:
        """A TCP port on an address of this host that is ours until :meth:`close`."""
        return int(self.call("reserve_port", address))

    def give_back_port(self, address: str, port: int) -> None:
        """Let a port from :meth:`reserve_port`, whose user has ended, be reserved again."""
        self.call("give_back_port", address, port)

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cpus: Sequence[int] = (),
        ports: Sequence[int] = (),
        grace_s: float = 15.0,
        memory_stop_bytes: int = 0,
    ) -> HostProcess:
        """Start an owned process; see :meth:`disagglab.agent.deputy.Deputy.start`.

        Raises:
            StartError: if it cannot be executed; the message holds the system's reason.
        """
        started = self.call(
            "start", name, list(argv), dict(env), list(cpus), list(ports), grace_s, memory_stop_bytes
        )
        self.remember(name)
        self.started.append(HostProcess(self, name, argv, started))
        return self.started[-1]

    def run(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], limit_s: float, cpus: Sequence[int] = ()
    ) -> list[str]:
        """Run an owned program to its end; return what it printed, line by line.

        Raises:
            LabError: if it fails or exceeds ``limit_s``; the message holds its last lines.
        """
        return self.start(name, argv, env, cpus).wait(limit_s)

    def read_text(self, path: str) -> str:
        """Content of a text file of this host."""
        return str(self.call("read_text", path))

    def write_text(self, path: str, text: str) -> None:
        """Write a file of this host, readable by its owner alone."""
        self.call("write_text", path, text)

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self.call("exists", path))

    def memory_available(self) -> int:
        """MemAvailable, bytes."""
        return int(self.call("memory_available"))

    @functools.cached_property
    def facts(self) -> Any:
        """A testinfra host, which facts are read through."""
        import testinfra

        return testinfra.get_host("local://")

    def remember(self, name: str) -> None:
        """Keep the log of a process up to date; where the deputy writes it here, it is."""

    def follow(self, name: str) -> None:
        """Bring the log of a process up to date now."""

    def close(self) -> None:
        """End every process of this run on this host; prove that nothing is left; give the ports back.

        Raises:
            StartError: naming the processes that still live or the ports that still answer.
        """
        self.call("close")


def local_host(run_id: str, ports: tuple[int, int], logs: Path, suite_python: str) -> Host:
    """This machine, whose deputy is an object of this process."""
    deputy = Deputy(run_id, ports, logs)
    return Host("local", lambda method, *args: getattr(deputy, method)(*args), logs, suite_python)


def cores(text: str) -> set[int]:
    """``0-3,7`` as a set."""
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found

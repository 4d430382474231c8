"""What a host does for a session: owns its processes, holds its ports, answers questions about itself.

On this machine :class:`Deputy` is called directly. On a remote host the same file is the program at the far
end of an SSH channel (hosts/remote.py): one JSON object a line on standard input asks for a method, one
line on standard output answers. Every process it starts has a supervisor of its own as its child, so when the
channel closes, or nothing is heard for ``heartbeat_s``, the deputy ends and each supervisor ends its tree.

Standard library alone, and arguments and results that JSON can carry.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from disagglab.agent import leftovers, supervisor
from disagglab.agent.port import PortPool, holds, listening_sockets
from disagglab.agent.process import OwnedProcess
from disagglab.agent.supervisor import session_members
from disagglab.errors import LabError, StartError

FOLLOW_BYTES = 2**20  # of a log in one answer
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
LOGS_KEPT = 5  # folders of earlier runs on a remote host, newest
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


class Deputy:
    """The processes and ports of one run on this host.

    Args:
        run_id: the run that everything started here belongs to.
        ports: first and last port that may be taken.
        logs: folder for the logs of what is started; it exists.
    """

    def __init__(self, run_id: str, ports: Sequence[int], logs: Path) -> None:
        self.run_id = run_id
        self.logs = logs
        self._first, self._last = ports
        self._pools: dict[str, PortPool] = {}
        self._processes: dict[str, OwnedProcess] = {}  # the latest of each name
        self._started: list[supervisor.Process] = []

    def about(self) -> dict[str, Any]:
        """Home, host name, pid of the deputy, memory."""
        return {
            "home": str(Path.home()),
            "hostname": os.uname().nodename,
            "pid": os.getpid(),
            "cores": sorted(os.sched_getaffinity(0)),
            "memory_available": supervisor.memory_available(),
            "logs": str(self.logs),
        }

    def reap(self) -> list[dict[str, Any]]:
        """End what earlier sessions left on this host; what was ended, a row a lease."""
        leftovers.wait_for_orphaned_supervisors()
        return [
            {"run_id": row.run_id, "command": row.command, "pids": list(row.pids)} for row in leftovers.reap()
        ]

    def reserve_port(self, address: str) -> int:
        """A TCP port on ``address`` that is ours until :meth:`close`."""
        if address not in self._pools:
            self._pools[address] = PortPool(address, self._first, self._last)
        return self._pools[address].reserve()

    def give_back_port(self, address: str, port: int) -> None:
        """Let a reserved port, whose user has ended, be reserved again.

        Raises:
            ValueError: if it is not reserved.
        """
        if address not in self._pools:
            raise ValueError(f"port {port} of {address} is not reserved")
        self._pools[address].give_back(port)

    def free_ports(self, address: str, count: int) -> list[int]:
        """``count`` ports of the range that could be reserved now; given back at once.

        Raises:
            StartError: if there are fewer.
        """
        pool = PortPool(address, self._first, self._last)
        try:
            return [pool.reserve() for _ in range(count)]
        finally:
            pool.close()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cpus: Sequence[int] = (),
        ports: Sequence[int] = (),
        grace_s: float = 15.0,
        memory_stop_bytes: int = 0,
    ) -> dict[str, Any]:
        """Start an owned process with a log of its own and a scratch folder as its TMPDIR.

        ``env`` is added to a minimal environment (PATH, HOME, LANG, and what names caches and tokens).

        Raises:
            StartError: if it cannot be executed, or one of this name still runs.
        """
        if name in self._processes and self._processes[name].alive:
            raise StartError(f"{name} runs already on this host")
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
            grace_s=grace_s,
            memory_stop_bytes=memory_stop_bytes,
        )
        self._processes[name] = process
        process.start()
        assert process.identity is not None
        self._started.append(process.identity)
        return {**asdict(process.identity), "log": str(process.log), "scratch": str(scratch)}

    def alive(self, name: str) -> bool:
        """Whether the command itself still runs."""
        return self._processes[name].alive

    def tree(self, name: str) -> list[int]:
        """Pids of the command and its living descendants."""
        return [member.pid for member in self._processes[name].tree()]

    def cpu_s(self, name: str) -> float:
        """CPU time used by the process's living tree so far, s."""
        stats = map(supervisor.read_stat, self.tree(name))
        return sum(stat.cpu_ticks for stat in stats if stat is not None) / CLOCK_TICKS

    def cores_of_threads(self, name: str) -> dict[str, str]:
        """Cores that each thread of the process's tree may run on (``0-3,7``), by thread id."""
        found = {}
        for pid in self.tree(name):
            for status in Path(f"/proc/{pid}/task").glob("*/status"):
                with contextlib.suppress(OSError):
                    allowed = status.read_text().partition("Cpus_allowed_list:")[2].split()[0]
                    found[status.parent.name] = allowed
        return found

    def is_anothers_port(self, name: str, port: int) -> bool:
        """Whether ``port`` is listened on, and by no process of this tree."""
        ours = self.tree(name)
        sockets = listening_sockets(ours[0] if ours else os.getpid(), port)
        return bool(sockets) and not any(holds(pid, sockets) for pid in ours)

    def follow(self, offsets: Mapping[str, int]) -> dict[str, str]:
        """What each log holds beyond an offset in bytes, FOLLOW_BYTES at most; Latin-1, a byte a letter."""
        found = {}
        for name, offset in offsets.items():
            with contextlib.suppress(FileNotFoundError), open(self.logs / f"{name}.log", "rb") as log:
                log.seek(offset)
                found[name] = log.read(FOLLOW_BYTES).decode("latin-1")
        return found

    def ask_to_stop(self, name: str) -> None:
        """Begin to end a process; :meth:`stop` waits until it has ended."""
        self._processes[name].ask_to_stop()

    def kill(self, name: str) -> None:
        """End the command itself as a crash would (SIGKILL), if it still is the one that was started."""
        identity = self._processes[name].identity
        assert identity is not None
        supervisor.send(identity, signal.SIGKILL)

    def ask_all_to_stop(self) -> None:
        """Begin to end every process; :meth:`close` waits until all have."""
        for process in self._processes.values():
            process.ask_to_stop()

    def stop(self, name: str) -> dict[str, Any] | None:
        """End a process and everything it started; how it ended, None if its supervisor was killed."""
        process = self._processes[name]
        process.stop()
        return process.ended

    def read_text(self, path: str) -> str:
        """Content of a text file of this host."""
        return Path(path).read_text()

    def write_text(self, path: str, text: str) -> None:
        """Write a file that only this account can read, all at once."""
        supervisor.write_atomically(path, text)

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return Path(path).exists()

    def memory_available(self) -> int:
        """MemAvailable, bytes."""
        return supervisor.memory_available()

    def close(self, last: Sequence[str] = ()) -> None:
        """End every process of this run, all at once; prove that nothing is left; give the ports back.

        ``last``: those that are ended when all others have, because the others run inside of them.

        Raises:
            StartError: naming the processes that still live or the ports that still answer.
        """
        errors: list[StartError] = []
        others = [process for name, process in self._processes.items() if name not in last]
        for process in others:
            process.ask_to_stop()
        for process in [*reversed(others), *(self._processes[name] for name in last)]:
            try:
                process.stop()
            except StartError as error:  # the others must be ended too; the first is raised below
                errors.append(error)
        answering = [port for pool in self._pools.values() for port in pool.listening()]
        for pool in self._pools.values():
            pool.close()
        left = [m for leader in self._started for m in session_members(leader.pid, leader.start_ticks)]
        self._pools.clear()
        self._processes.clear()
        self._started.clear()
        if errors:
            raise errors[0]
        if left:
            raise StartError(f"processes of this run still live: {left}; look: ps -fp {left[0].pid}")
        if answering:
            raise StartError(f"ports of this run still answer: {answering}; look: ss -tlnp")


class Channel:
    """JSON lines on our standard input and output, with a limit on silence and on a reader that is gone."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._buffer = b""
        os.set_blocking(1, False)

    def receive(self) -> dict[str, Any] | None:
        """The next object; None when the other side is gone or silent for too long."""
        deadline = time.monotonic() + self.limit_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([0], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(0, 65536) if ready else b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def send(self, answer: Mapping[str, Any]) -> bool:
        """Write an object; False when the other side does not take it within the limit."""
        data = json.dumps(answer).encode() + b"\n"
        deadline = time.monotonic() + self.limit_s
        while data:
            try:
                data = data[os.write(1, data) :]
            except BlockingIOError:
                _, ready, _ = select.select([], [1], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    return False
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                    return False
                raise
        return True


def answer_to(call: Callable[..., Any], args: Sequence[Any]) -> dict[str, Any]:
    """What a call returned or raised, as an object to send."""
    try:
        return {"result": call(*args)}
    except LabError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}", "kind": type(error).__name__}


def logs_folder(run_id: str) -> Path:
    """A folder for this run's logs; those of the oldest runs are deleted."""
    runs = leftovers.state_folder() / "runs"
    folder = runs / run_id
    folder.mkdir(parents=True)
    others = sorted(path for path in runs.iterdir() if path != folder)  # two controllers' clocks may differ
    for old in others[: 1 - LOGS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def serve(channel: Channel, first: Mapping[str, Any]) -> None:
    """Answer until the other side says close, is gone, or is silent for too long."""
    with contextlib.ExitStack() as stack:
        try:
            if first["exclusive"]:
                stack.enter_context(leftovers.exclusive())
            deputy = Deputy(first["run_id"], first["ports"], logs_folder(first["run_id"]))
        except (LabError, OSError) as error:
            channel.send({"id": first["id"], "error": str(error), "kind": "StartError"})
            return
        channel.send({"id": first["id"], "result": deputy.about()})
        while (asked := channel.receive()) is not None:
            answer = answer_to(getattr(deputy, asked["method"]), asked["args"])
            if not channel.send({"id": asked["id"], **answer}):
                break
        with contextlib.suppress(StartError):  # nobody is there to be told; the leases remain
            deputy.close()


def main() -> int:
    """Serve one session. The first line: run_id, ports, heartbeat_s, exclusive."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the channel's end says it
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    channel = Channel(60.0)
    first = channel.receive()
    if first is None:
        return 1
    channel.limit_s = float(first["heartbeat_s"])
    serve(channel, first)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An owned process: started through the supervisor, known by pid and start time, ended with all its
descendants.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from disagglab import waiting
from disagglab.agent import leftovers, supervisor
from disagglab.agent.supervisor import Process, Spec
from disagglab.errors import LabError, StartError

SUPERVISOR = Path(supervisor.__file__)
SPAWN_DEADLINE_S = 60.0  # from the fork to the supervisor's first word, on a machine that swaps
WAIT_POLL_S = 0.1
KILL_MARGIN_S = 30.0  # beyond the grace period, for the kernel to take a large process down


class OwnedProcess:
    """One command under a supervisor. Use it as a context manager, or call :meth:`stop`.

    Args:
        name: short name, used for the lease file and in messages.
        argv: the command; shown as it is in reports, so it must hold no secret.
        env: the complete environment of the command.
        log: file that takes standard output and standard error.
        scratch: folder that lives exactly as long as the process (temporary files, sockets).
        cpus: cores that the command and all it starts are bound to; empty for no binding.
        ports: ports reserved for it, written into its lease.
        grace_s: seconds between SIGTERM and SIGKILL when it is ended.
        memory_stop_bytes: MemAvailable below which it is killed; 0: never.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        scratch: Path,
        run_id: str,
        cpus: Sequence[int] = (),
        ports: Sequence[int] = (),
        grace_s: float = 15.0,
        memory_stop_bytes: int = 0,
    ) -> None:
        self.name = name
        self.log = log
        self.spec = Spec(
            argv=list(argv),
            env=dict(env),
            log=str(log),
            lease=str(leftovers.folder() / f"{run_id}.{name}.json"),
            scratch=str(scratch),
            run_id=run_id,
            cwd=str(log.parent),
            cpus=list(cpus),
            ports=list(ports),
            grace_s=grace_s,
            memory_stop_bytes=memory_stop_bytes,
        )
        self.identity: Process | None = None
        self.ended: dict[str, object] | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def start(self) -> OwnedProcess:
        """Start the command; return when it runs.

        Raises:
            StartError: if it could not be executed; the message holds the system's reason.
        """
        Path(self.spec.scratch).mkdir(parents=True, exist_ok=True)
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.write(json.dumps(asdict(self.spec)).encode() + b"\n")
        self._supervisor.stdin.flush()
        event = self._event(SPAWN_DEADLINE_S)
        if event is None or event["event"] != "started":
            self.stop()
            reason = event.get("error", "no reason given") if event else "the supervisor did not answer"
            raise StartError(f"{self.name}: could not start {self.spec.argv[0]}: {reason}")
        self.identity = Process(int(str(event["pid"])), int(str(event["start_ticks"])))
        return self

    def _event(self, timeout_s: float) -> dict[str, object] | None:
        """The next event of the supervisor, or None when the time is over or it has closed its end."""
        assert self._supervisor is not None
        assert self._supervisor.stdout is not None
        descriptor = self._supervisor.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            remaining = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], remaining)
            data = os.read(descriptor, 65536) if ready else b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, object] = json.loads(line)
        return event

    @property
    def alive(self) -> bool:
        """Whether the command itself still runs."""
        return self.identity is not None and self.identity.alive()

    def tree(self) -> list[Process]:
        """The command and its living descendants."""
        if self._supervisor is None or self._supervisor.poll() is not None:
            return []
        return supervisor.descendants(self._supervisor.pid)

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

        late = not waiting.last_answer(over, limit_s, WAIT_POLL_S)
        self.stop()
        lines = self.log.read_text(errors="replace").splitlines()
        if late or self.ended is None or self.ended["code"] != 0:
            how = f"did not end within {limit_s:g} s" if late else f"ended with {self.ended}"
            tail = "\n".join(lines[-20:])
            raise LabError(f"{self.name} {how}; command: {shlex.join(self.spec.argv)}\nlast lines:\n{tail}")
        return lines

    def ask_to_stop(self) -> None:
        """Begin to end the command; :meth:`stop` waits until it has ended."""
        process = self._supervisor
        if process is None or process.stdin is None or process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"stop\n")
            process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()

    def stop(self) -> None:
        """End the command and everything it started; return when all of it is gone.

        Raises:
            StartError: if something of it is still alive after the deadline; the message names the processes.
        """
        self.ask_to_stop()
        process, self._supervisor = self._supervisor, None
        if process is None:
            return
        assert process.stdout is not None
        try:
            process.wait(self.spec.grace_s + KILL_MARGIN_S)
        except subprocess.TimeoutExpired as error:
            left = supervisor.descendants(process.pid)
            raise StartError(
                f"{self.name}: still alive after SIGKILL: {left}; look at it with ps -fp PID"
            ) from error
        self._buffer += process.stdout.read()
        process.stdout.close()
        for line in self._buffer.splitlines():
            event = json.loads(line)
            if event["event"] == "done":
                self.ended = event
        if self.identity is not None and self.ended is None:  # the supervisor itself was killed
            leftovers.reap()

    def __enter__(self) -> OwnedProcess:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

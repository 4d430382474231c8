"""Owns one command and everything it starts, and ends all of it when the owner goes away.

Run as a script, with the standard library alone, so that the same file serves this machine and a remote one::

    python3 -I -S supervisor.py < control pipe

The first line on standard input is the specification (JSON, see :class:`Spec`); it travels there and not in
the argument vector, so that no secret shows in a process list. Afterwards each line is a heartbeat, or
``stop``. End of input, a missed heartbeat, ``stop``, SIGTERM, SIGHUP or the end of the command itself all
lead to the same ending: SIGTERM to the command, a grace period, then SIGKILL to every descendant, until none
is left.

How nothing escapes: the supervisor is a child subreaper, so an orphaned grandchild becomes its child; the
command asks the kernel for SIGKILL should the supervisor be killed (PR_SET_PDEATHSIG); and a lease file lets
the next session find what a killed supervisor could not end (agent/leftovers.py). A process is a pid *and* a
start time, never a name.

Events on standard output, one JSON object a line: ``started`` or ``refused``, then ``done`` with the reason,
the command's exit status, the pids that had to be killed, the time (``ended_s``, Unix time) and how often the
kernel killed for want of memory meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05  # how often the ending looks whether the tree is gone
LOOK_S = (
    1.0  # how often a running supervisor looks whether its owner lives: a fork of it may hold the pipe open
)
MEMORY_LOOK_S = 0.2  # how often MemAvailable is read where it has a limit: weights load at GB/s
MEMORY = "memory"
SHM_LOOK_S = 30.0  # how often it notes the shared memory in use, which a sudden end would leave behind
TRACKER_S = 5.0  # that Python's resource tracker has, after all others are gone, to unlink what they left
SHM_FOLDER = "/dev/shm/"


@dataclass(frozen=True)
class Spec:
    """What to run. ``grace_s``: seconds between SIGTERM and SIGKILL. ``heartbeat_s``: 0 asks for none.

    ``memory_stop_bytes``: MemAvailable below which all of it is killed at once; 0: never.
    """

    argv: list[str]
    env: dict[str, str]
    log: str
    lease: str
    scratch: str
    run_id: str
    cwd: str = "/"
    cpus: list[int] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    grace_s: float = 15.0
    heartbeat_s: float = 0.0
    memory_stop_bytes: int = 0


@dataclass(frozen=True)
class Process:
    """Identity of a process: ``pid`` and kernel start time in clock ticks since boot."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        """Whether this very process (not a later one with its pid) still runs; a zombie does not count."""
        stat = read_stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state not in "ZX"


@dataclass(frozen=True)
class Stat:
    """The part of ``/proc/PID/stat`` that is used here (man 5 proc). ``cpu_ticks``: user and system time."""

    state: str
    ppid: int
    session: int
    start_ticks: int
    cpu_ticks: int


def read_stat(pid: int) -> Stat | None:
    """Read ``/proc/PID/stat``; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # a name may be cut within a character
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name may hold spaces and brackets
    return Stat(
        state=fields[0],
        ppid=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
    )


def identify(pid: int) -> Process:
    """The identity of a running process.

    Raises:
        ProcessLookupError: if there is none with this pid.
    """
    stat = read_stat(pid)
    if stat is None:
        raise ProcessLookupError(f"no process {pid}")
    return Process(pid, stat.start_ticks)


def all_stats() -> dict[int, Stat]:
    """Every process of this pid namespace."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: stat for pid in pids if (stat := read_stat(pid)) is not None}


def descendants(root: int) -> list[Process]:
    """Every living process below ``root``, zombies left out, parents before children."""
    stats = all_stats()
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.ppid, []).append(pid)
    found, queue = [], list(children.get(root, []))
    while queue:
        pid = queue.pop(0)
        queue.extend(children.get(pid, []))
        if stats[pid].state not in "ZX":
            found.append(Process(pid, stats[pid].start_ticks))
    return found


def has_children() -> bool:
    """Whether this process has any child left, zombies included; unlike a look at /proc, never wrong."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def session_members(session: int, not_before_ticks: int) -> list[Process]:
    """Living processes of a session that started no earlier than ``not_before_ticks``."""
    return [
        Process(pid, stat.start_ticks)
        for pid, stat in all_stats().items()
        if stat.session == session and stat.start_ticks >= not_before_ticks and stat.state not in "ZX"
    ]


def send(process: Process, number: int) -> None:
    """Signal a process if it is still the one meant."""
    if process.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def is_resource_tracker(process: Process) -> bool:
    """Whether this is the helper with which Python unlinks semaphores and shared memory of killed processes.

    It ends by itself once all others of its tree are gone, and knows names that no memory map shows any more.
    """
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return False


def shared_memory(processes: list[Process]) -> set[str]:
    """Files under /dev/shm that these processes have mapped and that still have a name."""
    paths: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(errors="surrogateescape").splitlines():
                path = line.partition(" " + SHM_FOLDER)[2]
                if path and not path.endswith(" (deleted)"):
                    paths.add(SHM_FOLDER + path)
    return paths


def remove_shared_memory(paths: set[str]) -> None:
    """Unlink those of ``paths`` that nobody maps any more."""
    if not paths:
        return
    in_use = shared_memory([Process(pid, stat.start_ticks) for pid, stat in all_stats().items()])
    for path in paths - in_use:
        with contextlib.suppress(OSError):
            os.unlink(path)


def memory_available() -> int:
    """MemAvailable of this host, bytes."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def oom_kills() -> int:
    """How often the kernel has killed for want of memory: in our cgroup where that counts, else on the host.

    Sources: ``oom_kill`` in cgroup v2's memory.events, in v1's memory.oom_control, in /proc/vmstat.
    """
    files = ["/proc/vmstat"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.insert(0, f"/sys/fs/cgroup{path}/memory.events")
            elif "memory" in controllers.split(","):
                files.insert(0, f"/sys/fs/cgroup/memory{path}/memory.oom_control")
    for file in files:
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def write_atomically(path: str, text: str) -> None:
    """Write a file that its owner alone can read, so that a reader sees all of it or none."""
    temporary = f"{path}.{os.getpid()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as stream:
        stream.write(text)
    os.replace(temporary, path)


class Supervisor:
    """Starts the command of a :class:`Spec`, waits for a reason to end it, ends all of it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = identify(os.getppid())
        self.shm: set[str] = set()
        self.lease: dict[str, object] = {}
        self.oom_kills = oom_kills()

    def start(self) -> None:
        """Start the command in its own session, bound to its cores, its output in the log."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        supervisor = os.getpid()
        cpus = self.spec.cpus

        def prepare() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:  # it died before the line above
                os._exit(1)
            if cpus:
                os.sched_setaffinity(0, cpus)

        with open(self.spec.log, "ab") as log:
            self.child = subprocess.Popen(
                self.spec.argv,
                env=self.spec.env,
                cwd=self.spec.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare,
            )
        child = identify(self.child.pid)
        self.lease = {
            "run_id": self.spec.run_id,
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "owner": asdict(self.owner),
            "supervisor": asdict(identify(supervisor)),
            "child": asdict(child),
            "scratch": self.spec.scratch,
            "ports": self.spec.ports,
            "argv": self.spec.argv,
            "shared_memory": [],
        }
        write_atomically(self.spec.lease, json.dumps(self.lease))
        report(event="started", **asdict(child))

    def note_shared_memory(self) -> None:
        """Remember what the tree has mapped under /dev/shm, here and in the lease."""
        found = shared_memory(descendants(os.getpid()))
        if not found <= self.shm:
            self.shm |= found
            write_atomically(self.spec.lease, json.dumps({**self.lease, "shared_memory": sorted(self.shm)}))

    def wait(self, wakeup: int) -> str:
        """Block until there is a reason to end; return it. ``wakeup``: a pipe that every signal writes to."""
        assert self.child is not None
        last_beat = last_look = time.monotonic()
        limit = self.spec.memory_stop_bytes
        while True:
            if self.child.poll() is not None:
                return "command ended"
            ready, _, _ = select.select([0, wakeup], [], [], MEMORY_LOOK_S if limit else LOOK_S)
            now = time.monotonic()
            if self.spec.heartbeat_s and 0 not in ready and now - last_beat > self.spec.heartbeat_s:
                return f"no heartbeat for {self.spec.heartbeat_s:g} s"
            if not self.owner.alive():
                return "owner gone"
            if limit and memory_available() < limit:
                return MEMORY
            if now - last_look > SHM_LOOK_S:
                last_look = now
                self.note_shared_memory()
            if wakeup in ready:
                numbers = set(os.read(wakeup, 512)) - {signal.SIGCHLD}
                if numbers:
                    return f"signal {max(numbers)}"
                self.reap()
            if 0 in ready:
                data = os.read(0, 4096)
                if not data:
                    return "owner gone"
                if b"stop" in data:
                    return "stop"
                last_beat = now

    def note(self, text: str) -> None:
        """A line of our own at the end of the command's log."""
        with contextlib.suppress(OSError), open(self.spec.log, "a") as log:
            log.write(f"\ndisagg-lab: {text}\n")

    def reap(self) -> None:
        """Collect adopted zombies; the command's own status stays with its Popen object."""
        assert self.child is not None
        for pid, stat in all_stats().items():
            if stat.ppid == os.getpid() and stat.state == "Z" and pid != self.child.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def end(self, reason: str) -> None:
        """End every descendant, then remove what the tree left: shared memory, scratch folder, lease."""
        assert self.child is not None
        ended_s = time.time()
        self.shm |= shared_memory(descendants(os.getpid()))
        deadline = time.monotonic() + self.spec.grace_s
        if reason == MEMORY:
            deadline = 0.0  # a host without memory has no time for grace
            limit = f"{self.spec.memory_stop_bytes / 2**30:g} GiB ([memory] stop_gib)"
            self.note(f"ended by its supervisor: MemAvailable fell below {limit}")
        if self.child.poll() is None:
            send(identify(self.child.pid), signal.SIGTERM)  # it ends its own children in order
        asked: set[Process] = set()
        killed: list[int] = []
        while has_children():
            tree = descendants(os.getpid())
            if self.child.poll() is not None:  # it is gone; what it left is asked in turn
                for process in set(tree) - asked:
                    send(process, signal.SIGTERM)
                asked.update(tree)
            if time.monotonic() >= deadline:
                patient = time.monotonic() < deadline + TRACKER_S
                for process in [p for p in tree if not (patient and is_resource_tracker(p))]:
                    killed += [process.pid] if process.pid not in killed else []
                    send(process, signal.SIGKILL)
            self.reap()
            time.sleep(POLL_S)
        code = self.child.wait()
        remove_shared_memory(self.shm)
        shutil.rmtree(self.spec.scratch, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.spec.lease)
        starved = oom_kills() - self.oom_kills
        report(event="done", reason=reason, code=code, killed=killed, ended_s=ended_s, oom_kills=starved)


def report(**event: object) -> None:
    """One JSON line to the owner; an owner that is gone is no error."""
    with contextlib.suppress(BrokenPipeError, OSError):
        os.write(1, (json.dumps(event) + "\n").encode())


def main() -> int:
    """Read the specification, run it, end it. Exit status 0 unless the command could not be started."""
    with open(0, "rb", buffering=0, closefd=False) as control:  # unbuffered: what follows belongs to select()
        spec = Spec(**json.loads(control.readline()))
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    supervisor = Supervisor(spec)
    try:
        supervisor.start()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        report(event="refused", error=str(error))
        if supervisor.child is not None:  # it runs, but its lease could not be written
            supervisor.end("refused")
        shutil.rmtree(spec.scratch, ignore_errors=True)
        return 1
    supervisor.end(supervisor.wait(read_end))
    return 0


if __name__ == "__main__":
    sys.exit(main())

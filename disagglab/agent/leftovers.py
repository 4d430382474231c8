"""Leases: what this account has started on this host, and how a later session ends what an earlier one left.

Standard library alone: this file also works on a remote host (disagglab/agent/deputy.py).

Every supervisor writes one lease file and removes it when its tree is gone. A lease that outlives its
supervisor means that the supervisor itself was killed (or the machine restarted); its processes are then
found by session id and start time, never by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from disagglab import waiting
from disagglab.agent.supervisor import (
    TRACKER_S,
    Process,
    is_resource_tracker,
    remove_shared_memory,
    send,
    session_members,
    shared_memory,
)
from disagglab.errors import StartError

STATE_VARIABLE = "DISAGGLAB_STATE"
END_DEADLINE_S = 60.0  # for a supervisor that lost its owner to finish, and for a killed process to vanish
POLL_S = 0.05


@dataclass(frozen=True)
class Reaped:
    """What was ended for one lease."""

    run_id: str
    command: str
    pids: tuple[int, ...]


def state_folder() -> Path:
    """What this account keeps on this host; ``DISAGGLAB_STATE`` moves it.

    One folder a host name: a home that two nodes share must not show one node's leases to the other.
    """
    base = os.environ.get(STATE_VARIABLE)
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = (Path(base) if base else home / "disagglab") / os.uname().nodename
    path.mkdir(parents=True, exist_ok=True)
    return path


def folder() -> Path:
    """Where leases are kept."""
    path = state_folder() / "leases"
    path.mkdir(exist_ok=True)
    return path


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Hold this account's lab lock on this host: two labs at once would measure each other.

    Raises:
        StartError: if another session holds it; the message names its pid.
    """
    path = state_folder() / "lab.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise StartError(
                f"another session (pid {holder}) runs a lab on {os.uname().nodename}; wait for it or end it:"
                f" kill -INT {holder}"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def reap() -> list[Reaped]:
    """End what earlier sessions of this account left on this host; leave sessions that still run alone.

    Raises:
        StartError: if a left-over does not end; the message names the processes.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [
        done for path in sorted(folder().glob("*.json")) if (done := _reap_one(path, boot_id)) is not None
    ]


def _reap_one(path: Path, boot_id: str) -> Reaped | None:
    try:
        record = json.loads(path.read_text())
        supervisor = Process(**record["supervisor"])
        child = Process(**record["child"])
        run_id, same_boot, scratch = record["run_id"], record["boot_id"] == boot_id, record["scratch"]
        command = " ".join(record["argv"][:3])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StartError(f"{path}: not a lease ({error}); delete the file if no lab runs") from error
    if same_boot and supervisor.alive():
        return None  # its owner runs, or it is ending its tree by itself this moment
    pids = _end_session(child, path) if same_boot else ()
    remove_shared_memory(set(record.get("shared_memory", ())))
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return Reaped(run_id, command, pids)


def _end_session(leader: Process, path: Path) -> tuple[int, ...]:
    """SIGKILL every member of the session that ``leader`` opened; wait until all are gone."""
    members = session_members(leader.pid, leader.start_ticks)
    impostor = next((m for m in members if m.pid == leader.pid and m != leader), None)
    if impostor is not None:  # the number was given to a later process: the session of the lease is gone
        return ()
    pids = tuple(process.pid for process in members)
    shm = shared_memory(members)
    patience = time.monotonic() + TRACKER_S

    def killed() -> bool:
        nonlocal members
        members = session_members(leader.pid, leader.start_ticks)
        for process in members:
            if time.monotonic() > patience or not is_resource_tracker(process):
                send(process, signal.SIGKILL)
        return not members

    waiting.until(
        killed,
        END_DEADLINE_S,
        lambda: StartError(f"{path}: {members} do not end; look at them with ps -fp PID"),
        POLL_S,
    )
    remove_shared_memory(shm)
    return pids


def wait_for_orphaned_supervisors(deadline_s: float = END_DEADLINE_S) -> None:
    """Wait until supervisors whose owner is gone have finished; they remove their lease when they have.

    A supervisor whose owner is alive belongs to a session that runs; it is not waited for.

    Raises:
        StartError: if one does not finish; the message names its lease.
    """
    left: list[Path] = []

    def finished() -> bool:
        left[:] = [path for path in folder().glob("*.json") if _is_orphaned(path)]
        return not left

    waiting.until(
        finished,
        deadline_s,
        lambda: StartError(f"{left[0]}: its supervisor has lost its owner and does not end"),
        POLL_S,
    )


def _is_orphaned(path: Path) -> bool:
    try:
        record = json.loads(path.read_text())
        return Process(**record["supervisor"]).alive() and not Process(**record["owner"]).alive()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False

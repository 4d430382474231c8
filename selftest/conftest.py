"""Fixtures that several selftests share: a state folder of the test's own, and stand-in processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

DEADLINE_S = 20.0  # for conditions that hold within a second; only a failing test waits this long
POLL_S = 0.02

# Plays a pytest session that owns one process. Arguments: the folder it works in, then the command it owns.
OWNER = """
import os, signal, sys, time
from pathlib import Path
from disagglab.process import OwnedProcess

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background ignores it

folder = Path(sys.argv[1])
log, scratch = folder / "log", folder / "scratch"
with OwnedProcess("standin", sys.argv[2:], os.environ, log, scratch, "run", grace_s=0.3):
    (folder / "owning").touch()
    time.sleep(300)
"""


class Standins:
    """The stand-in processes of one test; whatever still runs when the test is over is killed.

    A stand-in tells its pid by writing it into a file of its working folder. Whether it is gone is asked of
    psutil and not of the code under test.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watched: list[psutil.Process] = []
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, argv: Sequence[str], cwd: Path | None = None) -> psutil.Process:
        """Start a process that nobody owns, in a session of its own."""
        with open(self._folder / "standins.log", "ab") as log:
            process = subprocess.Popen(
                argv,
                cwd=cwd or self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return self.watch(process.pid)

    def owner(self, argv: Sequence[str]) -> psutil.Process:
        """Start a stand-in for pytest that owns ``argv``; return when it does."""
        process = self.start([sys.executable, "-c", OWNER, str(self._folder), *argv])
        self.until(lambda: (self._folder / "owning").exists(), "the owner has started its process")
        return process

    def watch(self, pid: int) -> psutil.Process:
        """A handle on a running process, known by pid and creation time."""
        process = psutil.Process(pid)
        self._watched.append(process)
        return process

    def told(self, file: str) -> psutil.Process:
        """The process that wrote its pid into ``file``."""
        path = self._folder / file
        self.until(lambda: path.exists() and path.read_text().endswith("\n"), f"a pid is in {path}")
        return self.watch(int(path.read_text()))

    @staticmethod
    def gone(*processes: psutil.Process) -> bool:
        """Whether none of them runs; a zombie that nobody has collected yet counts as gone."""
        return not any(map(_runs, processes))

    @staticmethod
    def until(condition: Callable[[], bool], what: str) -> None:
        """Return as soon as ``condition`` holds; fail, naming ``what``, when it does not in time."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
            time.sleep(POLL_S)

    def close(self) -> None:
        """Kill what is left, with what it started in its group."""
        for process in self._watched:
            if _runs(process):
                process.kill()
        for started in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own, so that it meets no lease of a lab that runs."""
    folder = tmp_path / "state"
    monkeypatch.setenv("DISAGGLAB_STATE", str(folder))
    return folder


@pytest.fixture
def shared_file() -> Iterator[Path]:
    """A name under /dev/shm that is free now and freed after the test."""
    path = Path(f"/dev/shm/disagglab-selftest-{uuid.uuid4().hex}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def standins(tmp_path: Path) -> Iterator[Standins]:
    """Stand-in processes that work in ``tmp_path``."""
    processes = Standins(tmp_path)
    yield processes
    processes.close()

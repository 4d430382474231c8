"""A deputy as a program over pipes: it ends everything when its owner ends, is silent, or reads no answers.

It runs from the very archive that travels to a remote host, without site packages. Oracle: psutil and the
file system.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from disagglab.agent import leftovers
from disagglab.agent.deputy import LOGS_KEPT
from disagglab.hosts.remote import bundle

if TYPE_CHECKING:
    from selftest.conftest import Standins

TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
PORTS = (20400, 20499)  # of no lab
GRACE_S = 0.3


class Program:
    """A deputy as a program. ``heartbeat_s``: silence after which it ends."""

    def __init__(self, folder: Path, run_id: str, heartbeat_s: float, exclusive: bool) -> None:
        argv = [sys.executable, "-E", "-s", "-S", str(folder)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._number = 0
        self.hello = self.ask(run_id=run_id, ports=PORTS, heartbeat_s=heartbeat_s, exclusive=exclusive)

    def send(self, **asked: Any) -> None:
        """Ask, and do not wait for the answer."""
        assert self.process.stdin is not None
        self._number += 1
        self.process.stdin.write(json.dumps({"id": self._number, **asked}).encode() + b"\n")

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Ask; the answer."""
        assert self.process.stdout is not None
        self.send(**asked)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["id"] == self._number
        return answer

    def tree(self, standins: Standins, argv: list[str] = TREE) -> list[psutil.Process]:
        """Start a stand-in; its processes."""
        self.ask(method="start", args=["standin", argv, {}, [], [], GRACE_S])
        folder = self.hello["result"]["logs"]
        return [standins.told(f"{folder}/{file}") for file in ("child", "grandchild")]

    def close(self) -> None:
        """End it as a closed channel does."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


Make = Callable[..., Program]


@pytest.fixture
def program(state: Path, tmp_path: Path, standins: Standins) -> Iterator[Make]:
    """Starts deputies from the archive that travels to a remote host."""
    folder = tmp_path / "bundle"
    with tarfile.open(fileobj=io.BytesIO(bundle()[1])) as archive:
        archive.extractall(folder, filter="data")
    made: list[Program] = []

    def make(run_id: str = "run", heartbeat_s: float = 30.0, exclusive: bool = False) -> Program:
        made.append(Program(folder, run_id, heartbeat_s, exclusive))
        return made[-1]

    yield make
    for each in made:
        each.close()


def no_leases() -> bool:
    """Whether no process of ours is noted any more."""
    return not list(leftovers.folder().iterdir())


def test_the_program_answers_what_it_is_asked(program: Make, standins: Standins) -> None:
    """Without site packages: who it is, a process started and stopped, its log, its lease."""
    deputy = program()
    assert deputy.hello["result"]["pid"] == deputy.process.pid
    assert deputy.hello["result"]["hostname"] == os.uname().nodename
    assert deputy.hello["result"]["home"] == str(Path.home())
    child, grandchild = deputy.tree(standins, ["sh", "-c", f"echo said; {TREE[2]}"])
    assert deputy.ask(method="alive", args=["standin"])["result"] is True
    assert deputy.ask(method="tree", args=["standin"])["result"] == [child.pid, grandchild.pid]
    assert deputy.ask(method="follow", args=[{"standin": 0}])["result"] == {"standin": "said\n"}
    assert not no_leases()
    assert deputy.ask(method="stop", args=["standin"])["result"]["reason"] == "stop"
    assert standins.gone(child, grandchild)
    assert no_leases()


def test_the_end_of_input_ends_the_tree(program: Make, standins: Standins) -> None:
    """A closed channel: the deputy returns when child and grandchild are gone."""
    deputy = program()
    tree = deputy.tree(standins)
    deputy.close()
    assert deputy.process.returncode == 0
    assert standins.gone(*tree)
    assert no_leases()


def test_a_killed_deputy_ends_the_tree(program: Make, standins: Standins) -> None:
    """SIGKILL runs no handler; each supervisor sees the end of its owner."""
    deputy = program()
    tree = deputy.tree(standins)
    deputy.process.kill()
    standins.until(lambda: standins.gone(*tree), "the supervisor has ended its tree")
    standins.until(no_leases, "the supervisor has removed its lease")


def test_silence_ends_the_tree(program: Make, standins: Standins) -> None:
    """Words keep it alive beyond heartbeat_s; without one, all of it ends, though the pipe is open."""
    heartbeat_s = 0.5
    deputy = program(heartbeat_s=heartbeat_s)
    tree = deputy.tree(standins)
    until = time.monotonic() + 2 * heartbeat_s
    while time.monotonic() < until:
        deputy.ask(method="memory_available", args=[])
        time.sleep(heartbeat_s / 8)
    assert not standins.gone(tree[0]), "ended although it was spoken to"
    began = time.monotonic()
    standins.until(lambda: deputy.process.poll() is not None, "the deputy has ended")
    assert standins.gone(*tree)
    assert heartbeat_s * 0.7 <= time.monotonic() - began < heartbeat_s + GRACE_S + 3


def test_a_reader_that_does_not_read_does_not_hang_it(
    program: Make, standins: Standins, tmp_path: Path
) -> None:
    """A frozen owner takes no answers: the pipe is full, and after heartbeat_s all of it ends."""
    deputy = program(heartbeat_s=0.5)
    tree = deputy.tree(standins)
    (tmp_path / "large").write_text("x" * 2**20)
    deputy.send(method="read_text", args=[str(tmp_path / "large")])
    standins.until(lambda: deputy.process.poll() is not None, "the deputy has ended")
    assert standins.gone(*tree)


def test_a_second_session_is_refused(program: Make, standins: Standins) -> None:
    """Two labs at once would measure each other; the answer has the first's pid. Then the host is free."""
    first = program(exclusive=True)
    tree = first.tree(standins)
    second = program("other", exclusive=True)
    assert second.hello["kind"] == "StartError"
    assert f"another session (pid {first.process.pid})" in second.hello["error"]
    assert os.uname().nodename in second.hello["error"]
    assert not standins.gone(*tree)
    first.close()
    assert "result" in program("third", exclusive=True).hello


def test_an_error_of_the_system_is_an_answer(program: Make, tmp_path: Path) -> None:
    """A missing file, a process never started, a command that cannot be: told, and it lives on."""
    deputy = program()
    missing = deputy.ask(method="read_text", args=[str(tmp_path / "missing")])
    assert missing["kind"] == "FileNotFoundError"
    assert str(tmp_path / "missing") in missing["error"]
    assert deputy.ask(method="stop", args=["nobody"])["kind"] == "KeyError"
    refused = deputy.ask(method="start", args=["standin", ["/no/such/vllm"], {}])
    assert refused["kind"] == "StartError"
    assert "could not start /no/such/vllm" in refused["error"]
    assert deputy.ask(method="exists", args=[str(tmp_path)])["result"] is True


def test_a_hangup_is_no_end(program: Make, standins: Standins) -> None:
    """SSH may send SIGHUP before the channel's end; what was asked last is still answered."""
    deputy = program()
    deputy.process.send_signal(signal.SIGHUP)
    assert deputy.ask(method="exists", args=["/"])["result"] is True


def test_logs_of_old_runs_are_deleted(program: Make, state: Path) -> None:
    """A host that is used every night does not fill up: the newest few stay."""
    for number in range(LOGS_KEPT + 2):
        program(f"2026010{number}").close()
    runs = leftovers.state_folder() / "runs"
    assert sorted(path.name for path in runs.iterdir()) == [
        f"2026010{number}" for number in range(2, LOGS_KEPT + 2)
    ]
    slow_clock = program("20250101")
    assert (runs / "20250101").is_dir(), "a run deleted its own logs"
    assert len(list(runs.iterdir())) == LOGS_KEPT
    slow_clock.close()

"""A deputy owns what it starts, tells its owner what it asks, and leaves nothing when the owner is gone.

Here it is an object, as on this machine; as a program: test_deputy_program.py. Oracle: psutil, the file
system, and sockets of the test.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from disagglab.agent import leftovers
from disagglab.agent.deputy import Deputy, answer_to
from disagglab.agent.supervisor import MEMORY_LOOK_S
from disagglab.errors import InvalidRun, LabError, StartError, TransferError
from disagglab.hosts.host import cores

if TYPE_CHECKING:
    from selftest.conftest import Standins

TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
STUBBORN = ["sh", "-c", 'trap "" TERM; sleep 300 & echo $! > grandchild; echo $$ > child; wait']
LISTENER = """
import os, pathlib, socket, sys, time
with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", int(sys.argv[1])))
    server.listen()
    pathlib.Path("listener").write_text(f"{os.getpid()}\\n")
    time.sleep(300)
"""
BUSY = """
import pathlib, time
while time.process_time() < 0.3:
    pass
pathlib.Path("done").touch()
time.sleep(300)
"""
NO_TEXT = b"half a character: \xe2\x82 and \xff\x00\r\n"
PORTS = (20400, 20499)  # of no lab
GIB = 2**30
GRACE_S = 0.3


def python(source: str, *arguments: str) -> list[str]:
    """A command that runs ``source`` without site packages, which take most of Python's start."""
    return [sys.executable, "-I", "-S", "-c", source, *arguments]


@pytest.fixture
def deputy(state: Path, tmp_path: Path, standins: Standins) -> Iterator[Deputy]:
    """A deputy whose processes work in ``tmp_path``; ended before stray stand-ins are killed."""
    made = Deputy("run", PORTS, tmp_path)
    yield made
    made.close()


def test_a_process_is_known_until_it_is_stopped(deputy: Deputy, standins: Standins) -> None:
    """start, alive, tree, stop: identity, descendants and ending are those that psutil sees."""
    started = deputy.start("standin", TREE, {}, grace_s=GRACE_S)
    child, grandchild = standins.told("child"), standins.told("grandchild")
    assert started["pid"] == child.pid
    assert deputy.alive("standin")
    assert deputy.tree("standin") == [child.pid, grandchild.pid]
    assert Path(started["scratch"]).is_dir()

    ended = deputy.stop("standin")

    assert standins.gone(child, grandchild)
    assert ended is not None
    assert ended["reason"] == "stop"
    assert not deputy.alive("standin")
    assert deputy.tree("standin") == []
    assert not Path(started["scratch"]).exists()


def test_a_killed_process_is_seen_as_a_crash(deputy: Deputy, standins: Standins) -> None:
    """kill ends the command alone; its supervisor sees that, and ends what it left, without SIGKILL."""
    deputy.start("standin", TREE, {})  # the grace is long: a busy machine may take its time
    child, grandchild = standins.told("child"), standins.told("grandchild")

    deputy.kill("standin")

    standins.until(lambda: standins.gone(child, grandchild), "command and child have ended")
    deputy.kill("standin")  # nobody has that pid and start time any more
    ended = deputy.stop("standin")
    assert ended is not None
    assert (ended["reason"], ended["code"], ended["killed"]) == ("command ended", -signal.SIGKILL, [])


def test_a_process_gets_little_of_our_environment(
    deputy: Deputy, standins: Standins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PATH and what names caches, a TMPDIR of its own, what was asked for; nothing else of the caller's."""
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    monkeypatch.setenv("HF_HOME", "/models")
    started = deputy.start("standin", TREE, {"LANG": "tlh"}, grace_s=GRACE_S)
    found = standins.told("child").environ()
    assert "SECRET_OF_THE_CALLER" not in found
    assert found["PATH"] == os.environ["PATH"]
    assert (found["HF_HOME"], found["LANG"], found["TMPDIR"]) == ("/models", "tlh", started["scratch"])


def test_cpu_time_is_that_of_the_tree(deputy: Deputy, standins: Standins, tmp_path: Path) -> None:
    """A sleeping process uses none, a computing one what it computes."""
    deputy.start("busy", python(BUSY), {}, grace_s=GRACE_S)
    deputy.start("idle", ["sleep", "300"], {}, grace_s=GRACE_S)
    standins.until((tmp_path / "done").exists, "it has computed")
    assert 0.25 <= deputy.cpu_s("busy") < 2.0
    assert deputy.cpu_s("idle") < 0.1


def test_the_cores_of_each_thread_are_told(deputy: Deputy, standins: Standins) -> None:
    """A bound process's threads are on its cores, by thread id."""
    core = min(os.sched_getaffinity(0))
    deputy.start("standin", TREE, {}, cpus=[core], grace_s=GRACE_S)
    pids = [standins.told(file).pid for file in ("child", "grandchild")]
    found = deputy.cores_of_threads("standin")
    assert {thread: cores(text) for thread, text in found.items()} == {str(pid): {core} for pid in pids}


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", {0}), ("0-3,7", {0, 1, 2, 3, 7}), ("2,10-11", {2, 10, 11})]
)
def test_a_list_of_cores_is_understood(text: str, numbers: set[int]) -> None:
    """As the kernel writes it."""
    assert cores(text) == numbers


def test_a_name_can_be_used_again_only_when_it_is_free(deputy: Deputy, standins: Standins) -> None:
    """Two processes of one name would share a log and a lease."""
    deputy.start("standin", TREE, {}, grace_s=GRACE_S)
    first = standins.told("child")
    with pytest.raises(StartError, match="standin runs already"):
        deputy.start("standin", TREE, {})
    assert not standins.gone(first)
    deputy.stop("standin")
    assert deputy.start("standin", TREE, {}, grace_s=GRACE_S)["pid"] != first.pid


def test_whose_port_it_is_is_known(deputy: Deputy, standins: Standins) -> None:
    """A port is another's if somebody listens and nobody of the process's tree does."""
    ours, theirs, nobodys = (deputy.reserve_port("127.0.0.1") for _ in range(3))
    deputy.start(
        "standin", ["sh", "-c", '"$@" & wait', "sh", *python(LISTENER, str(ours))], {}, grace_s=GRACE_S
    )
    standins.told("listener")
    Path(deputy.logs / "listener").unlink()
    standins.start(python(LISTENER, str(theirs)))
    stranger = standins.told("listener")
    assert [deputy.is_anothers_port("standin", port) for port in (ours, theirs, nobodys)] == [
        False,
        True,
        False,
    ]
    stranger.kill()


def test_close_names_ports_that_still_answer(state: Path, tmp_path: Path, standins: Standins) -> None:
    """A stranger on a port of ours would answer the next session's questions."""
    deputy = Deputy("run", PORTS, tmp_path)
    port = deputy.reserve_port("127.0.0.1")
    standins.start(python(LISTENER, str(port)))
    standins.told("listener")
    with pytest.raises(StartError, match=rf"ports of this run still answer: \[{port}\]"):
        deputy.close()
    deputy.close()


def test_close_names_what_is_left(state: Path, tmp_path: Path, standins: Standins) -> None:
    """A supervisor and its lease are gone, so nothing knows the orphan any more; it is found and named."""
    deputy = Deputy("run", PORTS, tmp_path)
    deputy.start("standin", TREE, {}, grace_s=GRACE_S)
    child, grandchild = standins.told("child"), standins.told("grandchild")
    (path,) = leftovers.folder().glob("*.json")
    watcher = standins.watch(json.loads(path.read_text())["supervisor"]["pid"])
    path.unlink()
    watcher.kill()
    standins.until(lambda: standins.gone(watcher, child), "the command follows its supervisor")
    with pytest.raises(StartError, match=rf"processes of this run still live: .*pid={grandchild.pid}\b"):
        deputy.close()
    assert not standins.gone(grandchild)


def test_close_ends_everything_at_once_and_some_last(state: Path, tmp_path: Path, standins: Standins) -> None:
    """Three stubborn processes take one grace period; what others run inside of ends after them."""
    deputy = Deputy("run", PORTS, tmp_path)
    program = 'trap "" TERM; echo $$ > "$1"; while :; do sleep 0.02; done'
    for name in ("one", "two", "three", "holder"):
        deputy.start(name, ["sh", "-c", program, "sh", name], {}, grace_s=0.6 if name != "holder" else 0.1)
    found = [standins.told(name) for name in ("one", "two", "three")]
    holder = standins.told("holder")
    seen: list[bool] = []

    def watch() -> None:
        while not standins.gone(holder):
            pass
        seen.append(standins.gone(*found))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    deputy.close(["holder"])
    took = time.monotonic() - began
    thread.join()
    assert seen == [True], "the holder ended before the others"
    assert 0.6 <= took < 1.7


def test_all_can_be_asked_to_stop(deputy: Deputy, standins: Standins) -> None:
    """Several hosts end side by side: it returns at once, and everything ends without a further word."""
    deputy.start("standin", TREE, {}, grace_s=GRACE_S)
    tree = [standins.told(file) for file in ("child", "grandchild")]
    deputy.start("other", ["sleep", "300"], {}, grace_s=GRACE_S)
    deputy.ask_all_to_stop()
    standins.until(lambda: standins.gone(*tree) and not deputy.alive("other"), "all of it has ended")


def test_a_log_is_followed_by_offset(deputy: Deputy, tmp_path: Path) -> None:
    """Bytes that are no text arrive unchanged, from where the reader is; a missing log is left out."""
    (tmp_path / "a.log").write_bytes(NO_TEXT * 2)
    (tmp_path / "b.log").write_bytes(b"")
    found = deputy.follow({"a": len(NO_TEXT), "b": 0, "never": 0})
    assert json.loads(json.dumps(found))["a"].encode("latin-1") == NO_TEXT
    assert found["b"] == ""
    assert set(found) == {"a", "b"}


def test_a_file_is_written_for_its_owner_alone(deputy: Deputy, tmp_path: Path) -> None:
    """On a shared host a job file, which may hold a token, is not for all to read."""
    path = tmp_path / "job"
    deputy.write_text(str(path), "text")
    assert deputy.read_text(str(path)) == "text"
    assert deputy.exists(str(path))
    assert path.stat().st_mode & 0o077 == 0
    assert [each.name for each in tmp_path.glob("job*")] == ["job"]


def test_short_of_memory_a_command_is_killed_at_once(
    deputy: Deputy, standins: Standins, tmp_path: Path
) -> None:
    """Below memory_stop_bytes there is no time for grace; the log says who ended it, and which key."""
    began = time.monotonic()
    deputy.start("standin", STUBBORN, {}, grace_s=60.0, memory_stop_bytes=2**60)
    standins.until(lambda: not deputy.alive("standin"), "it was killed")
    ended = deputy.stop("standin")
    assert time.monotonic() - began < 10
    assert ended is not None
    assert (ended["reason"], ended["code"]) == ("memory", -signal.SIGKILL)
    last = (tmp_path / "standin.log").read_text().splitlines()[-1]
    assert f"ended by its supervisor: MemAvailable fell below {2**60 / GIB:g} GiB" in last
    assert "[memory] stop_gib" in last


@pytest.mark.parametrize("limit", [0, 1])
def test_with_memory_enough_a_command_lives(deputy: Deputy, standins: Standins, limit: int) -> None:
    """Neither without a limit nor far above it is anything ended, look after look at the memory."""
    deputy.start("standin", TREE, {}, grace_s=GRACE_S, memory_stop_bytes=limit)
    child = standins.told("child")
    time.sleep(2 * MEMORY_LOOK_S)
    assert not standins.gone(child)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StartError("why"), "StartError"),
        (InvalidRun("why"), "InvalidRun"),
        (TransferError("why"), "TransferError"),
        (LabError("why"), "LabError"),
    ],
)
def test_an_error_keeps_its_class(error: LabError, kind: str) -> None:
    """What the deputy raises on purpose arrives with its message and its class."""

    def fail() -> None:
        raise error

    assert answer_to(fail, []) == {"error": "why", "kind": kind}


def test_a_port_that_a_deputy_holds_is_taken(deputy: Deputy) -> None:
    """Reserved means that nobody else can bind it; free_ports gives back what it finds."""
    port = deputy.reserve_port("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    free = deputy.free_ports("127.0.0.1", 3)
    assert port not in free
    assert deputy.free_ports("127.0.0.1", 3) == free
    with pytest.raises(StartError, match="no free port left"):
        deputy.free_ports("127.0.0.1", PORTS[1] - PORTS[0] + 2)


def test_a_port_that_is_given_back_is_reserved_again(deputy: Deputy) -> None:
    """Of its own address alone; it is held until the deputy ends."""
    port = deputy.reserve_port("127.0.0.1")
    deputy.give_back_port("127.0.0.1", port)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    assert deputy.reserve_port("127.0.0.2") == port
    assert deputy.reserve_port("127.0.0.1") == port
    assert deputy.reserve_port("127.0.0.1") != port


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_a_port_that_is_not_reserved_cannot_be_given_back(deputy: Deputy, address: str) -> None:
    """Whether or not anything was reserved on its address."""
    port = deputy.reserve_port("127.0.0.1")
    with pytest.raises(ValueError, match="is not reserved"):
        deputy.give_back_port(address, port + 1)

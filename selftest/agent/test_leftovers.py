"""A lease lets a later session end what a killed supervisor left, and nothing else.

Oracle: psutil and the file system. The danger of such a clean-up is that it ends too much, so most tests put
a living bystander where a careless one would strike: same command line, same process number, another boot.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from disagglab.agent import leftovers
from disagglab.agent.process import OwnedProcess
from disagglab.agent.supervisor import Process, identify
from disagglab.errors import StartError
from disagglab.paths import ROOT

if TYPE_CHECKING:
    from selftest.conftest import Standins

TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
STUBBORN = ["sh", "-c", 'trap "" TERM; sleep 300 & echo $! > grandchild; echo $$ > child; wait']
MAPPING_GRANDCHILD = """
import mmap, os, pathlib, sys, time
if os.fork() == 0:
    with open(sys.argv[1], "w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    pathlib.Path("grandchild").write_text(f"{os.getpid()}\\n")
    time.sleep(300)
pathlib.Path("child").write_text(f"{os.getpid()}\\n")
time.sleep(300)
"""
LIMIT_S = 60
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.fixture
def ended() -> Process:
    """The identity of a process that has been and gone."""
    with subprocess.Popen(["sleep", "300"]) as process:
        identity = identify(process.pid)
        process.kill()
    return identity


def as_record(process: Process) -> dict[str, int]:
    """A process as a lease holds it."""
    return {"pid": process.pid, "start_ticks": process.start_ticks}


def write_lease(tmp_path: Path, supervisor: Process, child: Process, **changes: object) -> Path:
    """A lease as a supervisor writes it, with a scratch folder that exists."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    record = {
        "run_id": "run",
        "boot_id": BOOT_ID,
        "owner": as_record(supervisor),
        "supervisor": as_record(supervisor),
        "child": as_record(child),
        "scratch": str(scratch),
        "ports": [],
        "argv": ["vllm", "serve", "model", "--port", "21000"],
        **changes,
    }
    path = leftovers.folder() / "run.standin.json"
    path.write_text(json.dumps(record))
    return path


def supervisor_of(standins: Standins) -> psutil.Process:
    """The supervisor that the only lease names."""
    (path,) = leftovers.folder().glob("*.json")
    return standins.watch(json.loads(path.read_text())["supervisor"]["pid"])


def test_reap_ends_what_a_killed_supervisor_left(
    state: Path, standins: Standins, tmp_path: Path, shared_file: Path
) -> None:
    """The command dies with its supervisor; a grandchild is orphaned, and the next session ends just that.

    It also removes the orphan's shared memory, the scratch folder and the lease. A bystander that runs the
    same program is left alone.
    """
    command = [sys.executable, "-I", "-S", "-c", MAPPING_GRANDCHILD, str(shared_file)]
    (tmp_path / "elsewhere").mkdir()
    bystander = standins.start(
        [*command[:-1], str(tmp_path / "elsewhere" / "memory")], cwd=tmp_path / "elsewhere"
    )
    owned = OwnedProcess(
        "standin", command, os.environ, tmp_path / "log", tmp_path / "scratch", "run"
    ).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")

    supervisor_of(standins).kill()
    standins.until(lambda: standins.gone(child), "the kernel has ended the command")
    assert not standins.gone(grandchild)
    assert (tmp_path / "scratch").exists()
    assert shared_file.exists()

    assert leftovers.reap() == [leftovers.Reaped("run", " ".join(command[:3]), (grandchild.pid,))]

    assert standins.gone(grandchild)
    assert not shared_file.exists()
    assert not (tmp_path / "scratch").exists()
    assert list(leftovers.folder().iterdir()) == []
    assert not standins.gone(bystander)
    owned.stop()


def test_reap_leaves_a_lease_with_a_living_supervisor_alone(
    state: Path, standins: Standins, tmp_path: Path
) -> None:
    """Another session of this account runs its own lab; it keeps its processes, its folder and its lease."""
    server = standins.start(["sleep", "300"])
    path = write_lease(tmp_path, supervisor=identify(os.getpid()), child=identify(server.pid))

    assert leftovers.reap() == []

    assert not standins.gone(server)
    assert path.exists()
    assert (tmp_path / "scratch").exists()


def test_reap_ends_the_session_of_a_lease_whose_supervisor_is_gone(
    state: Path, standins: Standins, tmp_path: Path, ended: Process
) -> None:
    """The control of the tests around it: the same lease, and only the supervisor's life differs."""
    server = standins.start(["sleep", "300"])
    path = write_lease(tmp_path, supervisor=ended, child=identify(server.pid))

    assert leftovers.reap() == [leftovers.Reaped("run", "vllm serve model", (server.pid,))]

    assert standins.gone(server)
    assert not path.exists()
    assert not (tmp_path / "scratch").exists()


def test_reap_removes_a_lease_of_another_boot_and_kills_nothing(
    state: Path, standins: Standins, tmp_path: Path, ended: Process
) -> None:
    """After a restart the numbers belong to others, even where number and start time happen to agree."""
    bystander = standins.start(["sleep", "300"])
    path = write_lease(tmp_path, supervisor=ended, child=identify(bystander.pid), boot_id="an earlier boot")

    assert leftovers.reap() == [leftovers.Reaped("run", "vllm serve model", ())]

    assert not standins.gone(bystander)
    assert not path.exists()
    assert not (tmp_path / "scratch").exists()


def test_reap_does_not_end_a_session_that_was_given_an_old_number(
    state: Path, standins: Standins, tmp_path: Path, ended: Process
) -> None:
    """The kernel hands process numbers out again; the start time tells the holders apart."""
    bystander = standins.start(["sh", "-c", "sleep 300 & echo $! > member; wait"])
    member = standins.told("member")
    earlier = Process(bystander.pid, identify(bystander.pid).start_ticks - 1)
    path = write_lease(tmp_path, supervisor=ended, child=earlier)

    assert leftovers.reap() == [leftovers.Reaped("run", "vllm serve model", ())]

    assert not standins.gone(bystander)
    assert not standins.gone(member)
    assert not path.exists()


@pytest.mark.parametrize(
    "text", ["", "{not json", "[]", "{}", '{"supervisor": 1}', '{"supervisor": {"pid": 1}}']
)
def test_a_corrupt_lease_is_named(state: Path, text: str) -> None:
    """Nothing is guessed about processes: the error says which file it is and what to do with it."""
    path = leftovers.folder() / "corrupt.json"
    path.write_text(text)
    with pytest.raises(StartError, match=r"corrupt\.json: not a lease .*delete the file") as caught:
        leftovers.reap()
    assert str(path) in str(caught.value)
    assert path.exists()


@pytest.mark.parametrize("key", ["run_id", "boot_id", "supervisor", "child", "scratch", "argv"])
def test_a_lease_that_lacks_a_key_is_named_and_ends_nothing(
    state: Path, standins: Standins, tmp_path: Path, ended: Process, key: str
) -> None:
    """A lease is understood as a whole before anything is done, so a half-understood one ends nothing."""
    server = standins.start(["sleep", "300"])
    path = write_lease(tmp_path, supervisor=ended, child=identify(server.pid))
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))

    with pytest.raises(StartError, match=rf"run\.standin\.json: not a lease \('{key}'\)"):
        leftovers.reap()

    assert not standins.gone(server)
    assert (tmp_path / "scratch").exists()


def test_the_wait_returns_when_an_orphaned_supervisor_has_finished(
    state: Path, standins: Standins, tmp_path: Path
) -> None:
    """A session that starts right after a killed one waits for its rest instead of measuring beside it."""
    owner = standins.owner(STUBBORN)  # it ignores SIGTERM, so its ending takes at least the grace
    child, grandchild = standins.told("child"), standins.told("grandchild")
    owner.send_signal(signal.SIGKILL)
    standins.until(lambda: standins.gone(owner), "the owner has ended")
    assert not standins.gone(child), "the tree ended before anybody could wait for it"

    leftovers.wait_for_orphaned_supervisors()

    assert standins.gone(child, grandchild)
    assert list(leftovers.folder().iterdir()) == []


def test_the_wait_names_a_lease_that_does_not_end(
    state: Path, standins: Standins, tmp_path: Path, ended: Process
) -> None:
    """A supervisor that hangs is not waited for without end; the error says where to look."""
    hanging = identify(standins.start(["sleep", "300"]).pid)
    path = write_lease(tmp_path, supervisor=hanging, child=hanging, owner=as_record(ended))
    with pytest.raises(StartError, match="lost its owner") as caught:
        leftovers.wait_for_orphaned_supervisors(deadline_s=0.1)
    assert str(path) in str(caught.value)


def test_the_wait_does_not_wait_for_a_session_that_runs(state: Path, tmp_path: Path) -> None:
    """A supervisor with a living owner belongs to another session, which may run for hours."""
    me = identify(os.getpid())
    path = write_lease(tmp_path, supervisor=me, child=me)
    leftovers.wait_for_orphaned_supervisors(deadline_s=0.0)
    assert path.exists()


def test_without_a_lease_there_is_nothing_to_do(state: Path) -> None:
    """The first session of an account finds no folder and makes it."""
    assert leftovers.reap() == []
    leftovers.wait_for_orphaned_supervisors(deadline_s=0.0)
    assert leftovers.folder() == state / os.uname().nodename / "leases"


def test_hosts_that_share_a_home_do_not_share_leases(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pids of another host say nothing here: its leases and its lock lie in a folder of its name."""
    here = leftovers.folder()
    (here / "corrupt.json").write_text("not a lease")
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename="elsewhere"))
    assert leftovers.folder() == state / "elsewhere" / "leases"
    assert leftovers.reap() == []
    monkeypatch.undo()
    assert (here / "corrupt.json").exists()


def test_two_sessions_cannot_run_a_lab_at_once(state: Path) -> None:
    """The second is refused at once, with the pid of the first and how to end it; then the lock is free."""
    program = "from disagglab.agent.leftovers import exclusive\nwith exclusive(): pass"
    with leftovers.exclusive():
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
        )
        assert answer.returncode != 0
        assert f"another session (pid {os.getpid()})" in answer.stderr
        assert f"kill -INT {os.getpid()}" in answer.stderr
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr


def test_within_one_process_the_lock_is_held_once(state: Path) -> None:
    """A second session of the same process is refused as well, and the first one keeps the lock."""
    with leftovers.exclusive():
        for _ in range(2):
            with (
                pytest.raises(StartError, match=f"another session .pid {os.getpid()}"),
                leftovers.exclusive(),
            ):
                pass
    with leftovers.exclusive():
        pass

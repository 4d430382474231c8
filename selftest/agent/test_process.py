"""What an owned process starts ends with it, however its owner, its supervisor or the command goes away.

Oracle: psutil, which knows a process by pid and creation time, and the file system; never the code under
test. Each command is a small shell or Python stand-in that writes its pids into files of the test's folder.
A stop has returned only when everything is gone, so after it nothing is polled; after a kill the supervisor
works on its own and the condition is polled under a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from disagglab.agent import leftovers, supervisor
from disagglab.agent.process import OwnedProcess
from disagglab.errors import StartError

if TYPE_CHECKING:
    from selftest.conftest import Standins

GRACE_S = 0.3
LIMIT_S = 60.0  # since a process ended that the test has just ended
TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
STUBBORN = ["sh", "-c", 'trap "" TERM; sleep 300 & echo $! > grandchild; echo $$ > child; wait']
POLITE = [
    "sh",
    "-c",
    "trap 'kill -KILL $!; exit 7' TERM; sleep 300 & echo $! > grandchild; echo $$ > child; wait",
]
DAEMONISING = """
import os, pathlib, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path("daemon").write_text(f"{os.getpid()}\\n")
        time.sleep(300)
    os._exit(0)
os.wait()
pathlib.Path("child").write_text(f"{os.getpid()}\\n")
time.sleep(300)
"""
MAPPING = """
import mmap, os, pathlib, subprocess, sys, time
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
grandchild = subprocess.Popen(["sleep", "300"])
pathlib.Path("grandchild").write_text(f"{grandchild.pid}\\n")
pathlib.Path("child").write_text(f"{os.getpid()}\\n")
time.sleep(300)
"""
BADLY_NAMED = """
import ctypes, pathlib, os, time
PR_SET_NAME = 15
ctypes.CDLL(None).prctl(PR_SET_NAME, bytes([0xC3]))
pathlib.Path("bystander").write_text(f"{os.getpid()}\\n")
time.sleep(300)
"""
PYTEST_FILE = """
import os, time
from pathlib import Path
import pytest
from disagglab.agent.process import OwnedProcess

COMMAND = {command!r}

@pytest.fixture
def owned():
    here = Path(__file__).parent
    log, scratch = here / "log", here / "scratch"
    with OwnedProcess("standin", COMMAND, os.environ, log, scratch, "run", grace_s=0.3) as process:
        yield process

def test_that_is_killed(owned):
    time.sleep(300)
"""

Own = Callable[..., OwnedProcess]


def python(source: str, *arguments: str) -> list[str]:
    """A command that runs ``source`` without reading site packages, which takes most of Python's start."""
    return [sys.executable, "-I", "-S", "-c", source, *arguments]


@pytest.fixture
def own(state: Path, tmp_path: Path, standins: Standins) -> Iterator[Own]:
    """Makes owned processes that work in ``tmp_path``; stops them before stray stand-ins are killed."""
    made: list[OwnedProcess] = []

    def make(argv: list[str], **options: Any) -> OwnedProcess:
        options = {"env": {"PATH": os.environ["PATH"]}, "grace_s": GRACE_S, **options}
        made.append(
            OwnedProcess(
                "standin", argv, log=tmp_path / "log", scratch=tmp_path / "scratch", run_id="run", **options
            )
        )
        return made[-1]

    yield make
    for process in made:
        process.stop()


def traces(tmp_path: Path) -> list[Path]:
    """The lease files and the scratch folder that exist now."""
    return [*(tmp_path / "state").rglob("*.json*"), *tmp_path.glob("scratch")]


def supervisor_of(tmp_path: Path, standins: Standins) -> psutil.Process:
    """The supervisor that the only lease names."""
    (lease,) = (tmp_path / "state").rglob("*.json")
    return standins.watch(json.loads(lease.read_text())["supervisor"]["pid"])


def said(owned: OwnedProcess) -> dict[str, object]:
    """The last event without what it says of the moment, which is checked here: a time, just now, and a count
    of the kernel's out-of-memory kills, whoever was killed.
    """
    assert owned.ended is not None
    event = dict(owned.ended)
    ended_s, kills = event.pop("ended_s"), event.pop("oom_kills")
    assert isinstance(ended_s, float)
    assert isinstance(kills, int)
    assert 0 <= time.time() - ended_s < LIMIT_S
    assert kills >= 0
    return event


def test_stop_ends_the_command_and_its_grandchild(own: Own, standins: Standins, tmp_path: Path) -> None:
    """After stop() nothing runs, lease and scratch folder are gone, and the ended event says how it went."""
    owned = own(TREE).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")
    assert owned.alive
    assert {process.pid for process in owned.tree()} == {child.pid, grandchild.pid}
    assert len(traces(tmp_path)) == 2, "a running process has one lease and one scratch folder"

    owned.stop()

    assert standins.gone(child, grandchild)
    assert not owned.alive
    assert owned.tree() == []
    assert traces(tmp_path) == []
    # The shell dies of SIGTERM and does not pass it on; the supervisor then asks sleep, within the grace.
    assert said(owned) == {"event": "done", "reason": "stop", "code": -signal.SIGTERM, "killed": []}


def test_a_command_that_ends_within_its_grace_is_not_killed(own: Own, standins: Standins) -> None:
    """A server that tidies up on SIGTERM gets to do so: its own exit code arrives and nothing was killed."""
    owned = own(POLITE, grace_s=10.0).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")

    owned.stop()

    assert standins.gone(child, grandchild)
    assert said(owned) == {"event": "done", "reason": "stop", "code": 7, "killed": []}


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace(own: Own, standins: Standins) -> None:
    """SIGKILL comes when the grace is over and not before."""
    owned = own(STUBBORN).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")

    began = time.monotonic()
    owned.stop()
    took = time.monotonic() - began

    assert standins.gone(child, grandchild)
    assert took >= GRACE_S, f"killed after {took:.2f} s, before the grace of {GRACE_S} s was over"
    assert owned.ended is not None
    assert owned.ended["code"] == -signal.SIGKILL
    assert owned.ended["killed"] == [child.pid, grandchild.pid]


def test_a_daemonised_grandchild_is_caught(own: Own, standins: Standins) -> None:
    """A double fork and a session of its own do not escape: the supervisor is the subreaper it falls to."""
    owned = own(python(DAEMONISING)).start()
    child, daemon = standins.told("child"), standins.told("daemon")
    assert os.getsid(daemon.pid) != os.getsid(child.pid), "the stand-in did not leave its session"

    owned.stop()

    assert standins.gone(child, daemon)


def test_a_bystander_with_the_same_command_line_survives(
    own: Own, standins: Standins, tmp_path: Path
) -> None:
    """Ownership goes by descent, never by name."""
    (tmp_path / "elsewhere").mkdir()
    bystander = standins.start(TREE, cwd=tmp_path / "elsewhere")
    owned = own(TREE).start()
    child = standins.told("child")
    assert bystander.cmdline() == child.cmdline()

    owned.stop()

    assert standins.gone(child)
    assert not standins.gone(bystander)


def test_a_second_stop_does_nothing(own: Own, standins: Standins) -> None:
    """stop() may be called again, by hand and then by the with statement; the first result stays."""
    owned = own(TREE).start()
    standins.told("grandchild")
    owned.stop()
    first = owned.ended
    owned.stop()
    assert owned.ended is first


def test_output_of_the_whole_tree_is_in_the_log(own: Own, standins: Standins, tmp_path: Path) -> None:
    """Both streams of the command and of what it starts are kept, in order."""
    owned = own(["sh", "-c", "echo one; sh -c 'echo two >&2'; echo three > told; exec sleep 300"]).start()
    standins.until((tmp_path / "told").exists, "the command has written everything")
    owned.stop()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_command_that_does_not_exist_is_refused_with_the_reason(own: Own, tmp_path: Path) -> None:
    """The message names the command and the system's reason; no process, lease or folder is left."""
    before = psutil.Process().children(recursive=True)
    with pytest.raises(
        StartError, match=r"standin: could not start /no/such/vllm: .*No such file or directory"
    ):
        own(["/no/such/vllm"]).start()
    assert psutil.Process().children(recursive=True) == before
    assert traces(tmp_path) == []


def test_a_binding_to_absent_cores_is_refused(own: Own, tmp_path: Path) -> None:
    """A lab file that names cores the machine lacks gives an answer, and leaves nothing behind."""
    absent = 1 + max(os.sched_getaffinity(0)) + (os.cpu_count() or 1)
    with pytest.raises(StartError) as caught:
        own(TREE, cpus=[absent]).start()
    assert "did not answer" not in str(caught.value)
    assert traces(tmp_path) == []


def test_a_command_whose_lease_cannot_be_written_does_not_stay(own: Own, state: Path, tmp_path: Path) -> None:
    """A full or vanished state folder gives an answer, not a tree that no later session can find."""
    owned = own(TREE)
    leftovers.folder().rmdir()
    with pytest.raises(StartError, match=r"standin: could not start sh: .*No such file or directory"):
        owned.start()
    working_here = [each.pid for each in psutil.process_iter(["cwd"]) if each.info["cwd"] == str(tmp_path)]
    assert working_here == []
    assert traces(tmp_path) == []


def test_when_the_command_dies_its_descendants_end_too(own: Own, standins: Standins, tmp_path: Path) -> None:
    """A server that crashes takes its workers along without anybody calling stop()."""
    owned = own(["sh", "-c", "sleep 300 & echo $! > grandchild; read line < fifo; exit 3"])
    os.mkfifo(tmp_path / "fifo")
    owned.start()
    grandchild = standins.told("grandchild")
    assert owned.alive

    (tmp_path / "fifo").write_text("crash\n")

    standins.until(lambda: not owned.alive, "the command has exited")
    standins.until(lambda: standins.gone(grandchild), "the grandchild has ended")
    standins.until(lambda: traces(tmp_path) == [], "lease and scratch are removed")
    owned.stop()
    assert said(owned) == {"event": "done", "reason": "command ended", "code": 3, "killed": []}


def test_when_the_owner_is_killed_everything_ends(
    state: Path, standins: Standins, tmp_path: Path, shared_file: Path
) -> None:
    """SIGKILL runs no handler in pytest; the end of the control pipe is what the supervisor sees.

    A killed server cannot remove its shared memory either, so the supervisor does it.
    """
    owner = standins.owner(python(MAPPING, str(shared_file)))
    child, grandchild = standins.told("child"), standins.told("grandchild")
    watcher = supervisor_of(tmp_path, standins)
    assert shared_file.exists()

    owner.kill()

    standins.until(lambda: standins.gone(owner, watcher, child, grandchild), "every process has ended")
    assert traces(tmp_path) == []
    assert not shared_file.exists(), "shared memory of the killed tree is left"


def test_shared_memory_that_a_bystander_maps_is_kept(
    own: Own, standins: Standins, tmp_path: Path, shared_file: Path
) -> None:
    """Two labs may share a segment; the one that ends does not pull it from under the other."""
    (tmp_path / "elsewhere").mkdir()
    bystander = standins.start(python(MAPPING, str(shared_file)), cwd=tmp_path / "elsewhere")
    standins.told("elsewhere/grandchild")
    standins.told("elsewhere/child")
    owned = own(python(MAPPING, str(shared_file))).start()
    standins.told("child")

    owned.stop()

    assert not standins.gone(bystander)
    assert shared_file.exists()


def test_ctrl_c_leaves_no_orphan(state: Path, standins: Standins, tmp_path: Path) -> None:
    """SIGINT to the whole process group of the owner, as a terminal sends it, ends everything in order."""
    owner = standins.owner(TREE)
    child, grandchild = standins.told("child"), standins.told("grandchild")
    watcher = supervisor_of(tmp_path, standins)

    os.killpg(owner.pid, signal.SIGINT)

    standins.until(lambda: standins.gone(owner), "the owner has ended")
    assert standins.gone(watcher, child, grandchild), "the owner ended before what it owned"
    assert traces(tmp_path) == []


def test_when_pytest_is_killed_everything_ends(
    state: Path, standins: Standins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing: a pytest session whose fixture owns a tree, and SIGKILL in the middle of a test."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    file = tmp_path / "test_generated.py"
    file.write_text(PYTEST_FILE.format(command=TREE))
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    session = standins.start([sys.executable, "-m", "pytest", *options, str(file)])
    child, grandchild = standins.told("child"), standins.told("grandchild")
    watcher = supervisor_of(tmp_path, standins)

    session.kill()

    standins.until(lambda: standins.gone(session, watcher, child, grandchild), "every process has ended")
    assert traces(tmp_path) == []


def test_stop_leaves_nothing_when_the_supervisor_was_killed(
    own: Own, standins: Standins, tmp_path: Path
) -> None:
    """stop() keeps its word even if the out-of-memory killer chose the supervisor."""
    owned = own(TREE).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")
    watcher = supervisor_of(tmp_path, standins)
    watcher.kill()
    standins.until(lambda: standins.gone(watcher, child), "the command follows its supervisor")

    owned.stop()

    assert standins.gone(grandchild)
    assert traces(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_supervisor_ends_the_tree(
    own: Own, standins: Standins, tmp_path: Path, number: signal.Signals
) -> None:
    """A machine that shuts down, or a lost terminal, ends the tree; the event names the signal.

    A SIGCHLD that arrives at the same moment, here while the supervisor is stopped, is not mistaken for it.
    """
    owned = own(TREE).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")
    watcher = supervisor_of(tmp_path, standins)

    for each in (signal.SIGSTOP, number, signal.SIGCHLD, signal.SIGCONT):
        watcher.send_signal(each)

    standins.until(lambda: standins.gone(watcher, child, grandchild), "every process has ended")
    owned.stop()
    assert owned.ended is not None
    assert owned.ended["reason"] == f"signal {number:d}"


def test_a_missed_heartbeat_ends_the_tree(standins: Standins, tmp_path: Path) -> None:
    """A remote supervisor cannot see its owner die behind a dead network; silence ends its tree."""
    heartbeat_s = 0.8
    spec = {
        "argv": TREE,
        "env": {"PATH": os.environ["PATH"]},
        "log": str(tmp_path / "log"),
        "lease": str(tmp_path / "lease"),
        "scratch": str(tmp_path / "scratch"),
        "run_id": "run",
        "cwd": str(tmp_path),
        "grace_s": GRACE_S,
        "heartbeat_s": heartbeat_s,
    }
    argv = [sys.executable, "-I", "-S", supervisor.__file__]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        child, grandchild = standins.told("child"), standins.told("grandchild")
        beaten_until = time.monotonic() + 1.5 * heartbeat_s
        while time.monotonic() < beaten_until:
            process.stdin.write(b"beat\n")
            time.sleep(heartbeat_s / 10)
        assert not standins.gone(child), "ended although the heart was beating"

        standins.until(lambda: process.poll() is not None, "the supervisor has ended")
        events = [json.loads(line) for line in process.stdout]

    assert [event["event"] for event in events] == ["started", "done"]
    assert events[-1]["reason"] == f"no heartbeat for {heartbeat_s:g} s"
    assert standins.gone(child, grandchild)


def test_a_process_name_that_is_no_text_does_not_stop_the_ending(
    own: Own, standins: Standins, tmp_path: Path
) -> None:
    """The kernel cuts a process name at 15 bytes, through the middle of a character if need be.

    Such a name anywhere on the machine must not break a supervisor, which reads /proc of every process.
    """
    standins.start(python(BADLY_NAMED))
    bystander = standins.told("bystander")
    assert b"\xc3" in Path(f"/proc/{bystander.pid}/stat").read_bytes()
    owned = own(TREE).start()
    child, grandchild = standins.told("child"), standins.told("grandchild")

    owned.stop()

    assert standins.gone(child, grandchild)
    assert traces(tmp_path) == []
    assert not standins.gone(bystander)


def test_the_tree_is_bound_to_its_cores(own: Own, standins: Standins) -> None:
    """The command and what it starts run on the cores asked for, though pytest may use more."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        pytest.skip("pytest itself has one core: a binding to it could not be told from none")
    own(TREE, cpus=cores[:1]).start()
    for process in (standins.told("child"), standins.told("grandchild")):
        assert os.sched_getaffinity(process.pid) == set(cores[:1])


def test_a_secret_of_the_environment_is_in_no_command_line(
    own: Own, standins: Standins, tmp_path: Path
) -> None:
    """The specification travels by pipe: any user may read an argument vector. The lease is clean too."""
    secret = f"hf_{uuid.uuid4().hex}"
    own(TREE, env={"PATH": os.environ["PATH"], "HF_TOKEN": secret}).start()
    child = standins.told("child")
    assert child.environ()["HF_TOKEN"] == secret, "the command did not get its environment"

    watcher = supervisor_of(tmp_path, standins)
    assert watcher.pid == child.ppid()
    assert watcher.cmdline()[1:] == ["-I", "-S", supervisor.__file__]
    shown = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any(secret in line for line in shown)
    assert not any(secret in path.read_text() for path in (tmp_path / "state").rglob("*.json"))


def test_semaphores_of_killed_python_processes_are_unlinked(own: Own, standins: Standins) -> None:
    """A named semaphore goes with its process: Python's resource tracker lives long enough to unlink it."""
    program = (
        "import multiprocessing, os, signal, sys, time\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        "Path('name').write_text(lock._semlock.name)\n"
        "Path('child').write_text(f'{os.getpid()}\\n')\n"
        "time.sleep(300)\n"
    )
    owned = own([sys.executable, "-c", program]).start()
    child = standins.told("child")
    name = Path("/dev/shm/sem." + (Path(owned.log).parent / "name").read_text().lstrip("/"))
    assert name.exists()

    owned.stop()

    assert standins.gone(child)
    assert not name.exists()

"""The hosts of a lab: opened, cleared, and cleared again, whatever happens to one of them.

Hosts are made, or a loopback SSH server's; servers are stand-ins. Oracle: psutil and the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from disagglab.agent import leftovers
from disagglab.agent.supervisor import Process, identify
from disagglab.config.labs import load_lab
from disagglab.config.schema import HostSection, Lab
from disagglab.errors import ConfigError, StartError
from disagglab.hosts import hosts, release
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.weights import Model
from disagglab.paths import ROOT

if TYPE_CHECKING:
    from selftest.conftest import SshServer, Standins

TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
TRY_LOCK = "from disagglab.agent.leftovers import exclusive\nwith exclusive(): pass"
CORE = min(os.sched_getaffinity(0))
MODEL = Model("M", Path("/models/m"), {"max_position_embeddings": 8192})
GIB = 2**30
LIMIT_S = 60
# where a made host keeps its state: sshd gives the account's home, whatever HOME is here
STATE_THERE = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local" / "state" / "disagglab"


@pytest.fixture
def calm(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder of the test's own; memory that others take meanwhile is no concern of these tests."""
    monkeypatch.setattr(hosts, "MEMORY_SLACK", 1.0)


def lock_is_free() -> bool:
    """Whether another session could start now."""
    argv = [sys.executable, "-c", TRY_LOCK]
    return subprocess.run(argv, capture_output=True, cwd=ROOT, timeout=LIMIT_S).returncode == 0


def write_lease(folder: Path, run_id: str, boot_id: str, child: Process) -> None:
    """A lease whose supervisor has been and gone."""
    with subprocess.Popen(["sleep", "300"]) as process:
        ended = identify(process.pid)
        process.kill()
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "run_id": run_id,
        "boot_id": boot_id,
        "owner": vars(ended),
        "supervisor": vars(ended),
        "child": vars(child),
        "scratch": str(folder / "no-scratch"),
        "argv": ["vllm", "serve", "m"],
    }
    (folder / f"{run_id}.standin.json").write_text(json.dumps(record))


def made_lab() -> Lab:
    """The lab two-hosts with names and control networks that nobody else uses."""
    lab = load_lab("two-hosts")
    names = {host.name: f"selftest-{os.getpid()}-{host.name}" for host in lab.hosts}
    nodes = []
    for number, node in enumerate(lab.nodes):
        network = 4 * os.getpid() % 16380 + 2 + number
        address = f"198.19.{network // 64}.{network % 64 * 4 + 2}"
        changes = {"host": names[node.host], "address": address, "cpus": [CORE]}
        nodes.append(node.model_copy(update=changes))
    made = [host.model_copy(update={"name": names[host.name], "cpus": [CORE]}) for host in lab.hosts]
    return lab.model_copy(update={"nodes": tuple(nodes), "hosts": tuple(made)})


def count(argv: list[str]) -> int:
    """How many of our descendants run this very command now."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += process.cmdline() == argv
    return found


@pytest.fixture
def made(calm: None, may_make_hosts: None) -> Iterator[Lab]:
    """A lab that makes its hosts; their state folders, in the account's own, are removed."""
    lab = made_lab()
    folders = [STATE_THERE / host.name for host in lab.hosts]
    yield lab
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_session_on_made_hosts(made: Lab, tmp_path: Path, standins: Standins) -> None:
    """Left-overs end first, a row each; a node's processes are on its host; nothing stays."""
    orphan = standins.start(["sleep", "300"])
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    write_lease(leftovers.folder(), "earlier-here", boot_id, identify(orphan.pid))
    there = STATE_THERE / made.hosts[1].name / "leases"
    write_lease(there, "earlier-there", "an earlier boot", identify(orphan.pid))
    before = set(psutil.Process().children(recursive=True))
    session = Hosts("selftest", made, tmp_path)
    try:
        session.open()
        assert session.reaped == [
            {"host": "local", "run_id": "earlier-here", "command": "vllm serve m", "pids": [orphan.pid]},
            {"host": made.hosts[1].name, "run_id": "earlier-there", "command": "vllm serve m", "pids": []},
        ]
        assert standins.gone(orphan)
        assert not list(there.iterdir())
        assert [host.name for host in session.all] == list(made.host_names)
        assert session.controller is session.local
        assert not lock_is_free()
        with pytest.raises(StartError, match=rf"another session \(pid {os.getpid()}\)"):
            Hosts("second", made, tmp_path).open()
        for node in made.nodes:
            host = session.of(node)
            assert host.about["hostname"] == host.name == node.host
            assert (host.suite_python, session.model_on(node, MODEL, "")) == (sys.executable, MODEL)
            assert session.python_of(node, "0.31.0") == release.python_of(made)
            argv = [host.suite_python, "-c", "import disagglab; print(disagglab.__file__)"]
            assert host.run(f"import-{node.name}", argv, {}, LIMIT_S) == [
                str(ROOT / "disagglab" / "__init__.py")
            ]
            host.start(f"standin-{node.name}", TREE, {})
        session.local.start("standin", TREE, {}, grace_s=0.3)
        standins.until(lambda: count(TREE) == 3, "a shell on each host, and one here")
        everything = set(psutil.Process().children(recursive=True)) - before
        links = {f"dl{each.pid}" for each in everything} & set(os.listdir("/sys/class/net"))
        assert len(links) == 2
    finally:
        session.close()
    standins.until(lambda: standins.gone(*everything), "everything has ended")
    assert lock_is_free()
    assert not list(leftovers.folder().iterdir())
    standins.until(lambda: not links & set(os.listdir("/sys/class/net")), "the links are gone")


@pytest.fixture
def two(calm: None, sshd: SshServer) -> Callable[..., Lab]:
    """A lab with one node here and one on the SSH server's host; ``changes`` are to its section."""

    def make(*others: HostSection, **changes: Any) -> Lab:
        lab = load_lab("embedded")
        here, there = lab.nodes
        nodes = (here, there.model_copy(update={"host": "there"}))
        return lab.model_copy(update={"nodes": nodes, "hosts": (sshd.section(**changes), *others)})

    return make


def test_a_host_that_is_lost_does_not_keep_the_others_from_being_cleared(
    two: Callable[..., Lab], tmp_path: Path, standins: Standins
) -> None:
    """close says what is not proved, after it has ended everything here and given the lock back."""
    lab = two()
    session = Hosts("selftest-lost", lab, tmp_path).open()
    session.of(lab.nodes[0]).start("standin", TREE, {}, grace_s=0.3)
    here = [standins.told(file) for file in ("child", "grandchild")]
    far = session.of(lab.nodes[1])
    assert isinstance(far, RemoteHost)
    far.start("standin", TREE, {}, grace_s=0.3)
    there = [standins.told(f"{far.about['logs']}/{file}") for file in ("child", "grandchild")]
    far.connection._client.close()
    with pytest.raises(StartError, match="the next session proves it"):
        session.close()
    assert standins.gone(*here)
    standins.until(lambda: standins.gone(*there), "the host has cleared itself")
    assert lock_is_free()
    session.close()


def test_a_session_through_a_jump_host(
    two: Callable[..., Lab], sshd: SshServer, tmp_path: Path, standins: Standins
) -> None:
    """The gate is connected to, runs nothing, and takes no part; close ends both connections."""
    gate = sshd.section().model_copy(update={"name": "gate"})
    lab = two(gate, jump="gate")
    before = len(sshd.sessions())
    session = Hosts("selftest-jump", lab, tmp_path).open()
    assert [host.name for host in session.all] == ["local", "there"]
    assert len(sshd.sessions()) == before + 2
    assert session.of(lab.nodes[1]).exists("/")
    session.close()
    standins.until(lambda: len(sshd.sessions()) == before, "both connections have ended")


def test_a_host_that_cannot_be_reached_leaves_nothing(two: Callable[..., Lab], tmp_path: Path) -> None:
    """open fails, and close afterwards has nothing to complain of."""
    session = Hosts("selftest", two(key_file=str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(StartError, match=r"not there: .*nowhere"):
        session.open()
    session.close()
    assert lock_is_free()
    assert not list(leftovers.folder().iterdir())


def test_cores_that_a_host_lacks_are_refused_before_anything_starts(calm: None, tmp_path: Path) -> None:
    """open names file, key, and what the host has; close afterwards has nothing to complain of."""
    lab = load_lab("embedded")
    nodes = tuple(node.model_copy(update={"cpus": [CORE, 4095]}) for node in lab.nodes)
    session = Hosts("selftest", lab.model_copy(update={"nodes": nodes}), tmp_path)
    with pytest.raises(ConfigError) as caught:
        session.open()
    session.close()
    assert [(one.file, one.key) for one in caught.value.problems] == [
        (lab.file, "node[0].cpus"),
        (lab.file, "node[1].cpus"),
    ]
    assert "core 4095, but this machine lets us use" in caught.value.problems[0].wrong
    assert lock_is_free()
    assert not list(leftovers.folder().iterdir())


def far_host(environments: dict[str, str]) -> Any:
    """A remote host that nobody connected to."""
    host = RemoteHost.__new__(RemoteHost)
    host.name = "there"
    host.section = HostSection(name="there", environments=environments)
    host.about = {"home": "/home/ada"}
    host.folder = "/home/ada/disagg-lab"
    host.suite_python = "/home/ada/disagg-lab/.venv/bin/python"
    return host


def hosts_with(host: Any) -> tuple[Hosts, Lab]:
    """A session whose second node is on ``host``."""
    lab = load_lab("embedded")
    lab = lab.model_copy(update={"nodes": (lab.nodes[0], lab.nodes[1].model_copy(update={"host": "there"}))})
    found = Hosts("selftest", lab, Path("/nowhere"))
    found._hosts = {"local": SimpleNamespace(name="local", suite_python=""), "there": host}  # type: ignore[dict-item]
    return found, lab


@pytest.mark.parametrize(
    ("named", "version", "python"),
    [
        ({}, "0.31.0", "/home/ada/disagg-lab/.venv/bin/python"),
        ({}, "0.30.0", "/home/ada/disagg-lab/.venvs/vllm-0.30.0/bin/python"),
        ({"0.30.0": "/opt/vllm"}, "0.30.0", "/opt/vllm/bin/python"),
        ({"0.30.0": "~/vllm"}, "0.30.0", "/home/ada/vllm/bin/python"),
        ({"0.30.0": "vllm"}, "0.30.0", "/home/ada/vllm/bin/python"),
        ({"0.30.0": "/usr/bin/python3.12"}, "0.30.0", "/usr/bin/python3.12"),
        ({"0.31.0": "/opt/vllm"}, "0.31.0", "/opt/vllm/bin/python"),
        ({"0.31.0": "/opt/vllm"}, "0.30.0", "/home/ada/disagg-lab/.venvs/vllm-0.30.0/bin/python"),
    ],
)
def test_the_python_of_a_remote_host(
    monkeypatch: pytest.MonkeyPatch, named: dict[str, str], version: str, python: str
) -> None:
    """What its section names; the suite's own there, if it has this release; else one a release."""
    monkeypatch.setattr(release, "installed", lambda: "0.31.0")
    found, lab = hosts_with(far_host(named))
    assert found.python_of(lab.nodes[1], version) == python
    assert found.python_of(lab.nodes[0], "0.31.0") == release.python_of(lab), (
        "this machine's is release.py's choice"
    )


@pytest.mark.parametrize(
    ("named", "python"),
    [({}, "/home/ada/disagg-lab/.venv/bin/python"), ({"0.31.0": "/opt/vllm"}, "/opt/vllm/bin/python")],
)
def test_a_model_is_looked_for_where_it_is_served(named: dict[str, str], python: str) -> None:
    """The host is asked once, by the suite there or a named environment; only folders are the host's."""
    asked: list[list[str]] = []
    answer = {"folder": "/there/m", "other_tokenizer": "/there/words"}

    def run(name: str, argv: list[str], env: dict[str, str], limit_s: float) -> list[str]:
        asked.append(argv)
        assert env == {"HF_HUB_OFFLINE": "1"}
        return ["a word of a library", json.dumps(answer)]

    host = far_host(named)
    host.run = run
    found, lab = hosts_with(host)
    model = found.model_on(lab.nodes[1], MODEL, "/opt/vllm/bin/python")
    assert (model.name, model.folder, model.tokenizer) == ("M", Path("/there/m"), Path("/there/words"))
    assert model.config == MODEL.config
    assert found.model_on(lab.nodes[1], MODEL, "/opt/vllm/bin/python") == model
    assert found.model_on(lab.nodes[0], MODEL, "/opt/vllm/bin/python") == MODEL
    assert found.on_controller(MODEL) == MODEL
    assert asked == [[python, "-m", "disagglab.hosts.weights", lab.model.model_dump_json(), lab.file]]


@pytest.mark.parametrize(
    ("code", "says", "message"),
    [
        (0, "0.31.0+cu130\n", None),
        (0, "0.30.0\n", r"b: /home/ada/\S+ on there holds vLLM 0\.30\.0, not 0\.31\.0"),
        (
            127,
            "not found",
            r"holds no vLLM, not 0\.31\.0; make it: python -m disagglab provision --lab ",
        ),
    ],
)
def test_an_environment_there_has_to_hold_the_labs_release(
    monkeypatch: pytest.MonkeyPatch, code: int, says: str, message: str | None
) -> None:
    """Each node's Python is asked on its host; the build's suffix does not count; the mend is a command."""
    monkeypatch.setattr(release, "installed", lambda: "0.31.0")
    asked: list[str] = []

    def run(command: str, python: str, program: str) -> SimpleNamespace:
        asked.append(python)
        return SimpleNamespace(rc=code, stdout=says)

    found, _ = hosts_with(far_host({}))
    found._hosts["there"].facts = SimpleNamespace(run=run)
    here: Any = found._hosts["local"]
    here.facts = SimpleNamespace(run=lambda *_: SimpleNamespace(rc=0, stdout="0.31.0\n"))
    if message is None:
        found.require_environments()
    else:
        with pytest.raises(StartError, match=message):
            found.require_environments()
    assert asked == ["/home/ada/disagg-lab/.venv/bin/python"]


@pytest.mark.parametrize(
    ("before", "then", "back"),
    [
        (20, [5, 5, 18.1], True),
        (20, [17.9], False),
        (4, [3.1], True),
        (4, [2.9], False),
    ],
)
def test_memory_has_to_come_back(
    monkeypatch: pytest.MonkeyPatch, before: float, then: list[float], back: bool
) -> None:
    """A tenth, and at least a GiB, may be missing; the kernel gets time; the message has both figures."""
    monkeypatch.setattr(hosts, "MEMORY_DEADLINE_S", 0.3)
    monkeypatch.setattr(hosts, "POLL_S", 0.01)
    left = [round(gib * GIB) for gib in then]
    host: Any = SimpleNamespace(
        name="there",
        about={"memory_available": before * GIB},
        memory_available=lambda: left.pop(0) if len(left) > 1 else left[0],
    )
    if back:
        hosts.require_memory_back(host)
        return
    with pytest.raises(
        StartError, match=rf"there: {then[-1]} GiB available after the session, {before}\.0 before"
    ):
        hosts.require_memory_back(host)

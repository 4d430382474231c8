"""However a session ends, nothing of it is left on its hosts; and what broke it is told once.

Whole sessions of this suite, on real servers over SSH, are ended the hard way at different moments of their
life. The oracle is the machine that carries the hosts: it sees every process of each from outside, so nothing
that the suite believes of itself is asked.
"""

from __future__ import annotations

import itertools
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from disagglab import waiting
from disagglab.config.labs import resolved_text
from disagglab.config.schema import HostSection, Lab
from disagglab.hosts import namespaces
from disagglab.hosts.host import Host, local_host
from disagglab.paths import ROOT
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder

HEARTBEAT_S = 6.0
GONE_DEADLINE_S = HEARTBEAT_S + 45.0  # silence, SIGTERM, 15 s of grace, SIGKILL
STAGE_DEADLINE_S = 240.0
RUNNER_DEADLINE_S = 120.0
TOLD_LINES = 25  # of a terminal, for all that a session that broke has to say at its end
POLL_S = 0.1
# The moment of the end: what the session says on its terminal then.
STAGES = ("servers: ", "load weights", "servers: ", "KV cache", "ready after")
# where a made host keeps its state: sshd gives the account's home, whatever HOME is here
STATE_THERE = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local" / "state" / "disagglab"
SESSION = ("-m", "pytest", "tests/disagg/test_path.py", "-q", "-p", "no:cacheprovider")


@dataclass
class Stage:
    """Two made hosts that outlive the sessions on them, and the lab file by which those reach them."""

    local: Host
    holders: list[str]
    hosts: dict[str, HostSection]
    lab_file: Path
    folder: Path
    took_s: dict[str, list[float]] = field(default_factory=dict)

    def pids(self) -> dict[str, list[int]]:
        """Processes of each host as this machine sees them, but for its SSH server's own.

        The SSH server keeps a process for a connection that died silently until TCP gives up; it is the
        host's, and runs nothing.
        """
        found = {}
        for name in self.holders:
            _, server, *others = self.local.call("tree", name)
            program = executable(server)
            found[name] = [pid for pid in others if executable(pid) not in (program, "")]
        return found

    def end_of_link(self, number: int) -> str:
        """This machine's end of a host's control link."""
        pid = self.local.call("tree", self.holders[number])[0]
        return f"dl{pid}"

    def set_links(self, state: str) -> None:
        """Pull the plug of every control link, or put it back."""
        for number in range(len(self.holders)):
            subprocess.run(["ip", "link", "set", self.end_of_link(number), state], check=True)


def executable(pid: int) -> str:
    """The program that a process runs; empty for one that is gone."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def stage(lab: Lab, live: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The hosts of the lab, made once; with --endings N."""
    made = [host for host in lab.hosts if host.namespace]
    if not live.endings:
        pytest.skip("ENDINGS: asked for with --endings N, on the lab two-hosts")
    if not made or os.geteuid() != 0:
        pytest.skip("NOT-ROOT: needs made hosts, so root and --lab two-hosts")
    folder = tmp_path_factory.mktemp("endings")
    local = local_host(f"{live.run_id}-endings", (lab.ports.first, lab.ports.last), folder, sys.executable)
    try:
        found, holders = namespaces.make(
            local, made, {host.name: lab.nodes_on(host.name)[0] for host in made}
        )
        path = folder / "lab.toml"
        path.write_text(remote_lab(resolved_text(lab), found))
        yield Stage(local, holders, found, path, folder)
    finally:
        local.close()


def remote_lab(text: str, hosts: dict[str, HostSection]) -> str:
    """The lab file with its hosts as any remote ones, that nobody made for the session."""
    for name, host in hosts.items():
        rows = [f'name = "{name}"', f'address = "{host.address}"', f'user = "{host.user}"']
        rows += [f'key_file = "{host.key_file}"', f'known_hosts = "{host.known_hosts}"']
        rows += [f'python = "{sys.executable}"', f'folder = "{ROOT}"', f"heartbeat_s = {HEARTBEAT_S}"]
        text, count = re.subn(
            rf'(?m)^name = "{name}"\nnamespace = true\ncpus = .*$', "\n".join(rows).replace("\\", r"\\"), text
        )
        assert count == 1, f"no made host {name} in the lab file"
    return text


def kill(stage: Stage, runner: subprocess.Popen[bytes]) -> None:
    """SIGKILL of pytest."""
    runner.kill()


def interrupt(stage: Stage, runner: subprocess.Popen[bytes]) -> None:
    """Ctrl-C."""
    runner.send_signal(signal.SIGINT)


def cut(stage: Stage, runner: subprocess.Popen[bytes]) -> None:
    """The links go down under a session that lives on; nobody tells the hosts."""
    stage.set_links("down")


def reboot(stage: Stage, runner: subprocess.Popen[bytes]) -> None:
    """The runner vanishes with all its connections, and not one packet says so."""
    stage.set_links("down")
    runner.kill()


WAYS: dict[str, Callable[[Stage, subprocess.Popen[bytes]], None]] = {
    "SIGKILL": kill,
    "Ctrl-C": interrupt,
    "dropped connection": cut,
    "reboot of the runner": reboot,
}


def until(condition: Callable[[], bool], deadline_s: float, what: Callable[[], str]) -> float:
    """Wait for a condition; return the seconds that it took."""
    start = time.monotonic()
    waiting.until(
        condition, deadline_s, lambda: AssertionError(f"not within {deadline_s:g} s: {what()}"), POLL_S
    )
    return time.monotonic() - start


def has_come_to(log: Path, moment: str) -> bool:
    """Whether a session's log tells of a moment."""
    return moment in log.read_text()


def last_words(log: Path, moment: str) -> str:
    """The moment that was waited for, and how the log ends without it."""
    return f"{moment} in {log}: {log.read_text()[-500:]}"


def session_on(stage: Stage, log: Path) -> subprocess.Popen[bytes]:
    """A whole session of this suite on the stage's hosts, its output in ``log``."""
    environment = {**os.environ, "DISAGGLAB_STATE": str(stage.folder / "state")}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *SESSION, f"--lab={stage.lab_file}", f"--html={log}.html"],
            cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_on_the_hosts(stage: Stage, live: Session, record: Recorder, way: str) -> None:
    """A session ended the hard way leaves no process, no shared memory and no lease on either host.

    The servers are ended by a supervisor on their own host, which listens for a sign of life from the
    session. It needs no word from anybody: silence is enough.
    """
    took = []
    for number, moment in zip(range(live.endings), itertools.cycle(STAGES), strict=False):
        log = stage.folder / f"{way.replace(' ', '-')}-{number}.log"
        runner = session_on(stage, log)
        try:
            until(partial(has_come_to, log, moment), STAGE_DEADLINE_S, partial(last_words, log, moment))
            before = stage.pids()
            assert all(before.values()), f"nothing ran on the hosts: {before}; this would prove nothing"
            WAYS[way](stage, runner)
            took.append(until(lambda: not any(stage.pids().values()), GONE_DEADLINE_S,
                              lambda: f"processes on the hosts: {stage.pids()}"))  # fmt: skip
        finally:
            stage.set_links("up")
            runner.send_signal(signal.SIGINT if runner.poll() is None else 0)
            runner.wait(RUNNER_DEADLINE_S)
        for name, host in zip(stage.holders, stage.hosts.values(), strict=True):
            pid = stage.local.call("tree", name)[1]
            left = [*Path(f"/proc/{pid}/root/dev/shm").iterdir()]
            assert not left, f"{host.name}: shared memory is left: {left}"
            leases = [*(STATE_THERE / host.name / "leases").iterdir()]
            assert not leases, f"{host.name}: leases are left: {leases}"
    record.numbers(
        f"time until both hosts are clear, {way}", took, "s", what="endings",
        note=f"moments: {', '.join(repr(STAGES[i % len(STAGES)]) for i in range(live.endings))}",
    )  # fmt: skip


def test_a_server_that_dies_is_told_once(stage: Stage) -> None:
    """An engine is killed under a session: one root cause with process and signal, a line for each test.

    The engine is a child of the server's API process, on another host: its signal is seen there by the plugin
    inside of vLLM, its server's end by the supervisor, and both reach the end of the terminal here.
    """
    log = stage.folder / "root-cause.log"
    runner = session_on(stage, log)
    try:
        moment = STAGES[-1]
        until(partial(has_come_to, log, moment), STAGE_DEADLINE_S, partial(last_words, log, moment))
        decode = stage.pids()[stage.holders[-1]]
        (engine,) = [pid for pid in decode if title(pid).startswith("VLLM::EngineCore")]
        os.kill(engine, signal.SIGKILL)
        runner.wait(RUNNER_DEADLINE_S)
    finally:
        runner.send_signal(signal.SIGINT if runner.poll() is None else 0)
        runner.wait(RUNNER_DEADLINE_S)
    text = log.read_text()
    assert runner.returncode == pytest.ExitCode.TESTS_FAILED, text
    assert "Traceback" not in text, text
    _, _, end = text.partition(" root cause ")
    assert "was ended by SIGKILL" in end, text
    assert "because of it " in end, text
    assert len(end.splitlines()) < TOLD_LINES, end


def title(pid: int) -> str:
    """What a process calls itself."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

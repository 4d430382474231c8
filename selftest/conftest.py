"""Fixtures that several selftests share: a state folder, stand-in processes, an SSH server."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from disagglab.config.schema import HostSection
from disagglab.errors import StartError
from disagglab.hosts import namespaces
from disagglab.hosts.host import HostProcess
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Connection, target

DEADLINE_S = 20.0  # for conditions that hold within a second; only a failing test waits this long
POLL_S = 0.02
TREE = ("sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait")
REMOTE_PORTS = (20500, 20599)  # of no lab

# Plays a pytest session that owns one process. Arguments: the folder it works in, then the command it owns.
OWNER = """
import os, signal, sys, time
from pathlib import Path
from disagglab.agent.process import OwnedProcess

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background ignores it

folder = Path(sys.argv[1])
log, scratch = folder / "log", folder / "scratch"
with OwnedProcess("standin", sys.argv[2:], os.environ, log, scratch, "run", grace_s=0.3):
    (folder / "owning").touch()
    time.sleep(300)
"""


class NotedProcess(HostProcess):
    """A process of no host: it lives or not, and notes how it was ended."""

    def __init__(self, log: Path, lives: bool) -> None:
        host: Any = SimpleNamespace(logs=log.parent)
        super().__init__(host, log.stem, (), {"pid": 1, "start_ticks": 1, "scratch": ""})
        self.lives = lives
        self.was_ended: list[str] = []

    @property
    def alive(self) -> bool:
        return self.lives

    def kill(self) -> None:
        self.was_ended.append("kill")

    def ask_to_stop(self) -> None:
        self.was_ended.append("ask")

    def stop(self) -> None:
        self.was_ended.append("stop")


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


SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
# OpenSSH run by root wants a folder for its unprivileged part; this one is seen by it alone.
WITH_RUN_FOLDER = (
    *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c"),
    'mount -t tmpfs -o mode=755 tmpfs /run && mkdir -m 755 /run/sshd && exec "$@"',
    "sh",
)


class SshServer:
    """A real OpenSSH server on the loopback interface, with keys, home and state folder of its own.

    Args:
        folder: for its files; an empty one.
        kind: of its host key: ed25519, ecdsa, rsa.
    """

    address = "127.0.0.1"

    def __init__(self, folder: Path, kind: str = "ed25519") -> None:
        self.home, self.state = folder / "home", folder / "state"
        self.home.mkdir()
        self.host_key = self._key(folder / "host_key", kind)
        self.client_key = self._key(folder / "client_key")
        self.log = folder / "sshd.log"
        self._held = socket.socket()  # keeps the port ours, as disagglab/agent/port.py does
        self._held.bind((self.address, 0))
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = self._held.getsockname()[1]
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(f"{self.name} {self.public(self.host_key)}\n")
        config = folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress {self.address}\nHostKey {self.host_key}\n"
            f"AuthorizedKeysFile {self.client_key}.pub\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n"
            "UseDNS no\nPidFile none\nMaxSessions 100\n"
            f"SetEnv HOME={self.home} DISAGGLAB_STATE={self.state}\n"
        )
        argv = [str(shutil.which("sshd", path=SEARCH_PATH)), "-D", "-e", "-f", str(config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*WITH_RUN_FOLDER, *argv] if os.geteuid() == 0 else argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"PATH": SEARCH_PATH},
            )

    @staticmethod
    def _key(path: Path, kind: str = "ed25519") -> Path:
        bits = ["-b", "2048"] if kind == "rsa" else []  # more take a second to find
        argv = ["ssh-keygen", "-q", "-t", kind, *bits, "-N", "", "-C", "", "-f", str(path)]
        subprocess.run(argv, check=True)
        return path

    @staticmethod
    def public(key: Path) -> str:
        """The public half of a key: kind and base64."""
        return Path(f"{key}.pub").read_text().strip()

    @property
    def name(self) -> str:
        """What known_hosts calls it."""
        return f"[{self.address}]:{self.port}"

    def answers(self) -> bool:
        """Whether it takes connections, by its own greeting."""
        try:
            with socket.create_connection((self.address, self.port), timeout=1.0) as probe:
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def section(self, **changes: Any) -> HostSection:
        """How a lab file would call it; ``changes`` are not checked."""
        given = {
            "address": self.address,
            "port": self.port,
            "user": getpass.getuser(),
            "key_file": str(self.client_key),
            "known_hosts": str(self.known_hosts),
            "python": sys.executable,
        }
        return HostSection(name="there").model_copy(update={**given, **changes})

    def sessions(self) -> list[psutil.Process]:
        """Its processes that serve a connection each."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def close(self) -> None:
        """End it and every connection to it."""
        for session in self.sessions():  # each is in a session of its own, and one may be suspended
            with contextlib.suppress(psutil.NoSuchProcess):
                session.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._held.close()


@contextlib.contextmanager
def running_sshd(folder: Path, kind: str = "ed25519") -> Iterator[SshServer]:
    """An SSH server that answers; where there can be none, the test is skipped."""
    if shutil.which("sshd", path=SEARCH_PATH) is None:
        pytest.skip("NO-SSHD: apt-get install openssh-server")
    server = SshServer(folder, kind)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not server.answers():
            if server.process.poll() is not None:
                pytest.skip(f"SSHD-ENDED: {server.log.read_text().strip()[-200:]}")
            assert time.monotonic() < deadline, "the SSH server does not answer"
            time.sleep(POLL_S)
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """One SSH server for all tests; none of them changes or ends it."""
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def another_sshd(tmp_path: Path) -> Iterator[Callable[[str], SshServer]]:
    """Starts further SSH servers, which the test may change; argument: the kind of host key."""
    with contextlib.ExitStack() as stack:

        def start(kind: str = "ed25519") -> SshServer:
            folder = tmp_path / f"sshd-{uuid.uuid4().hex[:6]}"
            folder.mkdir()
            return stack.enter_context(running_sshd(folder, kind))

        yield start


class Remote:
    """The remote hosts of one test. ``sessions``: the server's processes for their connections."""

    def __init__(self, sshd: SshServer, logs: Path, standins: Standins) -> None:
        self._sshd, self._logs, self._standins = sshd, logs, standins
        self._made: list[RemoteHost] = []
        self._deputies: list[psutil.Process] = []

    def __call__(self, **changes: Any) -> RemoteHost:
        """A connected host; ``changes`` to its section."""
        section = self._sshd.section(**{"heartbeat_s": 30.0, **changes})
        connection = Connection(target(section))
        try:
            host = RemoteHost(section, connection, f"run-{uuid.uuid4().hex[:6]}", REMOTE_PORTS, self._logs)
        except BaseException:
            connection.close()
            raise
        self._made.append(host)
        self._deputies.append(self._standins.watch(host.about["pid"]))
        return host

    def tree(self, host: RemoteHost, argv: Sequence[str] = TREE) -> list[psutil.Process]:
        """Start a stand-in there; its processes."""
        host.start("standin", argv, {}, grace_s=0.3)
        files = ("child", "grandchild") if argv == TREE else ("child",)
        return [self._standins.told(f"{host.about['logs']}/{file}") for file in files]

    def session(self, host: RemoteHost) -> psutil.Process:
        """The server's process for a host's connection, an ancestor of its deputy."""
        deputy = psutil.Process(host.about["pid"])
        (found,) = set(deputy.parents()) & set(self._sshd.sessions())
        return found

    def close(self) -> None:
        """End all of them; wait until the host is free for the next test."""
        for host in self._made:
            host.disconnect()
        self._standins.until(lambda: self._standins.gone(*self._deputies), "the deputies have ended")


@pytest.fixture
def remote_host(sshd: SshServer, tmp_path: Path, standins: Standins) -> Iterator[Remote]:
    """Makes remote hosts whose logs come into ``tmp_path``."""
    made = Remote(sshd, tmp_path, standins)
    yield made
    made.close()


@pytest.fixture(scope="session")
def may_make_hosts() -> None:
    """Skips where this user may not make hosts."""
    try:
        namespaces.require_programs()
    except StartError as error:
        pytest.skip(f"NO-MADE-HOSTS: {error}")
    argv = [*namespaces.UNSHARE, "true"]
    if (tried := subprocess.run(argv, capture_output=True, text=True)).returncode != 0:
        pytest.skip(f"NO-MADE-HOSTS: {tried.stderr.strip()}")


@pytest.fixture
def noted_process() -> Callable[[Path, bool], NotedProcess]:
    """Makes processes of no host: a log, and whether it lives."""
    return NotedProcess

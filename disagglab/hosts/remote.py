"""A remote host: its deputy runs at the far end of an SSH channel and ends everything when the channel does.

The deputy's few source files travel with the call, so a host needs nothing but Python; the environment that
serves is another matter (disagglab/hosts/provision/provision.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import shlex
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import paramiko

from disagglab import errors
from disagglab.config.schema import HostSection
from disagglab.errors import LabError, StartError
from disagglab.hosts.host import Host
from disagglab.hosts.ssh import LOST, Connection
from disagglab.paths import ROOT

SHIPPED = (
    "__init__.py",
    "address.py",
    "errors.py",
    "waiting.py",
    "agent/*.py",
)  # of the package: what a host needs to own processes
MAIN = "import sys\nfrom disagglab.agent.deputy import main\nsys.exit(main())\n"
SEARCH_PATH = 'PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"; export PATH'
CALL_LIMIT_S = 120.0  # ending a process takes 45 s at most (disagglab/agent/process.py)
HELLO_LIMIT_S = 60.0
FOLLOW_S = 1.0  # how often logs are fetched; each time is a sign of life, too
FACT_LIMIT_S = 120.0
# Puts the archive on standard input into a folder named after its content, once, and tells where it is.
INSTALL = """\
set -e
d="${{DISAGGLAB_STATE:-${{XDG_STATE_HOME:-$HOME/.local/state}}/disagglab}}/deputy"
f="$d/{digest}"
mkdir -p "$d"
t=$(mktemp -d "$d/.new-XXXXXX")
trap 'rm -rf "$t"' EXIT
tar -x -f - -C "$t"
[ -d "$f" ] || mv -T "$t" "$f" 2>/dev/null || [ -d "$f" ]
echo "$f"
"""


@functools.cache
def bundle() -> tuple[str, bytes]:
    """The deputy's source files as a tar archive, and a digest of it; the same bytes every time."""
    found = sorted(path for pattern in SHIPPED for path in (ROOT / "disagglab").glob(pattern))
    files = {str(path.relative_to(ROOT)): path.read_bytes() for path in found}
    files["__main__.py"] = MAIN.encode()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return hashlib.sha256(stream.getvalue()).hexdigest()[:16], stream.getvalue()


class Line:
    """The channel to a deputy: calls, one after another, each answered by the object with its number."""

    def __init__(self, connection: Connection, python: str) -> None:
        self._connection = connection
        digest, archive = bundle()
        placed = connection.run(INSTALL.format(digest=digest), archive)
        if placed.code:
            said = placed.err.decode(errors="replace").strip()
            raise StartError(f"{connection.where}: cannot put the suite's own part there: {said}")
        *greeting, folder = placed.out.decode(errors="replace").strip().splitlines()
        if greeting:
            raise StartError(
                f"{connection.where}: the account's shell prints {greeting[0]!r} whenever it starts, which"
                " looks like an answer; do so in interactive shells only (~/.bashrc: [ -t 1 ] || return)"
            )
        self.command = f"{SEARCH_PATH}; exec {shlex.quote(python)} -E -s -S {shlex.quote(folder)}"
        self._channel: paramiko.Channel = connection.open(self.command)
        self._numbers = itertools.count()
        self._buffer = b""
        self._lock = threading.Lock()
        self.lost = ""

    def ask(self, limit_s: float, **asked: Any) -> Any:
        """Send an object with a number; return the result of the answer that bears it.

        Raises:
            LabError: what the deputy raised.
            StartError: if the connection is lost or nothing answers within ``limit_s``.
        """
        with self._lock:
            if self.lost:
                raise StartError(self.lost)
            number = next(self._numbers)
            try:
                self._channel.settimeout(limit_s)
                self._channel.sendall(json.dumps({"id": number, **asked}).encode() + b"\n")
                while (answer := self._receive(limit_s)).get("id") != number:
                    pass  # of a call that was interrupted
            except LOST as error:
                self.lost = f"{self._connection.where}: {self._why(error)}"
                raise StartError(self.lost) from error
        if "error" in answer:
            kind = getattr(errors, answer["kind"], StartError)
            fits = kind if isinstance(kind, type) and issubclass(kind, LabError) else StartError
            if fits is errors.ConfigError:
                fits = StartError
            raise fits(f"{self._connection.where.name}: {answer['error']}")
        return answer["result"]

    def _receive(self, limit_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            self._channel.settimeout(max(0.01, deadline - time.monotonic()))
            data = self._channel.recv(65536)
            if not data:
                raise EOFError("the deputy ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why(self, error: BaseException) -> str:
        said = b""
        with contextlib.suppress(*LOST):
            while self._channel.recv_stderr_ready():
                said += self._channel.recv_stderr(65536)
        last = said.decode(errors="replace").strip().splitlines()[-3:]
        detail = f"; it said: {' | '.join(last)}" if last else ""
        return f"the connection is lost ({type(error).__name__}: {error}){detail}"

    def close(self) -> None:
        """Close the channel: the deputy ends, and everything it started."""
        with contextlib.suppress(*LOST):  # it is going already
            self._channel.close()


class RemoteHost(Host):
    """A host over SSH. ``section``: what the lab file says of it.

    Raises:
        StartError: if the deputy does not answer there, or another session runs a lab on the host.
    """

    is_local = False

    def __init__(
        self,
        section: HostSection,
        connection: Connection,
        run_id: str,
        ports: tuple[int, int],
        logs: Path,
    ) -> None:
        self.section = section
        self.connection = connection
        self._logs_lock = threading.Lock()
        self._offsets: dict[str, int] = {}
        self._ended = threading.Event()
        self.line = Line(connection, section.python)
        first = {"run_id": run_id, "ports": ports, "heartbeat_s": section.heartbeat_s, "exclusive": True}
        about = self._greet(first)
        super().__init__(
            section.name,
            lambda method, *args: (
                about if method == "about" else self.line.ask(CALL_LIMIT_S, method=method, args=args)
            ),
            logs,
            "",
        )
        self.folder = str(PurePosixPath(self.about["home"]) / section.folder)
        self.suite_python = f"{self.folder}/.venv/bin/python"
        self._follower = threading.Thread(target=self._follow_all, name=f"follow-{section.name}", daemon=True)
        self._follower.start()

    def _greet(self, first: dict[str, Any]) -> dict[str, Any]:
        try:
            about: dict[str, Any] = self.line.ask(HELLO_LIMIT_S, **first)
        except StartError as error:
            raise StartError(f"{error}\n    what was run there: {self.line.command}") from error
        return about

    @functools.cached_property
    def facts(self) -> Any:
        """A testinfra host whose commands go over this very connection."""
        from testinfra.host import Host as Facts

        return Facts(_backend(self))

    def remember(self, name: str) -> None:
        """Fetch the log of a process from now on."""
        with self._logs_lock:
            (self.logs / f"{name}.log").touch()
            self._offsets.setdefault(name, 0)

    def follow(self, name: str) -> None:
        """Fetch what the log of a process holds and we have not."""
        while self._fetch([name]):
            pass

    def _fetch(self, names: Sequence[str]) -> int:
        """Fetch a piece of each log; return the bytes that came."""
        with self._logs_lock:
            wanted = {name: self._offsets[name] for name in names if name in self._offsets}
            pieces = self.line.ask(CALL_LIMIT_S, method="follow", args=[wanted])
            for name, text in pieces.items():
                if text:
                    with (self.logs / f"{name}.log").open("ab") as log:
                        log.write(text.encode("latin-1"))
                    self._offsets[name] += len(text)
            return sum(map(len, pieces.values()))

    def _follow_all(self) -> None:
        while not self._ended.wait(FOLLOW_S):
            try:
                self._fetch(list(self._offsets))
            except LabError:  # the next call of the session raises it where it can be read
                return

    def close(self) -> None:
        """End every process of this run on this host; prove that nothing is left; see :meth:`disconnect`.

        Raises:
            StartError: naming what is left; or that the connection was lost, so that nothing is proved.
        """
        try:
            self.line.ask(CALL_LIMIT_S, method="close", args=[])
            while self._fetch(list(self._offsets)):
                pass
        except StartError as error:
            if self.line.lost:
                raise StartError(
                    f"{error}\n    after {self.section.heartbeat_s:g} s of silence the host ends everything"
                    " of this run by itself; the next session proves it"
                ) from error
            raise

    def disconnect(self) -> None:
        """Close the channel; the deputy ends, and whatever should still be there with it."""
        self._ended.set()
        self.line.close()
        self.connection.close()


def _backend(host: RemoteHost) -> Any:
    from testinfra.backend.base import BaseBackend, CommandResult

    class Backend(BaseBackend):  # type: ignore[misc]
        """testinfra's view of a remote host. Its own backend accepts unknown host keys; this one does not."""

        NAME = "disagglab"

        def run(self, command: str, *args: str, **_: Any) -> CommandResult:
            text = self.get_command(command, *args)
            answer = host.connection.run(f"{SEARCH_PATH}; {text}", limit_s=FACT_LIMIT_S)
            return self.result(answer.code, text.encode(), answer.out, answer.err)

    return Backend(host.name)

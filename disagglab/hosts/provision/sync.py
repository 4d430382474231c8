"""Files carried to a host over SSH: compared by SHA-256, sent if they differ, each replaced as a whole.

A folder that was filled so holds a manifest of what was put there. A file that the manifest names and the
next parcel does not is removed; what is not in the manifest is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import paramiko

from disagglab.errors import StartError
from disagglab.hosts.ssh import LOST, Connection

MANIFEST = ".disagglab-files.json"
COMPARE_LIMIT_S = 600.0  # some GB of wheels are read
SILENCE_S = 120.0  # a receiver that takes nothing for so long is gone, or its disk is
CHUNK = 2**20
STEPS = 20  # in which progress is told: a log gets a line each
# What is sent of a folder that git tracks: the tracked files, and of these folders also what is not ignored,
# because the suite here runs it, too.
WITH_UNTRACKED = ("disagglab", "requirements", "labs", "workloads", "tests")
# What is sent of a folder without git.
WITHOUT_GIT = (
    *("disagglab", "requirements", "labs", "workloads", "tests", "selftest"),
    *("conftest.py", "pyproject.toml", "pytest.ini", "Makefile", "README.md", "LICENSE"),
)

# Arguments: the folder, the manifest's name. Standard input: {path: SHA-256}. Changes nothing.
COMPARE = r"""
import hashlib, json, os, sys
root, name = sys.argv[1:]
asked = json.load(sys.stdin)

def digest(path):
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                found.update(piece)
    except OSError:
        return None
    return found.hexdigest()

try:
    with open(os.path.join(root, name)) as file:
        put = json.load(file)
except (OSError, ValueError):
    put = None
print(json.dumps({
    "entries": sorted(os.listdir(root)) if os.path.isdir(root) else None,
    "put": None if put is None else sorted(put),
    "differ": [path for path in asked if digest(os.path.join(root, path)) != asked[path]],
}))
"""

# Arguments: the folder, the manifest's name. Standard input: a tar archive whose last member is the manifest.
# A file arrives beside its place and is moved there when all have come; the manifest is moved last.
RECEIVE = r"""
import hashlib, json, os, shutil, sys, tarfile, tempfile
root, name = sys.argv[1:]
os.makedirs(root, exist_ok=True)
for left in os.listdir(root):
    if left.startswith(".incoming-"):
        shutil.rmtree(os.path.join(root, left))
work = tempfile.mkdtemp(prefix=".incoming-", dir=root)
try:
    came = {}
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for entry in archive:
            path, found = os.path.join(work, entry.name), hashlib.sha256()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            source = archive.extractfile(entry)
            with open(path, "wb") as file:
                for piece in iter(lambda: source.read(1 << 20), b""):
                    found.update(piece)
                    file.write(piece)
            os.chmod(path, entry.mode)
            came[entry.name] = found.hexdigest()
    with open(os.path.join(work, name)) as file:
        wanted = json.load(file)
    del came[name]
    wrong = [path for path in came if came[path] != wanted[path]]
    if wrong:
        sys.exit("damaged, or edited while it was sent: " + ", ".join(wrong[:5]) + "; run it again")
    try:
        with open(os.path.join(root, name)) as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = {}
    for path in came:
        os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
        os.replace(os.path.join(work, path), os.path.join(root, path))
    for path in set(before) - set(wanted):
        try:
            os.remove(os.path.join(root, path))
        except FileNotFoundError:
            pass
    os.replace(os.path.join(work, name), os.path.join(root, name))
finally:
    shutil.rmtree(work, ignore_errors=True)
"""


@dataclass(frozen=True)
class Parcel:
    """Files by the path that they have in a folder of a host, with the SHA-256 of each."""

    files: Mapping[str, Path]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> Parcel:
        """Read the files and compute their digests."""
        return cls(files, {name: digest(path) for name, path in files.items()})

    @property
    def manifest(self) -> bytes:
        """What the folder's manifest holds once the parcel has arrived."""
        return json.dumps(dict(sorted(self.digests.items())), indent=1).encode()


@dataclass(frozen=True)
class Difference:
    """A host's folder beside a parcel. ``put``: whether earlier parcels were put there."""

    exists: bool
    put: bool
    others: tuple[str, ...]
    differ: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing has to be sent or removed."""
        return self.exists and not self.differ and not self.stale

    @property
    def foreign(self) -> bool:
        """Whether somebody else put files there, so that replacing them might destroy work."""
        return bool(self.exists and not self.put and self.others and self.differ)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            found.update(piece)
    return found.hexdigest()


def suite_files(root: Path) -> dict[str, Path]:
    """The suite's files in ``root``, by their path in it."""
    listed = _git(root, ["--cached"])
    if listed is None:
        found = [path for name in WITHOUT_GIT for path in _below(root / name)]
        return {path.relative_to(root).as_posix(): path for path in sorted(found)}
    listed += _git(root, ["--others", "--exclude-standard", "--", *WITH_UNTRACKED]) or []
    return {name: root / name for name in sorted(set(listed)) if (root / name).is_file()}


def _git(root: Path, options: Sequence[str]) -> list[str] | None:
    """Names that ``git ls-files`` gives; None if ``root`` is not the top of a git checkout."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", *options], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _below(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if file.is_file())
    return [file for file in found if "__pycache__" not in file.parts and not file.name.startswith(".")]


def compare(connection: Connection, python: str, folder: str, parcel: Parcel) -> Difference:
    """Hold a folder of a host against a parcel.

    Raises:
        StartError: if the host's ``python`` cannot tell.
    """
    given = json.dumps(dict(parcel.digests)).encode()
    found = ask(connection, [python, "-c", COMPARE, folder, MANIFEST], given, COMPARE_LIMIT_S)
    entries, put = found["entries"], found["put"]
    ours = {MANIFEST, ".wheels", *(entry for entry in entries or () if entry.startswith(".incoming-"))}
    return Difference(
        exists=entries is not None,
        put=put is not None,
        others=tuple(entry for entry in entries or () if entry not in ours),
        differ=tuple(found["differ"]),
        stale=tuple(name for name in put or () if name not in parcel.files),
    )


def ask(connection: Connection, argv: Sequence[str], given: bytes, limit_s: float) -> dict[str, Any]:
    """Run a program on a host; the JSON object on its standard output.

    Raises:
        StartError: if it fails or prints something else.
    """
    answer = connection.run(shlex.join(argv), given, limit_s)
    try:
        if answer.code == 0:
            found: dict[str, Any] = json.loads(answer.out)
            return found
    except ValueError:
        pass
    said = (answer.err or answer.out).decode(errors="replace").strip().splitlines()
    reason = " | ".join(said[-3:]) or "no reason given"
    raise StartError(
        f"{connection.where}: {argv[0]} ended with {answer.code}: {reason}; name a Python 3.10 or later of"
        " that host: [[host]] python"
    )


def put(
    connection: Connection,
    python: str,
    folder: str,
    parcel: Parcel,
    names: Sequence[str],
    tell: Callable[[str], None],
) -> None:
    """Send the files ``names`` of a parcel, and its manifest, into a folder of a host.

    Raises:
        StartError: if the connection is lost, the host's disk is full, or a file arrives damaged.
    """
    total = sum(parcel.files[name].stat().st_size for name in names)
    command = shlex.join([python, "-c", RECEIVE, folder, MANIFEST])
    channel = connection.open(command)
    channel.settimeout(SILENCE_S)
    sent = _Sent(channel, total, f"{len(names)} files", tell)
    try:
        try:
            _write(sent, parcel, names)
            channel.shutdown_write()
        except OSError as error:
            if not channel.exit_status_ready():  # else the receiver says below why it ended
                raise StartError(f"{connection.where}: {folder}: nothing taken any more: {error}") from error
        said = channel.makefile_stderr("rb").read().decode(errors="replace").strip()
        code = channel.recv_exit_status()
    except LOST as error:
        raise StartError(f"{connection.where}: the connection is lost: {error}") from error
    finally:
        channel.close()
    if code:
        last = " | ".join(said.splitlines()[-2:])
        raise StartError(f"{connection.where}: {folder} was not filled: {last}")


class _Sent:
    """The writing end of a channel; tells how far it is."""

    def __init__(self, channel: paramiko.Channel, total: int, what: str, tell: Callable[[str], None]) -> None:
        self._channel, self._total, self._what, self._tell = channel, total, what, tell
        self._sent = self._step = 0

    def write(self, data: bytes) -> int:
        self._channel.sendall(data)
        self._sent += len(data)
        step = STEPS * min(self._sent, self._total) // max(self._total, 1)
        if step != self._step:
            self._step = step
            self._tell(f"copying {self._what}, {self._total / 1e6:.1f} MB: {step * 100 // STEPS} %")
        return len(data)


def _write(stream: _Sent, parcel: Parcel, names: Sequence[str]) -> None:
    with tarfile.open(fileobj=stream, mode="w|", bufsize=CHUNK, format=tarfile.GNU_FORMAT) as archive:  # type: ignore[call-overload]
        for name in names:
            path = parcel.files[name]
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(parcel.manifest)
        archive.addfile(entry, BytesIO(parcel.manifest))

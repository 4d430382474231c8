"""What a host of a lab should hold to take part, beside what it holds: machine, Python, files, environments.

A host's own Python is asked, by one program that needs nothing there and changes nothing; all judgement is
here, by the checks and the stamps of set-up (disagglab/install/requirements.py, environments.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagglab import text
from disagglab.config.schema import HostSection, Lab
from disagglab.errors import StartError
from disagglab.hosts import release
from disagglab.hosts.facts import VERSIONS_PROGRAM
from disagglab.hosts.provision.sync import Difference, Parcel
from disagglab.install import environments as install_environments
from disagglab.install import requirements
from disagglab.install.environments import Plan
from disagglab.install.requirements import GB, SetupError
from disagglab.install.setup import DISK_BYTES
from disagglab.paths import ROOT

READY = "ready"
NOT_OURS = "a folder that set-up did not make"

# Arguments: the folder, relative to the home; then Pythons to ask, NAME=PATH, relative to the folder.
PROBE = rf"""
import ctypes, importlib.util, json, os, platform, shutil, subprocess, sys
ASK = {VERSIONS_PROGRAM!r}
QUIET = {{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}}
root = os.path.realpath(os.path.join(os.path.expanduser("~"), sys.argv[1]))
there = root
while not os.path.isdir(there):
    there = os.path.dirname(there)
name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")

def loads(library):
    try:
        return bool(ctypes.CDLL(library))
    except OSError:
        return False

def gpu():
    try:
        done = subprocess.run(["nvidia-smi", "-L"], timeout=30, **QUIET)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())

def environment(python):
    folder, stamp, versions = os.path.dirname(os.path.dirname(python)), None, {{}}
    try:
        with open(os.path.join(folder, "disagglab.json")) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        pass
    try:
        done = subprocess.run([python, "-c", ASK], timeout=60, **QUIET)
        versions = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        pass
    return {{"exists": os.path.exists(folder), "stamp": stamp, "versions": versions}}

print(json.dumps({{
    "root": root,
    "system": sys.platform,
    "machine": platform.machine(),
    "glibc": [int(part) for part in version.split(".")[:2]] if name == "glibc" else None,
    "python": list(sys.version_info[:3]),
    "missing_modules": [m for m in ("venv", "ensurepip") if importlib.util.find_spec(m) is None],
    "missing_libraries": [l for l in {tuple(requirements.SYSTEM_LIBRARIES)!r} if not loads(l)],
    "gpu": gpu(),
    "free_bytes": shutil.disk_usage(there).free,
    "environments": {{
        asked.partition("=")[0]: environment(os.path.join(root, os.path.expanduser(asked.partition("=")[2])))
        for asked in sys.argv[2:]
    }},
}}))
"""


@dataclass(frozen=True)
class Row:
    """One thing that a host should have. ``mend``: empty if it is so."""

    host: str
    what: str
    expected: str
    found: str
    mend: str = ""
    blocks: bool = False  # provision cannot mend it

    @property
    def missing(self) -> bool:
        """Whether it is not as it should be."""
        return bool(self.mend)


@dataclass(frozen=True)
class Environment:
    """What a host's environment holds. ``stamp``: set-up's, None if it has none."""

    exists: bool
    stamp: Mapping[str, str] | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """A host as its own Python sees it."""

    root: str
    system: str
    machine: str
    glibc: tuple[int, int] | None
    python: tuple[int, int, int]
    missing_modules: tuple[str, ...]
    missing_libraries: tuple[str, ...]
    gpu: bool
    free_bytes: int
    environments: Mapping[str, Environment]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Found:
        """From what PROBE printed."""
        major, minor, micro = raw["python"]
        return cls(
            root=raw["root"],
            system=raw["system"],
            machine=raw["machine"],
            glibc=(raw["glibc"][0], raw["glibc"][1]) if raw["glibc"] else None,
            python=(major, minor, micro),
            missing_modules=tuple(raw["missing_modules"]),
            missing_libraries=tuple(raw["missing_libraries"]),
            gpu=raw["gpu"],
            free_bytes=raw["free_bytes"],
            environments={
                name: Environment(row["exists"], row["stamp"], row["versions"])
                for name, row in raw["environments"].items()
            },
        )


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the lab's vLLM version, on which hosts, with which files, by which command.

    ``wheels``: folder here with wheels for hosts that reach no registry; None where they do.
    """

    lab: Lab
    version: str
    hosts: tuple[HostSection, ...]
    parcel: Parcel
    wheels: Path | None = None

    @property
    def command(self) -> str:
        """The command that provisions these hosts."""
        other = f" --vllm {self.version}" if self.version != self.lab.vllm.version else ""
        offline = " --offline" if self.wheels is not None else ""
        return f"python -m disagglab provision --lab {shlex.quote(self.lab.file)}{other}{offline}"

    def platform(self, host: HostSection) -> str:
        """``cpu`` or ``cuda`` by what the host's nodes use; empty on a host without nodes: set-up chooses."""
        nodes = self.lab.nodes_on(host.name)
        if not nodes:
            return ""
        return "cuda" if any(node.gpus for node in nodes) else "cpu"

    def makes_servers(self, host: HostSection) -> bool:
        """Whether set-up has to provide for servers there: it has nodes, and no environment of one's own."""
        return bool(self.lab.nodes_on(host.name)) and self.version not in host.environments

    def plans(self, host: HostSection, found: Found) -> tuple[Plan, ...]:
        """The environments that set-up makes on a host, from the locks here.

        Raises:
            StartError: if there are no pins for the version.
        """
        main = found.environments.get(".venv")
        recorded = (main.stamp or {}).get("platform", "") if main else ""
        platform = requirements.choose_platform(self.platform(host), recorded, lambda: found.gpu)
        suite = Plan(ROOT, platform, f"{found.python[0]}.{found.python[1]}")
        if not self.makes_servers(host):
            return (suite,)
        try:
            return install_environments.plans(suite, self.version, lambda _: None)
        except SetupError as error:
            raise StartError(f"{host.name}: {error}") from error


def judge(want: Wanted, host: HostSection, found: Found, files: Difference) -> list[Row]:
    """What a host should have, row by row, beside what it has."""
    plans = want.plans(host, found)
    environments = [environment_row(want, host, found, plan) for plan in plans]
    unfinished = any(row.missing for row in environments)
    rows = [*_machine(host, found, plans[0].platform, unfinished), _files(want, host, found, files)]
    rows += environments
    if want.version in host.environments:
        rows.append(_named(want, host, found))
    return rows


def _machine(host: HostSection, found: Found, platform: str, unfinished: bool) -> Iterator[Row]:
    """Whether set-up can run there: the checks that it makes itself, before anything is copied."""
    version, glibc = found.python[:2], requirements.OLDEST_GLIBC
    seen = f"{found.system} on {found.machine}" + (
        f", glibc {found.glibc[0]}.{found.glibc[1]}" if found.glibc else ""
    )
    expected = f"linux on {' or '.join(requirements.MACHINES)}, glibc {glibc[0]}.{glibc[1]} or newer"
    check = _refusal(lambda: requirements.check_machine(found.system, found.machine, found.glibc))
    yield Row(host.name, "machine", expected, seen, check, blocks=bool(check))
    low, high = requirements.OLDEST_PYTHON, requirements.NEWEST_PYTHON
    expected = f"Python {low[0]}.{low[1]} to {high[0]}.{high[1]} with venv"
    seen = f"{host.python} is {'.'.join(map(str, found.python))}"
    mend = ""
    if not low <= version <= high:
        mend = f'name another one: [[host]] python = "python{high[0]}.{high[1] - 1}"'
    elif found.missing_modules:
        seen += f", without {' and '.join(found.missing_modules)}"
        mend = f"apt-get install python{version[0]}.{version[1]}-venv there"
    yield Row(host.name, "Python", expected, seen, mend, blocks=bool(mend))
    if platform == "cpu":
        packages = [requirements.SYSTEM_LIBRARIES[library] for library in found.missing_libraries]
        mend = f"apt-get install {' '.join(packages)} there" if packages else ""
        seen = f"without {', '.join(found.missing_libraries)}" if packages else "there"
        yield Row(
            host.name, "libraries", ", ".join(requirements.SYSTEM_LIBRARIES), seen, mend, blocks=bool(mend)
        )
    if unfinished:
        need = DISK_BYTES[platform]
        short = found.free_bytes < need
        mend = "free some space, or name a folder on a larger disk: [[host]] folder" if short else ""
        seen = f"{found.free_bytes / GB:.1f} GB"
        yield Row(host.name, "free disk", f"{need / GB:.0f} GB", seen, mend, blocks=short)


def _refusal(check: Callable[[], None]) -> str:
    """The mend of a check of set-up that fails; empty if it holds."""
    try:
        check()
    except SetupError as error:
        return str(error).partition("mend: ")[2].partition("\n")[0]
    return ""


def _files(want: Wanted, host: HostSection, found: Found, files: Difference) -> Row:
    expected = f"{len(want.parcel.files)} files, as here, in {found.root}"
    if files.equal:
        return Row(host.name, "suite's files", expected, "equal")
    if not files.exists:
        return Row(host.name, "suite's files", expected, "no such folder", want.command)
    shown = ", ".join((*files.differ, *files.stale)[:3])
    more = len(files.differ) + len(files.stale) - 3
    seen = (
        f"{len(files.differ)} missing or different, {len(files.stale)} too many:"
        f" {shown}{f' and {more} more' if more > 0 else ''}"
    )
    if files.foreign:
        mend = (
            "provision did not put these files there and does not replace them: bring them up to date"
            " yourself, or name another folder: [[host]] folder"
        )
        return Row(host.name, "suite's files", expected, seen, mend, blocks=True)
    return Row(host.name, "suite's files", expected, seen, want.command)


def environment_row(want: Wanted, host: HostSection, found: Found, plan: Plan) -> Row:
    """An environment that set-up makes."""
    version = install_environments.locked_version(plan)
    expected = f"vLLM {version} for {plan.platform}, Python {plan.python}, set up from the locks here"
    there = found.environments.get(plan.name, Environment(False, None, {}))
    state = state_of(there, plan.keys(found.root), version)
    if state == READY:
        return Row(host.name, plan.name, expected, _shown(there.versions))
    if state == NOT_OURS:
        mend = f"move {found.root}/{plan.name} away, or name another folder: [[host]] folder"
        return Row(host.name, plan.name, expected, state, mend, blocks=True)
    return Row(host.name, plan.name, expected, state, want.command)


def state_of(there: Environment, keys: Mapping[str, str], version: str) -> str:
    """READY, or what is wrong with an environment; ``keys``: what its stamp should say."""
    if not there.exists:
        return "none"
    if there.stamp is None:
        return NOT_OURS
    if "pinned" not in there.stamp:
        return "unfinished"
    if there.stamp["pinned"] != keys["pinned"]:
        return "made for other pins, another Python or another platform"
    if there.stamp.get("own") != keys["own"]:
        return "this package is not installed, or for another pyproject.toml"
    if release.number(there.versions.get("vllm", "")) != version:
        return f"set up, but it holds {_shown(there.versions)}"
    return READY


def _named(want: Wanted, host: HostSection, found: Found) -> Row:
    """An environment of one's own, which the lab file names: asked, never touched."""
    named = host.environments[want.version]
    versions = found.environments[named].versions
    needed = {"vllm": f"vLLM {want.version}", "nixl-cu13": "NIXL", "disagglab": "this package"}
    lacks = [what for package, what in needed.items() if package not in versions]
    mend = ""
    if lacks or release.number(versions["vllm"]) != want.version:
        mend = f"install {', '.join(lacks) or needed['vllm']} there, or take it out of [[host]] environments"
    expected = ", ".join(needed.values())
    return Row(host.name, named, expected, _shown(versions), mend, blocks=bool(mend))


def _shown(versions: Mapping[str, str]) -> str:
    names = {"vllm": "vLLM", "torch": "torch", "nixl-cu13": "NIXL", "disagglab": "disagglab"}
    found = [f"{label} {versions[name]}" for name, label in names.items() if name in versions]
    return ", ".join(found) or "a Python that does not answer"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for a terminal: a row each, and the mend below it where one is needed."""
    head = ("host", "what", "expected", "found")
    cells = [(row.host, row.what, row.expected, row.found) for row in rows]
    first, *rest = text.table([head, *cells])
    lines = [first]
    for row, line in zip(rows, rest, strict=True):
        lines.append(line)
        if row.missing:
            lines.append(f"    mend: {row.mend}")
    return lines

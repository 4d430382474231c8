"""Wheels for a host that reaches no package registry: which it needs, which are here, how to get the rest.

pip evaluates the markers of a lock (``; python_full_version < '3.12'``) for the Python that it runs in, also
where it downloads for another. So they are evaluated here, for the host, and pip gets the pins alone.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from disagglab.agent.process import OwnedProcess
from disagglab.errors import LabError
from disagglab.install.environments import Plan, Step
from disagglab.install.setup import NOT_FOUND

DOWNLOAD_LIMIT_S = 7200.0  # CUDA wheels are several GB
STEP = 20  # wheels between two lines of progress
OLDEST_MANYLINUX = 5  # manylinux_2_5 is manylinux1
ALIASES = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}  # older names: minor version of glibc 2


@dataclass(frozen=True)
class Target:
    """What decides which wheels fit a host. ``python``: major, minor, micro."""

    machine: str
    glibc: tuple[int, int]
    python: tuple[int, int, int]

    @property
    def platforms(self) -> list[str]:
        """Platform tags of wheels that run there, best first."""
        minors = range(self.glibc[1], OLDEST_MANYLINUX - 1, -1)
        found = [f"manylinux_2_{minor}_{self.machine}" for minor in minors]
        known = [alias for alias, minor in ALIASES.items() if minor <= self.glibc[1]]
        found += [
            f"{alias}_{self.machine}"
            for alias in known
            if alias == "manylinux2014" or self.machine == "x86_64"
        ]
        return [*found, f"linux_{self.machine}"]

    @property
    def tags(self) -> frozenset[Tag]:
        """Every tag of a wheel that runs there."""
        version, platforms = self.python[:2], self.platforms
        interpreter = f"cp{version[0]}{version[1]}"
        return frozenset(
            [
                *cpython_tags(version, platforms=platforms),
                *compatible_tags(version, interpreter, platforms),
            ]
        )

    def wants(self, requirement: Requirement) -> bool:
        """Whether a pin's marker holds there."""
        if requirement.marker is None:
            return True
        environment = {
            **default_environment(),
            "python_version": f"{self.python[0]}.{self.python[1]}",
            "python_full_version": ".".join(map(str, self.python)),
            "implementation_version": ".".join(map(str, self.python)),
            "platform_machine": self.machine,
        }
        return requirement.marker.evaluate({key: str(value) for key, value in environment.items()})


@dataclass(frozen=True)
class Pins:
    """The pins of one step that a host needs. ``fallback_index``: see ``Step`` in install."""

    what: str
    requirements: tuple[Requirement, ...]
    fallback_index: str


def pins(plans: Sequence[Plan], target: Target) -> list[Pins]:
    """What a host needs for its environments, step by step."""
    return [_pins(step, target) for plan in plans for step in plan.pinned()]


def _pins(step: Step, target: Target) -> Pins:
    lines = Path(step.arguments[-1]).read_text().splitlines()
    found = (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))
    return Pins(step.what, tuple(pin for pin in found if target.wants(pin)), step.fallback_index)


def find(folder: Path, requirement: Requirement, tags: frozenset[Tag]) -> Path | None:
    """A wheel in ``folder`` that is what a pin asks for and fits ``tags``."""
    for path, name, version, wheel_tags in _wheels(folder):
        fits = name == canonicalize_name(requirement.name) and not tags.isdisjoint(wheel_tags)
        if fits and requirement.specifier.contains(version, prereleases=True):
            return path
    return None


def _wheels(folder: Path) -> Iterator[tuple[Path, str, str, frozenset[Tag]]]:
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        yield path, name, str(version), tags


def gather(
    folder: Path, wanted: Sequence[Pins], target: Target, tell: Callable[[str], None]
) -> dict[str, Path]:
    """The wheels of all pins, by file name; those that ``folder`` lacks are downloaded into it.

    Raises:
        LabError: if pip cannot get one; the message holds its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tags = target.tags
    for step in wanted:
        missing = [pin for pin in step.requirements if find(folder, pin, tags) is None]
        if missing:
            tell(f"downloading {len(missing)} wheels: {step.what}")
            _download(folder, missing, step.fallback_index, target, tell)
    found: dict[str, Path] = {}
    for step in wanted:
        for pin in step.requirements:
            path = find(folder, pin, tags)
            if path is None:
                raise LabError(
                    f"pip downloaded no wheel of {pin.name}{pin.specifier} for Python"
                    f" {target.python[0]}.{target.python[1]} on {target.machine} into {folder}"
                )
            found[path.name] = path
    return found


def download_command(folder: Path, requirements: Path, target: Target) -> list[str]:
    """What downloads the wheels of a host's pins, whatever this machine is."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    argv += ["--progress-bar", "off", "--dest", str(folder), "--implementation", "cp"]
    argv += ["--python-version", f"{target.python[0]}.{target.python[1]}"]
    argv += [word for platform in target.platforms for word in ("--platform", platform)]
    return [*argv, "-r", str(requirements)]


def _download(
    folder: Path,
    missing: Sequence[Requirement],
    fallback_index: str,
    target: Target,
    tell: Callable[[str], None],
) -> None:
    """Download into a folder of its own first, so that ``folder`` never holds half a wheel."""
    scratch = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    requirements, log = scratch / "pins.txt", scratch / "pip.log"
    requirements.write_text("".join(f"{pin.name}{pin.specifier}\n" for pin in missing))
    argv = download_command(scratch, requirements, target)

    def note(begun: int) -> None:
        tell(f"downloading: {begun - begun % STEP} of {len(missing)} wheels")

    try:
        try:
            _run(argv, log, note)
        except LabError:
            if not fallback_index or NOT_FOUND not in log.read_text(errors="replace"):
                raise
            tell(f"pip's own indexes do not have it; asking {fallback_index} too")
            _run([*argv, "--extra-index-url", fallback_index], log, note)
        for wheel in scratch.glob("*.whl"):
            os.replace(wheel, folder / wheel.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(argv: Sequence[str], log: Path, note: Callable[[int], None]) -> None:
    log.unlink(missing_ok=True)
    scratch = log.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    env = {**os.environ, "TMPDIR": str(scratch), "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def tick() -> None:
        lines = log.read_text(errors="replace").splitlines()
        note(sum(line.startswith("Collecting ") for line in lines))

    with OwnedProcess("pip-download", argv, env, log, scratch, run_id=f"provision-{os.getpid()}") as process:
        process.wait(DOWNLOAD_LIMIT_S, tick)

"""The machine as set-up finds it: what cannot work is refused before anything is made, with its mend.

Standard library alone, like disagglab/install/setup.py.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Sequence  # noqa: UP035 - set-up may be started by a Python older than the suite's

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
MACHINES = ("x86_64", "aarch64")
OLDEST_GLIBC = (2, 31)  # the newest glibc that a wheel of the locks asks for (llguidance: manylinux_2_31)
PLATFORMS = ("cpu", "cuda")
PLATFORM_VARIABLE = "DISAGGLAB_PLATFORM"
GB = 10**9
NVIDIA_SMI_S = 30.0  # it takes seconds where the driver has to be loaded first
SYSTEM_LIBRARIES = {"libnuma.so.1": "libnuma1"}  # what wheels of the CPU lock link against: Debian's package


class SetupError(Exception):
    """Set-up cannot go on: what is wrong, and the mend. Exit status 2."""

    def __init__(self, wrong: str, mend: str, lines: Sequence[str] = ()) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join([wrong, f"    mend: {mend}", *(f"    | {line}" for line in lines)]))


def check_python(version: tuple[int, int], executable: str) -> None:
    """Raises SetupError if the locks hold no wheels for this Python."""
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        raise SetupError(
            f"{executable} is Python {version[0]}.{version[1]}; the suite needs 3.11, 3.12 or 3.13",
            "name another one, as in: make lab PYTHON=python3.12",
        )


def check_modules(version: tuple[int, int], executable: str, present: Callable[[str], object]) -> None:
    """Raises SetupError if this Python cannot make virtual environments, as Debian's without python3-venv."""
    missing = [name for name in ("venv", "ensurepip") if not present(name)]
    if missing:
        raise SetupError(
            f"{executable} cannot make virtual environments: it has no module {' and '.join(missing)}",
            f"apt-get install python3-venv (or python{version[0]}.{version[1]}-venv), "
            "or name another Python, as in: make lab PYTHON=python3.12",
        )


def check_machine(system: str, machine: str, glibc: tuple[int, int] | None) -> None:
    """Raises SetupError if there are no wheels for this machine. ``glibc`` is None on another C library."""
    if system != "linux" or machine not in MACHINES:
        raise SetupError(
            f"this is {system} on {machine}; vLLM, NIXL and the router need Linux on {' or '.join(MACHINES)}",
            "run the suite on such a machine, or in a Linux container or virtual machine",
        )
    if glibc is None or glibc < OLDEST_GLIBC:
        found = f"glibc {glibc[0]}.{glibc[1]}" if glibc else "no glibc"
        raise SetupError(
            f"this system has {found}; the wheels need glibc {OLDEST_GLIBC[0]}.{OLDEST_GLIBC[1]} or newer",
            "use Debian 11, Ubuntu 20.04 or newer (Alpine has no glibc)",
        )


def check_disk(free_bytes: int, needed_bytes: int, folder: Path) -> None:
    """Raises SetupError if the environment would not fit."""
    if free_bytes < needed_bytes:
        raise SetupError(
            f"{free_bytes / GB:.1f} GB are free where {folder} lies; set-up needs {needed_bytes / GB:.0f} GB",
            "free some space, or clone the repository to a larger disk",
        )


def choose_platform(asked: str, recorded: str, gpu_answers: Callable[[], bool]) -> str:
    """``asked`` (DISAGGLAB_PLATFORM) decides, then what the environment was made for, then the GPU.

    Raises:
        SetupError: if ``asked`` is no platform.
    """
    if asked and asked not in PLATFORMS:
        mend = f"set it to {' or '.join(PLATFORMS)}, or unset it"
        raise SetupError(f"{PLATFORM_VARIABLE}={asked} is no platform", mend)
    if asked or recorded in PLATFORMS:
        return asked or recorded
    return "cuda" if gpu_answers() else "cpu"


def gpu_answers() -> bool:
    """Whether an NVIDIA GPU answers: a driver alone, or a GPU that has fallen off the bus, does not count."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def glibc_version() -> tuple[int, int] | None:
    """Version of the GNU C library, or None where there is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) if name == "glibc" else None
    except (AttributeError, OSError, ValueError):
        return None


def base_python() -> str:
    """The Python outside any virtual environment: ``.venv`` must not be made from itself."""
    inside = sys.prefix != sys.base_prefix
    return str(getattr(sys, "_base_executable", sys.executable)) if inside else sys.executable


def check_libraries(platform: str, load: Callable[[str], object] = ctypes.CDLL) -> None:
    """Raises SetupError if a system library is missing that vLLM's CPU build loads."""
    for library, package in SYSTEM_LIBRARIES.items() if platform == "cpu" else ():
        try:
            load(library)
        except OSError:
            raise SetupError(
                f"{library} is missing; vLLM's CPU build loads it", f"apt-get install {package}"
            ) from None

"""Compiles the locks cpu.txt and cuda.txt. ``make lock`` runs it; it needs uv (https://docs.astral.sh/uv/).

    python3 requirements/lock.py [UV [further options of "uv pip compile"]]

One lock serves Linux on x86_64 and aarch64 with Python 3.11 to 3.13. uv repeats that condition on every line;
it is taken out here, so that a marker that is left means something. Pins that still fit are kept; to renew
them, pass ``--upgrade`` or ``--upgrade-package NAME``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OLDEST_PYTHON = "3.11"
HEAD = """\
# Locked for {platform}: Linux on x86_64 and aarch64, Python 3.11 to 3.13. Installed with --no-deps.
# Written by `make lock` from pyproject.toml, requirements/{platform}.in and {platform}.override: do not edit.
"""
# What requirements/pyproject.toml restricts uv to, as uv spells it.
MACHINES = ("aarch64", "x86_64")
GIVEN = " and platform_python_implementation == 'CPython' and sys_platform == 'linux'"
EVERYWHERE = "(" + " or ".join(f"(platform_machine == '{name}'{GIVEN})" for name in MACHINES) + ")"
ALWAYS_TRUE = (EVERYWHERE, GIVEN, "python_full_version < '3.14'", "implementation_name != 'PyPy'")
LEFT = re.compile(r"python_full_version (<|>=|==) '[\d.*]+'|platform_machine == '(aarch64|x86_64)'")


def simplify(line: str) -> str:
    """Drop from a line of uv's output what holds on every machine that the lock is for.

    Raises:
        SystemExit: if a condition is left that is not understood.
    """
    pin, separator, marker = line.partition(" ; ")
    if not separator:
        return line
    for condition in ALWAYS_TRUE:
        marker = marker.replace(condition, "")
    conditions = [part.strip() for part in marker.split(" and ") if part.strip()]
    odd = [condition for condition in conditions if not LEFT.fullmatch(condition)]
    if odd:
        raise SystemExit(f"lock: {pin}: cannot simplify {odd}\n    mend: teach {__file__} this condition")
    return f"{pin} ; {' and '.join(conditions)}" if conditions else pin


def compile_lock(uv: str, platform: str, options: list[str]) -> None:
    """Write ``{platform}.txt``."""
    lock = FOLDER / f"{platform}.txt"
    argv = [uv, "pip", "compile", "--universal", "--python-version", OLDEST_PYTHON, *options]
    argv += ["--no-annotate", "--no-header", "--quiet", "--output-file", lock.name]
    argv += ["--override", f"{platform}.override", "../pyproject.toml", "--extra", "dev", f"{platform}.in"]
    print("lock:", " ".join(argv), flush=True)
    subprocess.run(argv, cwd=FOLDER, check=True)
    pins = [simplify(line) for line in lock.read_text().splitlines() if not line.startswith("#")]
    lock.write_text(HEAD.format(platform=platform) + "\n".join(pins) + "\n")
    print(f"lock: {lock.name}: {len(pins)} pins", flush=True)


def main(argv: list[str]) -> int:
    """Compile both locks."""
    uv, *options = argv or ["uv"]
    try:
        for platform in ("cpu", "cuda"):
            compile_lock(uv, platform, options)
    except FileNotFoundError:
        print(f"lock: there is no {uv}\n    mend: install uv, or name it: make lock UV=PATH", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"lock: uv failed with exit status {error.returncode}, see above", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

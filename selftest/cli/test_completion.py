"""Completion: what a shell is told while a command is typed. Oracle: argcomplete's protocol with bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagglab.cli.completion import SHELLS
from disagglab.cli.main import main
from disagglab.paths import LABS, ROOT

LIMIT_S = 60.0
CHILD = "from disagglab.cli.main import main; main()"


def completed(line: str, tmp_path: Path) -> list[str]:
    """What completes a line, as a shell would ask."""
    out = tmp_path / "words"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=ROOT,
        env={**os.environ, **asked},
        capture_output=True,
        timeout=LIMIT_S,
        check=True,
    )
    return [word.strip() for word in out.read_text().split("\n")]


def test_commands_options_and_names(tmp_path: Path) -> None:
    """Commands, labs, a lab's ways and workloads, shipped models."""
    assert {"kv", "labs", "plan"} <= set(completed("disagglab ", tmp_path))
    assert completed("disagglab plan --lab two-h200", tmp_path) == ["two-h200", "two-h200-stock"]
    ways = completed("disagglab plan --lab two-h200 --way ", tmp_path)
    assert ways == ["stock", "tcp", "host-buffer", "sharded"]
    assert completed("disagglab plan --lab embedded --workload ch", tmp_path) == ["chat"]
    assert completed("disagglab kv Llama-3.1-8", tmp_path) == ["Llama-3.1-8B-Instruct"]


def test_lab_files_by_path(tmp_path: Path) -> None:
    """Folders and lab files elsewhere, and nothing else."""
    (tmp_path / "mine.toml").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "mine.txt").touch()
    found = completed(f"disagglab predict --lab {tmp_path}/m", tmp_path)
    assert found == [f"{tmp_path}/mine.toml", f"{tmp_path}/more/"]
    assert "labs/embedded.toml" in completed(f"disagglab labs --lab {LABS.name}/e", tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_what_to_source(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that names the command."""
    assert main(["completion", shell]) == 0
    assert "disagglab" in capsys.readouterr().out


def test_bash_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Sourced, it registers a function for the command."""
    main(["completion", "bash"])
    script = f"{capsys.readouterr().out}\ncomplete -p disagglab"
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert "disagglab" in told.stdout

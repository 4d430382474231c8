"""Runs are told apart, and a session that proved nothing has failed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.paths import ROOT
from disagglab.pytest_plugin import endings
from disagglab.pytest_plugin.plugin import SESSION
from disagglab.results import seconds, speed
from disagglab.results.run_folder import Store, new_run_id

LIMIT_S = 90


def session(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A real session of pytest in this checkout, and what it printed."""
    argv = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)


def test_run_ids_differ() -> None:
    """Two runs of one second get different folders."""
    assert len({new_run_id() for _ in range(50)}) == 50


def test_a_session_that_skipped_everything_has_failed(state: Path, tmp_path: Path) -> None:
    """Where no selected test can run, pytest ends with status 1 and says why."""
    answer = session("-m", "dedicated")
    assert answer.returncode == 1, answer.stdout
    assert "every test was skipped; this session proved nothing" in answer.stdout
    assert "DEDICATED: asked for with --dedicated" in answer.stdout


def test_a_session_accounts_for_all_of_its_seconds(state: Path) -> None:
    """From the process's start on: the terminal has the line of run.json, and the report the table.

    Oracle: a clock outside. What it sees beyond the sum is the process's end; 1 s of rounding either way.
    """
    began = time.monotonic()
    answer = session("tests/kvcache/test_arithmetic.py", "-k", "bytes_per_token")
    took_s = time.monotonic() - began
    assert answer.returncode == 0, answer.stdout
    found = re.search(r"^run: (.+); machine speed", answer.stdout, re.MULTILINE)
    assert found
    folder = Path(found[1])
    spent: dict[str, float] = json.loads((folder / "run.json").read_text())["seconds"]
    assert f"\n{seconds.line(spent)}\n" in answer.stdout
    assert {"start", "probe", "tests", "report", "other"} <= set(spent)
    in_pytest = re.search(r"passed.* in ([0-9.]+)s", answer.stdout)
    assert in_pytest
    assert float(in_pytest[1]) - 1.0 <= sum(spent.values()) <= took_s
    assert "Where the time went" in (folder / "report.html").read_text()


def test_a_session_that_may_not_skip_names_what_was_missing(state: Path, tmp_path: Path) -> None:
    """With --no-skips a skip is a failure of its test, with the same reason."""
    answer = session("-m", "dedicated", "--no-skips")
    assert answer.returncode == 1, answer.stdout
    assert "--no-skips, yet Skipped: DEDICATED: asked for with --dedicated" in answer.stdout
    assert "1 skipped" not in answer.stdout


def test_a_session_that_wrote_a_token_has_failed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests passed; the files are named, and pytest ends in order."""
    monkeypatch.setenv("HF_TOKEN", "embedded")  # the lab's name, which stands in many files
    answer = session("tests/kvcache/test_arithmetic.py", "-k", "bytes_per_token")
    assert answer.returncode == 1, answer.stdout
    assert "FAILED: a token stands in " in answer.stdout
    assert "run.json; delete the files and revoke the token" in answer.stdout
    assert "passed" in answer.stdout
    assert "SystemExit" not in answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("status", "ends_with"),
    [
        (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED),
        (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.TESTS_FAILED),
        (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERRUPTED),
    ],
)
def test_a_root_cause_fails_a_session_that_was_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: pytest.ExitCode, ends_with: pytest.ExitCode
) -> None:
    """Also where every test passed before the death was seen."""
    monkeypatch.setattr(speed, "probe", dict)
    store = Store.create(tmp_path, "run")
    store.write_meta(speed={})
    causes = SimpleNamespace(found=["cause"], as_rows=lambda: [{"line": "cause"}])
    live = SimpleNamespace(store=store, causes=causes, modules={})
    config = SimpleNamespace(stash={SESSION: live})
    ended: Any = SimpleNamespace(config=config, exitstatus=status)
    for _ in endings.pytest_sessionfinish(ended, status):
        assert store.meta["exitstatus"] == ends_with
    assert ended.exitstatus == ends_with
    assert store.meta["root_causes"] == [{"line": "cause"}]

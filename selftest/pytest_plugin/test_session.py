"""Runs are told apart, and a session that proved nothing has failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disagglab.paths import ROOT
from disagglab.results.run_folder import new_run_id

LIMIT_S = 90


def test_run_ids_differ() -> None:
    """Two runs of one second get different folders."""
    assert len({new_run_id() for _ in range(50)}) == 50


def test_a_session_that_skipped_everything_has_failed(state: Path, tmp_path: Path) -> None:
    """Where no selected test can run, pytest ends with status 1 and says why."""
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "dedicated"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    assert answer.returncode == 1, answer.stdout
    assert "every test was skipped; this session proved nothing" in answer.stdout
    assert "DEDICATED: asked for with --dedicated" in answer.stdout


def test_a_session_that_may_not_skip_names_what_was_missing(state: Path, tmp_path: Path) -> None:
    """With --no-skips a skip is a failure of its test, with the same reason."""
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "dedicated", "--no-skips"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    assert answer.returncode == 1, answer.stdout
    assert "--no-skips, yet Skipped: DEDICATED: asked for with --dedicated" in answer.stdout
    assert "1 skipped" not in answer.stdout


def test_a_session_that_wrote_a_token_has_failed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests passed; the files are named, and pytest ends in order."""
    monkeypatch.setenv("HF_TOKEN", "embedded")  # the lab's name, which stands in many files
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/kvcache/test_arithmetic.py", "-k", "bytes_per_token"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    assert answer.returncode == 1, answer.stdout
    assert "FAILED: a token stands in " in answer.stdout
    assert "run.json; delete the files and revoke the token" in answer.stdout
    assert "passed" in answer.stdout
    assert "SystemExit" not in answer.stdout + answer.stderr

"""One lab at a time, and a session that proved nothing has failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disagglab.errors import StartError
from disagglab.session import exclusive, new_run_id

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 90


def test_two_sessions_cannot_run_a_lab_at_once(state: Path) -> None:
    """The second is refused at once, with the pid of the first; afterwards the lock is free."""
    with exclusive():
        answer = subprocess.run(
            [sys.executable, "-c", "from disagglab.session import exclusive\nwith exclusive(): pass"],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            cwd=ROOT,
        )
        assert answer.returncode != 0
        assert "another session (pid" in answer.stderr
    with exclusive():
        pass


def test_run_ids_differ() -> None:
    """Two runs of one second get different folders."""
    assert len({new_run_id() for _ in range(50)}) == 50


def test_a_session_that_skipped_everything_has_failed(state: Path, tmp_path: Path) -> None:
    """On a lab where no selected test can run, pytest ends with status 1 and says why."""
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "disagg and not hostless", "--lab", "spark"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    assert answer.returncode == 1, answer.stdout
    assert "every test was skipped; this session proved nothing" in answer.stdout
    assert "SSH-TRANSPORT" in answer.stdout


def test_the_lock_error_is_an_error_with_a_mend(state: Path) -> None:
    """Within one process the lock is held only once; the message tells how to end the other session."""
    with exclusive(), pytest.raises(StartError, match="kill -INT"), exclusive():
        pass

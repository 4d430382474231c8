"""disagglab frontier: what it prints of a made session, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagglab.cli import command
from disagglab.cli.main import main
from disagglab.results import frontier_file
from selftest.results.rated import MANY, frontier


@pytest.fixture
def session(tmp_path: Path) -> str:
    """A session in which disaggregated serving has twice the goodput at 1/s and the same at 2/s."""
    made = frontier(
        {
            "replicated": {1.0: [10, 10.1, 9.9], 2.0: [10, 10.1, 9.9]},
            "disaggregated": {1.0: [5, 5.0, 5.0], 2.0: [10, 10.0, 10.0]},
        },
        MANY,
    )
    frontier_file.write(made, tmp_path)
    return str(tmp_path)


def test_the_sessions_own_promise(session: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", session]) == 0
    shown = capsys.readouterr().out
    assert "at 1 requests/s at TTFT <= 1 s, TPOT <= 100 ms: disaggregated, 2.00 times" in shown
    assert "per 1M tokens" not in shown


def test_another_promise_and_a_price(session: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Limits that are given take the place of all others. All TPOT and gaps are 50 ms."""
    assert main(["frontier", session, "--itl", "50ms", "--price", "2 EUR/gpu-hour"]) == 0
    shown = capsys.readouterr().out
    assert "at 1 requests/s at p99 ITL <= 50 ms: disaggregated, 2.00 times" in shown
    assert "cost in EUR at 2 EUR/gpu-hour" in shown
    assert main(["frontier", session, "--tpot", "49ms", "--ttft", "2s"]) == 0
    assert "at TTFT <= 2 s, TPOT <= 49 ms: not told apart" in capsys.readouterr().out, "none is good"


def test_other_terms(session: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A margin that no band fits into; bands of each rate alone."""
    assert main(["frontier", session, "--margin", "0.1%", "--own-spread"]) == 0
    shown = capsys.readouterr().out
    assert "at 2 requests/s at TTFT <= 1 s, TPOT <= 100 ms: not told apart" in shown
    assert "bands of goodput: of each rate's own rounds" in shown


@pytest.mark.parametrize(
    "options",
    [["--ttft", "soon"], ["--itl", "0s"], ["--margin", "1.5"], ["--margin", "x"], ["--price", "2"]],
)
def test_a_wrong_option_is_refused(
    session: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", session, *options]) == command.REFUSED
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{options[0]}: no " in told


def test_a_folder_without_a_frontier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(tmp_path)]) == command.REFUSED
    assert "frontier.json" in capsys.readouterr().err

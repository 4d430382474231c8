"""``disagglab tune``: the plan, refusals in one line, and the session it stands for (none is started)."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagglab import paths
from disagglab.cli.main import main
from disagglab.paths import ROOT

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
LAB = "embedded-ways"


def session(monkeypatch: Patch, folder: Path, writes: bool) -> list[list[str]]:
    """Stands in for pytest: notes its options, and writes a tuned lab or not."""
    called: list[list[str]] = []
    monkeypatch.setattr(paths, "REPORTS", folder)

    def run(argv: list[str]) -> int:
        called.append(argv)
        if writes:
            (folder / "latest").mkdir(parents=True)
            (folder / "latest" / "tuned.toml").touch()
        return 0 if writes else 1

    monkeypatch.setattr(pytest, "main", run)
    return called


def test_the_plan_starts_nothing(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    called = session(monkeypatch, tmp_path, writes=True)
    assert main(["tune", "--lab", LAB, "--plan", "--settings", "2", "--workload", "documents"]) == 0
    out = capsys.readouterr().out
    assert "search on documents" in out
    assert "ways: single, replicated, disaggregated, sharded" in out
    assert called == []


def test_a_session_gets_what_was_asked(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    called = session(monkeypatch, tmp_path, writes=True)
    assert main(["tune", "--lab", LAB, "--workload", "chat", "--settings", "3", "--vllm", "0.30.0"]) == 0
    assert called == [
        [
            *(str(ROOT / "tests" / "tuning"), "-m", "tuning", "--lab", LAB),
            *("--tune-workload", "chat", "--settings", "3", "--vllm", "0.30.0"),
        ]
    ]
    assert f"tuned lab: {tmp_path / 'latest' / 'tuned.toml'}" in capsys.readouterr().out


def test_the_exit_status_is_pytests(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    called = session(monkeypatch, tmp_path, writes=False)
    assert main(["tune", "--lab", LAB]) == 1
    assert called == [[str(ROOT / "tests" / "tuning"), "-m", "tuning", "--lab", LAB]]
    assert "no tuned lab was written" in capsys.readouterr().out


def test_a_time_is_a_number_of_settings(monkeypatch: Patch, tmp_path: Path) -> None:
    called = session(monkeypatch, tmp_path, writes=True)
    assert main(["tune", "--lab", LAB, "--budget", "10h"]) == 0
    assert called[0][-2:] == ["--settings", "4"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lab", "embedded"], "add [tuning]"),
        (["--lab", LAB, "--workload", "nothing"], "name a workload that exists"),
        (["--lab", LAB, "--settings", "1"], "can give 2 to"),
        (["--lab", LAB, "--settings", "60"], "can give 2 to 49"),
        (["--lab", LAB, "--budget", "soon"], "write 90s, 10m or 1h"),
        (["--lab", LAB, "--budget", "1s"], "two settings of each way take"),
        (["--lab", LAB, "--budget", "1h", "--settings", "4"], "a time or a number of settings"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    options: list[str], named: str, monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    called = session(monkeypatch, tmp_path, writes=True)
    assert main(["tune", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), called) == ("", 1, [])
    assert named in err

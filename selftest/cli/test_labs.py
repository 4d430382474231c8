"""``disagglab labs``: a line a lab, and why this machine has it or not.

Oracle: the lab files; machines that are written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli import labs
from disagglab.cli.main import main
from disagglab.hosts import needs
from disagglab.hosts.needs import Machine
from disagglab.paths import LABS

Capture = pytest.CaptureFixture[str]
SMALL = Machine(cores=2, gpus=0, available_gib=16.0, root=False, lacks=())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for this machine: two cores, no GPU, an ordinary account."""
    monkeypatch.setattr(needs.Machine, "here", lambda: SMALL)


def rows(capsys: Capture, *options: str) -> dict[str, Any]:
    """What --json tells, by name of lab."""
    assert main(["labs", "--json", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return {row["name"]: row for row in json.loads(out)}


def test_every_lab_is_listed(capsys: Capture) -> None:
    """As the lab files have them, each with its nodes."""
    found = rows(capsys)
    assert list(found) == sorted(found)
    assert {row["file"] for row in found.values()} == {str(file) for file in LABS.glob("*.toml")}
    assert found["embedded"]["nodes"] == [
        {"name": "a", "role": "prefill", "host": "local"},
        {"name": "b", "role": "decode", "host": "local"},
    ]


def test_the_reason_is_said(capsys: Capture) -> None:
    """What is missing, what takes root, and what only other machines can tell."""
    found = rows(capsys)
    assert found["two-h200"]["here"] is False
    assert "needs 2 GPUs, none here" in found["two-h200"]["reasons"]
    assert found["two-hosts"]["here"] is False
    assert "needs root, to make its hosts" in found["two-hosts"]["reasons"]
    assert found["spark"]["here"] is None
    assert "disagglab provision --lab spark --check" in found["spark"]["reasons"][0]


def test_the_table_is_aligned(capsys: Capture) -> None:
    """Every column begins where its heading does; the reason stands in the same line."""
    assert main(["labs"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    starts = [head.index(word) for word in labs.HEAD]
    for line in lines:
        assert all(start == 0 or line[start - 2 : start] == "  " for start in starts)
        assert line[starts[-1] :].startswith(("yes", "no: ", "not known: "))
    (line,) = (line for line in lines if line.startswith("two-h200 "))
    assert "prefill gpu0; decode gpu1" in line
    assert "needs 2 GPUs, none here" in line


def test_a_lab_of_ones_own(capsys: Capture, tmp_path: Path) -> None:
    """--lab takes a path, and shows this lab alone; a file that is wrong ends with 2 and one line."""
    mine = tmp_path / "my lab.toml"
    mine.write_text((LABS / "embedded.toml").read_text().replace('name = "embedded"', 'name = "mine"'))
    assert list(rows(capsys, "--lab", str(mine))) == ["mine"]
    mine.write_text("name = 3")
    assert main(["labs", "--lab", str(mine)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_file_in_labs_that_is_wrong_keeps_its_line(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is wrong, beside the labs that are right."""
    monkeypatch.setattr(labs, "LABS", tmp_path)
    (tmp_path / "broken.toml").write_text('name = "broken"\ncolour = "red"')
    (tmp_path / "good.toml").write_text((LABS / "embedded.toml").read_text())
    found = rows(capsys)
    assert found["broken"]["here"] is False
    assert "colour: unknown key" in found["broken"]["reasons"]
    assert found["embedded"]["needs"]["cores"] == [0, 1]
    assert main(["labs"]) == 0
    assert "colour: unknown key" in capsys.readouterr().out

"""docs/generate.py: reference pages say what schema, parsers and Makefile say, else the check fails.

The oracle is a change of the code: a key, an option or a target more has to make the check fail.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from disagglab.config import labs
from disagglab.config.schema import SloSection
from disagglab.paths import ROOT
from disagglab.units import Unit
from selftest.docs_program import loaded

PROGRAM = ROOT / "docs" / "generate.py"


generate = loaded(PROGRAM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The templates with pages made of them."""
    for template in generate.FOLDER.glob("*.in"):
        (tmp_path / template.name).write_text(template.read_text())
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    return tmp_path


def test_the_pages_are_what_the_code_says() -> None:
    """Of this checkout, by any width of a terminal."""
    env = {**os.environ, "COLUMNS": "40", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--check"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class More(SloSection):
    """The service level objective, with a key more."""

    e2e_s: float = Field(description="longest time to the last token")


class Mute(SloSection):
    """A key that nobody explains."""

    e2e_s: float = 1.0


Capture = pytest.CaptureFixture[str]


def test_a_key_more_makes_the_check_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The page is named with the command that mends it; the check writes nothing; the command mends it."""
    monkeypatch.setitem(labs.OPTIONAL, "slo", More)
    before = (folder / "lab-file.md").read_text()
    assert generate.main(["--check"], folder) == 1
    said = capsys.readouterr().err
    assert str(folder / "lab-file.md") in said
    assert "mend: python docs/generate.py" in said
    assert "commands.md" not in said
    assert (folder / "lab-file.md").read_text() == before
    assert generate.main([], folder) == 0
    assert (
        "| `e2e_s` | number | req | | longest time to the last token |"
        in (folder / "lab-file.md").read_text()
    )
    assert generate.main(["--check"], folder) == 0


def test_a_key_without_a_description_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(labs.OPTIONAL, "slo", Mute)
    assert generate.main(["--check"], folder) == 1
    assert "Mute.e2e_s has no description" in capsys.readouterr().err


def test_a_section_that_no_template_has_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """So no new section stays without a page; and no marker without a part."""
    monkeypatch.setitem(labs.OPTIONAL, "more", More)
    assert generate.main(["--check"], folder) == 1
    assert "keys: more" in capsys.readouterr().err
    monkeypatch.delitem(labs.OPTIONAL, "more")
    with (folder / "lab-file.md.in").open("a") as template:
        template.write("\n<!-- keys: nothing -->\n")
    assert generate.main(["--check"], folder) == 1
    assert "<!-- keys: nothing --> stands for nothing" in capsys.readouterr().err


def test_an_option_more_makes_the_check_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """An option of a command, and one of pytest."""
    original, options = generate.command_line.parser, generate.options.pytest_addoption

    def with_one_more() -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = original()
        subparsers = next(a for a in found._actions if isinstance(a, argparse._SubParsersAction))
        subparsers.choices["kv"].add_argument("--more", type=int, default=3, help="how many more")
        return found

    def added(parser: pytest.Parser) -> None:
        options(parser)
        parser.getgroup("disagg-lab").addoption("--more", action="store_true", help="more")

    for where, name, value in (
        (generate.command_line, "parser", with_one_more),
        (generate.options, "pytest_addoption", added),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(where, name, value)
            assert generate.main(["--check"], folder) == 1
            assert "commands.md" in capsys.readouterr().err


def test_every_command_option_and_target_is_listed(folder: Path) -> None:
    """By their names, with those of pytest and make."""
    page = (folder / "commands.md").read_text()
    for text in ("### disagglab kv", "`--block-size", "`--lab LAB`", "`--max-rounds", "`make lint`"):
        assert text in page
    assert str(ROOT) not in page


class Kinds(BaseModel):
    """Every kind of value."""

    version: str = Field(pattern=r"^\d+\.\d+\.\d+$", description="a [vllm] version")
    one: Literal["", "a"] = Field("", description="--one of ~/x")
    many: list[int] = Field(default=[0, 1], description="some_cores and UCX_TLS, UCX_*")
    free: dict[str, str | int] = Field(default={}, description="any")
    rate: Annotated[float, Unit("1/s")] | None = Field(None, gt=0, lt=1, description="a|b")
    port: int = Field(21000, ge=1024, le=65535, multiple_of=2, description="already `--marked`")
    us: int = Field(0, ge=0, le=1_000_000, description="pause")


def test_types_limits_defaults_and_units() -> None:
    """A row for each kind of key."""
    assert list(generate.keys(Kinds, "", "")) == [
        "| key | type | default | unit | meaning |",
        "| --- | --- | --- | --- | --- |",
        "| `version` | `X.Y.Z` | req | | a `[vllm]` version |",
        '| `one` | `""`, `a` | `""` | | `--one` of `~/x` |',
        "| `many` | list of integers | `[0, 1]` | | `some_cores` and `UCX_TLS`, `UCX_*` |",
        "| `free` | table | `{}` | | any |",
        "| `rate` | number > 0, < 1 | none | 1/s | a\\|b |",
        "| `port` | integer 1024 … 65535 | 21000 | | already `--marked` |",
        "| `us` | integer 0 … 1,000,000 | 0 | | pause |",
    ]


def test_arguments_of_every_form() -> None:
    """Values, choices, defaults, repetitions: what argparse shows, whatever its version."""
    parser = argparse.ArgumentParser(prog="p")
    commands = parser.add_subparsers()
    one = commands.add_parser("one", help="does one", epilog="examples:\n  p one x")
    one.add_argument("file", nargs="+", help="files")
    one.add_argument("--lab", required=True, help="a lab")
    one.add_argument("-n", "--number", type=int, default=5, metavar="N", help="how many (%(default)s)")
    one.add_argument("--kind", choices=["a", "b"], default="a", help="which")
    one.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    assert list(generate.commands(parser, "p")) == [
        "### p one", "", "    p one --lab LAB [OPTIONS] FILE [FILE …]", "", "does one", "",
        "| argument | meaning |", "| --- | --- |",
        "| `FILE [FILE …]` | files |",
        "| `--lab LAB` | a lab (required) |",
        "| `-n`, `--number N` | how many (5) |",
        "| `--kind KIND` | which; one of a, b (default: a) |", "",
        "```", "p one x", "```", "",
    ]  # fmt: skip

"""Every skip says why by a code, and the table of codes has all of them and no other.

The oracle is the source: what calls ``pytest.skip`` or makes a skip marker, and the table of preconditions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from disagglab.config import arms
from disagglab.config.precondition import PRECONDITIONS
from disagglab.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"
SECTION = "## Skipped tests"
CODE = re.compile(r"[A-Z][A-Z0-9]*(?:-[A-Z0-9]+)*")
SKIPS = ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif")
DECIDED_ELSEWHERE = {"reason"}  # a name; its text is a Precondition's or that of Arms


def reasons(source: str) -> Iterator[tuple[int, str]]:
    """Line and beginning of each skip's reason; the source of what is no text."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in SKIPS):
            continue
        given = [word.value for word in node.keywords if word.arg == "reason"] or node.args
        text = given[0].values[0] if isinstance(given[0], ast.JoinedStr) else given[0]
        plain = isinstance(text, ast.Constant) and isinstance(text.value, str)
        yield node.lineno, ast.literal_eval(text) if plain else f"={ast.unparse(text)}"


def code_of(reason: str) -> str | None:
    """The code of a reason of the form ``CODE: sentence``."""
    code, colon, rest = reason.partition(": ")
    return code if colon and CODE.fullmatch(code) and (rest or reason.endswith(": ")) else None


def in_the_code() -> dict[str, str | None]:
    """Codes by the place of their skip."""
    paths = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("disagglab/**/*.py")]
    return {
        f"{path.relative_to(ROOT)}:{line}": code_of(reason)
        for path in paths
        for line, reason in reasons(path.read_text())
        if reason.removeprefix("=") not in DECIDED_ELSEWHERE
    }


def in_the_table(page: str) -> list[str]:
    """Codes of the first column."""
    rows = page.partition(SECTION)[2].partition("\n## ")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| ")][2:]
    return [code.strip() for cell in cells for code in cell.split(",")]


def test_every_skip_has_a_code() -> None:
    """``CODE: sentence``, in tests, fixtures and the plugin."""
    found = in_the_code()
    assert len(found) > 20
    assert not [place for place, code in found.items() if code is None]
    assert all(code_of(one.reason) == one.code for one in PRECONDITIONS.values())


def test_the_table_has_every_code_and_no_other() -> None:
    """What a reader may see is explained, and what is explained can be seen."""
    table = in_the_table(PAGE.read_text())
    assert len(table) == len(set(table))
    assert set(table) == {*in_the_code().values(), *(one.code for one in PRECONDITIONS.values()), arms.CODE}


def test_a_skip_without_a_code_is_found() -> None:
    """The control."""
    source = 'pytest.skip("no GPU here")\npytest.skip(f"NO-GPU: {node} has none")\npytest.skip(text)\n'
    assert [code_of(reason) for _, reason in reasons(source)] == [None, "NO-GPU", None]

"""Pages lead where they say: links, anchors, the index of docs/, paths in code; and the front page is short.

The oracle is the file system, and for anchors the headings as CommonMark reads them, named by GitHub's rule.
Links out of the repository are not followed. Small folders with one kind of mistake show that it is found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from disagglab.paths import ROOT

README_LINES = 120  # two screens
PAGES = ("*.md", "docs/**/*.md", "tests/**/*.md", "reports/README.md", "reports/reference/**/*.md")
# Where a page is named by its path from the repository's root: code, data, lessons (which the report shows).
MENTIONS = (
    *("disagglab/**/*.py", "tests/**/*.py", "tests/**/*.md", "selftest/**/*.py", "conftest.py", "docs/*.py"),
    *("labs/*.toml", "workloads/*.toml", "offline/*", "requirements/*", "Makefile", "pyproject.toml"),
    "reports/reference/*/README.md",
)
_MENTION = re.compile(r"\bdocs/[\w/-]+\.md\b")


def _pages(root: Path) -> list[Path]:
    return sorted({page for pattern in PAGES for page in root.glob(pattern)})


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def _targets(page: Path) -> Iterator[str]:
    """Where the links and pictures of a page lead, code left out."""
    for block in _tokens(page):
        for token in block.children or []:
            target = token.attrGet("href") if token.type == "link_open" else token.attrGet("src")
            if isinstance(target, str) and not re.match(r"[a-z]+:", target):
                yield unquote(target)


def _anchors(page: Path) -> set[str]:
    """Names of a page's headings: lower case, hyphens for spaces, no other signs, repetitions numbered."""
    seen: Counter[str] = Counter()
    names = set()
    tokens = _tokens(page)
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(part.content for part in inline.children or [])
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return names


def _broken_links(root: Path) -> list[str]:
    found = []
    for page in _pages(root):
        for target in _targets(page):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists():
                found.append(f"{page.relative_to(root)}: {target}: no such file")
            elif anchor and anchor not in _anchors(there):
                found.append(f"{page.relative_to(root)}: {target}: no such heading")
    return found


def _not_in_the_index(root: Path) -> list[str]:
    docs = root / "docs"
    index = docs / "README.md"
    listed = {(docs / target.partition("#")[0]).resolve() for target in _targets(index)}
    pages = sorted(set(docs.rglob("*.md")) - listed - {index})
    return [str(page.relative_to(docs)) for page in pages]


def _mentions_of_no_page(root: Path) -> list[str]:
    found = []
    for file in sorted({file for pattern in MENTIONS for file in root.glob(pattern) if file.is_file()}):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for path in _MENTION.findall(line):
                if not (root / path).exists():
                    found.append(f"{file.relative_to(root)}:{number}: {path}")
    return found


def test_every_link_of_a_page_resolves() -> None:
    """Files, folders, pictures and headings that pages link to are there."""
    pages = _pages(ROOT)
    assert len(pages) > 30, f"only {len(pages)} pages found: {pages}"
    broken = _broken_links(ROOT)
    assert not broken, "\n".join(broken)


def test_every_page_of_docs_stands_in_the_index() -> None:
    """docs/README.md links to every page below docs/."""
    missing = _not_in_the_index(ROOT)
    assert not missing, f"docs/README.md leads to none of {missing}"


def test_every_path_of_a_page_in_code_exists() -> None:
    """Messages, docstrings, comments, labs and lessons name pages that are there."""
    wrong = _mentions_of_no_page(ROOT)
    assert not wrong, "\n".join(wrong)


def _labs_of(page: str) -> list[str]:
    """Names in the first column of the table of labs; ``-1p2d`` stands for the
    name before it with that end."""
    found: list[str] = []
    for row in page.splitlines():
        if not row.startswith("| `"):
            continue
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            whole = not name.startswith("-")
            found.append(name if whole else found[-1].rpartition("-")[0] + name)
    return found


def test_every_lab_has_a_row() -> None:
    """docs/reference/labs.md has each file of labs/ once, and no lab that is not there."""
    labs = sorted(file.stem for file in (ROOT / "labs").glob("*.toml"))
    assert sorted(_labs_of((ROOT / "docs" / "reference" / "labs.md").read_text())) == labs


def test_a_lab_without_a_row_is_found() -> None:
    """The control: what a row names, with ends of a name in place of it."""
    page = "| lab | nodes |\n| --- | --- |\n| `two` | `x` |\n| `four-h200-2p2d`, `-1p2d` | 4 |\n"
    assert _labs_of(page) == ["two", "four-h200-2p2d", "four-h200-1p2d"]


def test_the_front_page_fits_two_screens() -> None:
    """README.md has at most 120 lines."""
    lines = len((ROOT / "README.md").read_text().splitlines())
    assert lines <= README_LINES, f"README.md has {lines} lines, {README_LINES} are two screens"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of two pages without a mistake."""
    docs = tmp_path / "docs"
    (docs / "how-to").mkdir(parents=True)
    (docs / "README.md").write_text("# Map\n\n| page |\n| --- |\n| [run](how-to/run.md#a-b-c) |\n")
    (docs / "how-to" / "run.md").write_text("# A `b`, c\n\n```\n[no](link.md)\n```\n[up](../README.md)\n")
    (tmp_path / "labs").mkdir()
    (tmp_path / "labs" / "a.toml").write_text("# docs/how-to/run.md\n")
    assert not _broken_links(tmp_path)
    assert not _not_in_the_index(tmp_path)
    assert not _mentions_of_no_page(tmp_path)
    return tmp_path


def test_a_broken_link_is_found(small: Path) -> None:
    """A page that moved, a picture that is missing, and a heading that was renamed are each named."""
    run = small / "docs" / "how-to" / "run.md"
    run.write_text("# A\n\n[up](../INDEX.md) ![no](no.svg) [here](#b)\n")
    assert _broken_links(small) == [
        "docs/README.md: how-to/run.md#a-b-c: no such heading",
        "docs/how-to/run.md: ../INDEX.md: no such file",
        "docs/how-to/run.md: no.svg: no such file",
        "docs/how-to/run.md: #b: no such heading",
    ]


def test_a_page_outside_the_index_is_found(small: Path) -> None:
    """A page that no line of the index links to is named, although another page links to it."""
    (small / "docs" / "how-to" / "new.md").write_text("# New\n")
    (small / "docs" / "how-to" / "run.md").write_text("# A b c\n\n[new](new.md)\n")
    assert _not_in_the_index(small) == ["how-to/new.md"]


def test_a_mention_of_no_page_is_found(small: Path) -> None:
    """A comment that names a page by a path of old is named with its line."""
    (small / "labs" / "a.toml").write_text("\n# docs/" + "run.md has the rest\n")
    assert _mentions_of_no_page(small) == ["labs/a.toml:2: docs/" + "run.md"]

"""Figures, shares and tables as people read them. Oracle: lines written by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from disagglab import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.000_123_45, "0.000123"),
        (0.012_346, "0.01235"),
        (1.5, "1.5"),
        (7.0, "7"),
        (123.456, "123.5"),
        (12_345.6, "12,346"),
        (1e9, "1,000,000,000"),
    ],
)
def test_a_figure_has_four_digits_and_no_large_exponent(value: float, shown: str) -> None:
    assert text.number(value) == shown


def test_shares_are_signed_percent() -> None:
    """The limit that an interval does not have is told in a word, a margin has no sign of its own."""
    assert text.percent(0.0316) == "+3.2 %"
    assert text.interval(-0.25, -0.5, float("inf")) == "-25.0 % [-50.0 %, unbounded]"
    assert text.margin(0.04) == "±4.0 %"
    assert text.margin(None) == "none"


@pytest.mark.parametrize(
    ("width", "end", "shown"),
    [
        (9, False, "abcdefghi"),
        (8, False, "abcd…ghi"),
        (8, True, "abcdefg…"),
        (2, False, "a…"),
        (1, True, "…"),
        (0, False, ""),
        (-3, True, ""),
    ],
)
def test_a_line_is_shortened_to_a_width(width: int, end: bool, shown: str) -> None:
    """The middle goes, or the end; what fits stays whole, and nothing is wider than was asked."""
    assert text.shortened("abcdefghi", width, end) == shown


def test_columns_are_aligned() -> None:
    """Words begin below each other and numbers end so; an empty last cell leaves no space behind."""
    rows = [("arm", "tokens", "note"), ("single", "1,024", ""), ("r", "16", "[+1.0 %, +2.0 %] → b")]
    assert text.table(rows, right={1}) == [
        "arm     tokens  note",
        "single   1,024",
        "r           16  [+1.0 %, +2.0 %] → b",
    ]
    assert text.table(rows)[1] == "single  1,024"


def test_a_table_may_be_empty() -> None:
    assert text.table([]) == []
    assert text.column([]) == []


def test_rows_of_unequal_length_are_an_error() -> None:
    """A cell that is missing would move the others below a wrong head."""
    with pytest.raises(ValueError, match="zip"):
        text.table([("a", "b"), ("c",)])


def test_words_load_nothing() -> None:
    """The commands that only do arithmetic print with it, and start in a tenth of a second."""
    program = (
        "import sys; before = set(sys.modules); import disagglab.text; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert {name.split(".")[0] for name in done.stdout.split()} <= {"disagglab", "collections", "__future__"}

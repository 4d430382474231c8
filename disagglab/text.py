"""Words and numbers for people: one way to write a figure, a share, its interval, and a table of lines.

A table is plain text, the same on a terminal, in a file and for grep. rich would make one, too, but loading
it nearly doubles the time of ``disagglab kv``, and what stands in square brackets is markup to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

BETWEEN = "  "  # two columns
LEFT_OUT = "…"


def number(value: float) -> str:
    """A figure with four significant digits, large ones with separators and no exponent."""
    if value != 0 and abs(value) < 0.001:
        return f"{value:.3g}"
    if abs(value) >= 10_000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A relative difference as signed percent; an interval without limit reads ``unbounded``."""
    return "unbounded" if value > 1e4 else f"{100 * value:+.1f} %"


def interval(value: float, low: float, high: float) -> str:
    """A relative difference and the limits of its interval."""
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


def margin(value: float | None) -> str:
    """A relative difference to either side; ``none`` if there is no such figure."""
    return "none" if value is None else percent(value).replace("+", "±")


def shortened(line: str, width: int, end: bool = False) -> str:
    """A line of at most so many columns: the middle of a longer one is left out, or its end."""
    if len(line) <= width:
        return line
    kept = max(width - len(LEFT_OUT), 0)
    tail = 0 if end else kept // 2
    return (line[: kept - tail] + LEFT_OUT + line[len(line) - tail :])[: max(width, 0)]


def column(cells: Iterable[str], right: bool = False) -> list[str]:
    """Cells padded to the widest of them."""
    found = list(cells)
    width = max(map(len, found), default=0)
    return [cell.rjust(width) if right else cell.ljust(width) for cell in found]


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of equal length as lines with aligned columns, without space at their ends.

    Args:
        right: the columns, counted from 0, whose cells end below each other, as numbers should.
    """
    columns = [column(cells, n in right) for n, cells in enumerate(zip(*rows, strict=True))]
    return [BETWEEN.join(row).rstrip() for row in zip(*columns, strict=True)]

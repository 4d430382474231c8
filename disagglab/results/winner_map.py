"""Who wins for which promise: a frontier compared again for a grid of limits, from the kept requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from disagglab import text
from disagglab.results.dominance import Stretch, stretches
from disagglab.results.frontier import Frontier
from disagglab.results.promise import KINDS, Promise, limit_text
from disagglab.results.standing import USUAL, Place, Terms, standings

FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # on the limits of the promise, about a square root of two apart
NOBODY = "-"


@dataclass(frozen=True)
class Cell:
    """One promise, and who is ahead at which rates."""

    promise: Promise
    stretches: tuple[Stretch, ...]

    def winner_at(self, rate_per_s: float) -> str | None:
        """The way that is ahead at a rate; None if none is."""
        return next((one.winner for one in self.stretches if rate_per_s in one.rates), None)

    @property
    def said(self) -> str:
        """The winners with their rates, 1/s; a dash where no way is ahead at any."""
        parts = []
        for one in self.stretches:
            if one.place is Place.AHEAD:
                ends = dict.fromkeys(text.number(rate) for rate in (one.rates[0], one.rates[-1]))
                parts.append(f"{one.winner} {'-'.join(ends)}/s")
        return ", ".join(parts) or NOBODY


def axis_of(promise: Promise) -> str | None:
    """Which limit the columns change: that on TPOT, else on ITL; None if neither is promised."""
    return next((name for name in ("tpot_s", "itl_s") if getattr(promise, name) is not None), None)


def grid(promise: Promise, factors: Sequence[float] = FACTORS) -> list[list[Promise]]:
    """Promises around one: a row for each TTFT limit, in it every limit of :func:`axis_of`."""
    axis = axis_of(promise)
    columns = (
        [promise]
        if axis is None
        else [replace(promise, **{axis: f * getattr(promise, axis)}) for f in factors]
    )
    if promise.ttft_s is None:
        return [columns]
    return [[replace(one, ttft_s=factor * promise.ttft_s) for one in columns] for factor in factors]


def winner_map(
    frontier: Frontier, promises: Sequence[Sequence[Promise]] | None = None, terms: Terms = USUAL
) -> list[list[Cell]]:
    """A cell for each promise of :func:`grid`, or of the rows that are given.

    Every band is of one promise at one rate: of many cells some will be wrong, as of many looks.
    """
    rows = promises or grid(frontier.promise)
    return [
        [Cell(one, stretches(standings(frontier.promising(one), terms=terms))) for one in row] for row in rows
    ]


def lines(cells: Sequence[Sequence[Cell]], promise: Promise) -> list[str]:
    """The map as a text table: TTFT limits down, the other limits across; one line where nobody wins."""
    every = [cell for row in cells for cell in row]
    if all(cell.said == NOBODY for cell in every):
        return [f"no way is ahead at any rate under any of {len(every)} promises"]
    axis = axis_of(promise)
    head = ["TTFT <=" if promise.ttft_s is not None else ""]
    head += [f"{KINDS[axis]} <= {limit_text(getattr(c.promise, axis))}" if axis else "" for c in cells[0]]
    rows = [[_limit(row[0].promise.ttft_s), *(cell.said for cell in row)] for row in cells]
    return ["who is ahead, by promise, at which requests/s:", *text.table([head, *rows])]


def _limit(limit_s: float | None) -> str:
    return "any" if limit_s is None else limit_text(limit_s)

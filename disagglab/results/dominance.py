"""Which way wins at which load: neighbouring rates of one answer, and what is said of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from disagglab import text
from disagglab.results.frontier import Frontier
from disagglab.results.standing import USUAL, Figure, Place, Standing, Terms, goodput, standings

USEFUL = 0.9  # share of good requests below which a way that is ahead keeps no promise either


@dataclass(frozen=True)
class Stretch:
    """Neighbouring rates at which the same is seen. ``winner``: the way that is ahead of all other kinds
    there; None where none is. ``standings``: one a rate: of the winner, else of the arm with the best mean.
    """

    winner: str | None
    place: Place
    standings: tuple[Standing, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """1/s, ascending."""
        return tuple(one.rate_per_s for one in self.standings)

    @property
    def at(self) -> str:
        """The rates in words."""
        rates = self.rates
        if len(rates) == 1:
            return f"at {text.number(rates[0])} requests/s"
        return f"between {text.number(rates[0])} and {text.number(rates[-1])} requests/s ({len(rates)} rates)"


def leaders(found: Iterable[Standing]) -> tuple[Standing, ...]:
    """One standing a rate: of the arms that are ahead, else of all, the one with the largest ratio.

    Arms of one kind may both be ahead of all other kinds; against the same rivals, the largest ratio is the
    largest mean.
    """
    by_rate: dict[float, list[Standing]] = {}
    for one in found:
        by_rate.setdefault(one.rate_per_s, []).append(one)
    return tuple(
        max(here, key=lambda one: (one.place is Place.AHEAD, one.ratio))
        for _, here in sorted(by_rate.items())
    )


def stretches(found: Iterable[Standing]) -> tuple[Stretch, ...]:
    """The whole range of rates in stretches, ascending."""

    def answer(one: Standing) -> tuple[str, Place]:
        place = one.place if one.place in (Place.AHEAD, Place.LEVEL) else Place.OPEN
        return (one.arm if place is Place.AHEAD else "", place)

    return tuple(
        Stretch(arm or None, place, tuple(group))
        for (arm, place), group in itertools.groupby(leaders(found), key=answer)
    )


def words(frontier: Frontier, figure: Figure | None = None, terms: Terms = USUAL) -> list[str]:
    """One line a stretch: rates, promise, winner, how many times the figure of the best other way, limits.

    Raises:
        InvalidRun: see :func:`.standing.standings`.
    """
    asked = figure or goodput(frontier)
    found = standings(frontier, asked, terms)
    if not found:
        return ["nothing to compare: fewer than two kinds of ways have runs at the same rate"]
    under = f" at {asked.under}" if asked.under else ""
    return [f"{one.at}{under}: {_said(one, asked, terms.margin)}" for one in stretches(found)]


def _said(stretch: Stretch, figure: Figure, margin: float) -> str:
    rows = stretch.standings
    others = _named(rows, lambda one: one.best)
    low, high = min(one.low for one in rows), max(one.high for one in rows)
    limits = f"95 % limits of each rate within {_range(low, high)}"
    compared = (
        f"times the {figure.name} of" if figure.better == "higher" else f"times less {figure.name} than"
    )
    parts: list[str]
    if stretch.winner is not None:
        ratios = _range(min(one.ratio for one in rows), max(one.ratio for one in rows))
        parts = [f"{stretch.winner}, {ratios} {compared} {others} (the best other)", limits]
        least = min(one.good_share for one in rows)
        if figure.under and least < USEFUL:
            parts.append(f"as few as {100 * least:.0f} % of its requests are good")
    elif stretch.place is Place.LEVEL:
        parts = [f"level within {100 * margin:g} %: {_named(rows, lambda one: one.arm)} and {others}"]
    else:
        each = [f"{one.arm} {one.ratio:.2f} {compared} {one.best}" for one in rows]
        parts = [f"not told apart: {', '.join(each)}"]
        parts.append(limits if math.isfinite(high) else "one round has no band")
    absent = dict.fromkeys(name for one in rows for name in one.absent)
    return "; ".join([*parts, *([f"not measured there: {', '.join(absent)}"] if absent else [])])


def _named(rows: Sequence[Standing], of: Callable[[Standing], str]) -> str:
    return " or ".join(dict.fromkeys(map(of, rows)))


def _range(low: float, high: float) -> str:
    first, last = f"{low:.2f}", f"{high:.2f}"
    return first if first == last else f"{first} to {last}"

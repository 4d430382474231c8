"""Figures as small SVG text."""

from __future__ import annotations

import io
import re

from disagglab.results.records import Plot

SIZE_INCHES = (6.4, 3.2)
POINTS, LINE, BARE = ({"linestyle": s, "marker": m} for s, m in (("", "o"), ("-", "o"), ("-", "")))
UP, DOWN = ({"linestyle": "", "marker": marker} for marker in "^v")
SPREAD, LEVEL = (BARE | {"color": grey} for grey in ("0.75", "0.25"))
# Styles of the series by place; the last one holds for all that follow.
STYLES = {
    "points": (POINTS,),
    "line": (LINE,),
    "points over lines": (POINTS, BARE),
    "points over spread and level": (SPREAD, LEVEL, POINTS),
    "curves": (BARE,),
    "map": (BARE, UP, DOWN, POINTS),
}
LOGARITHMIC = {"curves", "map"}  # both axes
PAIRED = "points and their lines"  # in turns, in one colour; an odd last series is a level
ROUNDS = "rounds and their means"  # the same, and the key names the lines alone
ROUNDS_UP = "rounds and their means, y logarithmic"
WINNERS = "marks beside grey ones"  # the first series is grey
MARKER_SIZE = 4


def render(plot: Plot) -> str:
    """The figure as an ``<svg>`` element.

    Raises:
        ValueError: if the style is unknown or a series has unequal lengths.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "disagglab"}):
        figure, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
        for number, (label, (xs, ys)) in enumerate(plot.series.items()):
            if len(xs) != len(ys):
                raise ValueError(f"{plot.title}: series {label} has {len(xs)} x and {len(ys)} y values")
            if plot.style == "bars":
                width = 0.8 / len(plot.series)
                axes.bar([x + number * width for x in xs], ys, width, label=label)
            elif plot.style == WINNERS:
                style = POINTS | {"color": f"C{number - 1}" if number else "0.8"}
                axes.plot(xs, ys, label=label, markersize=MARKER_SIZE, **style)  # type: ignore[arg-type]
            elif plot.style in (PAIRED, ROUNDS, ROUNDS_UP):
                named = plot.style == PAIRED or number % 2
                label = label if named else f"_{label}"  # matplotlib leaves it out of the key
                style = (POINTS, BARE)[number % 2] | {"color": f"C{number // 2}"}
                if len(plot.series) % 2 and number == len(plot.series) - 1:
                    style = LEVEL
                axes.plot(xs, ys, label=label, markersize=MARKER_SIZE, **style)  # type: ignore[arg-type]
            elif plot.style in STYLES:
                style = STYLES[plot.style][: number + 1][-1]
                axes.plot(xs, ys, label=label, markersize=MARKER_SIZE, **style)  # type: ignore[arg-type]
            else:
                raise ValueError(f"{plot.title}: no plot style {plot.style}")
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
        if plot.style in LOGARITHMIC:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
        elif plot.style == ROUNDS_UP:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        if plot.ticks:
            axes.set_xticks(range(len(plot.ticks)), plot.ticks)
        axes.grid(alpha=0.3)
        if len(plot.series) > 1:
            axes.legend(fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)

"""The page of a history: a chart of each series, its change points, and the sessions behind it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from disagglab.errors import ConfigError, Problem
from disagglab.results import plot, report
from disagglab.results.archive import NOT_RECORDED, Archive, HistoryRun, reason
from disagglab.results.history import Series, change_text, summary
from disagglab.results.records import Plot
from disagglab.stats.changepoint import MIN_SIDE, MIN_VALUES, ChangePoint, segments

NAME = "history.html"
JOINED = "different fingerprints joined on request"
MOST_TICKS = 20


def render(
    archive: Archive, found: Sequence[Series], across_fingerprints: bool = False, left_out: int = 0
) -> str:
    """The whole HTML page: fingerprints, then charts and runs of each group of series.

    Args:
        left_out: how many series are not shown, because no gate compares them.
    """
    groups: dict[tuple[str, ...], list[Series]] = {}
    for series in found:
        groups.setdefault(series.group, []).append(series)
    shown = {point.run.run_id: point.run for series in found for point in series.points}
    return report.template("history.html").render(
        css=report.CSS.read_text(),
        summary="; ".join(summary(archive, found, left_out)),
        problems=archive.problems,
        joined=JOINED if across_fingerprints else "",
        fingerprints=_fingerprints([shown[run_id] for run_id in sorted(shown)]),
        groups=[_group_facts(group) for group in groups.values()],
        min_side=MIN_SIDE,
        min_runs=MIN_VALUES,
    )


def _fingerprints(runs: Sequence[HistoryRun]) -> Mapping[str, Any]:
    """The fingerprints of these sessions, and the rows in which they differ."""
    by_key: dict[str, list[HistoryRun]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    facts = [of[0].fingerprint for of in by_key.values()]
    names = dict.fromkeys(name for one in facts for name in one)
    cells = {name: [one.get(name, NOT_RECORDED) for one in facts] for name in names}
    return {
        "groups": [
            {"key": key, "runs": len(of), "first": of[0].run_id, "last": of[-1].run_id}
            for key, of in by_key.items()
        ],
        "differing": {name: row for name, row in cells.items() if len(set(row)) > 1},
        "common": {name: row[0] for name, row in cells.items() if len(set(row)) == 1},
    }


def _group_facts(group: Sequence[Series]) -> Mapping[str, Any]:
    keys = tuple(dict.fromkeys(key for series in group for key in series.keys))
    runs = {point.run.run_id: point.run for series in group for point in series.points}
    numbers = {run_id: number for number, run_id in enumerate(sorted(runs))}
    return {
        "lab": group[0].lab,
        "model": group[0].model,
        "keys": keys,
        "joined": JOINED if len(keys) > 1 else "",
        "runs": [{"number": number + 1, "run": runs[run_id]} for run_id, number in numbers.items()],
        "series": [
            {
                "series": series,
                "first": series.medians[0],
                "last": series.medians[-1],
                "changes": [_change_facts(series, change) for change in series.changes],
                # one point makes no chart, and a chart takes a tenth of a second
                "svg": plot.render(_chart(series, numbers)) if len(series.points) > 1 else "",
            }
            for series in group
        ],
    }


def _change_facts(series: Series, change: ChangePoint) -> Mapping[str, Any]:
    """A change point with what else differs between the run before it and the first of the new level."""
    before, after = (series.points[index].run for index in (change.index - 1, change.index))
    named: dict[str, Callable[[HistoryRun], str]] = {
        "commit": lambda run: run.commit,
        "lab file": lambda run: run.lab_file,
        "fingerprint": lambda run: run.key,
    }
    return {
        "text": change_text(series, change),
        "outcome": series.outcome(change),
        "differing": [
            f"{name} {of(before)} → {of(after)}" for name, of in named.items() if of(before) != of(after)
        ],
    }


def _chart(series: Series, numbers: Mapping[str, int]) -> Plot:
    """Medians as points, over the spread of their rounds and the level of each segment.

    The level of a series that was not judged is one line, unless a median is 0.
    """
    xs = [float(numbers[point.run.run_id]) for point in series.points]
    spread_x, spread_y = [], []
    for x, point in zip(xs, series.points, strict=True):
        spread_x += [x, x, math.nan]  # the gap ends the stroke
        spread_y += [min(point.values), max(point.values), math.nan]
    level_x: list[float] = []
    level_y: list[float] = []
    indices = [change.index for change in series.changes]
    for segment in segments(series.medians, indices) if all(series.medians) else []:
        start, stop = segment.start, segment.stop
        level_x.append((xs[start - 1] + xs[start]) / 2 if start else xs[0])
        level_x.append((xs[stop - 1] + xs[stop]) / 2 if stop < len(xs) else xs[-1])
        level_y += [segment.level, segment.level]
    drawn = {
        "rounds, lowest to highest": (tuple(spread_x), tuple(spread_y)),
        "level": (tuple(level_x), tuple(level_y)),
    }
    for key in series.keys:
        own = [(x, p.median) for x, p in zip(xs, series.points, strict=True) if p.run.key == key]
        label = "median of a run" if len(series.keys) == 1 else f"fingerprint {key}"
        drawn[label] = (tuple(x for x, _ in own), tuple(y for _, y in own))
    step = math.ceil(len(numbers) / MOST_TICKS)
    return Plot(
        module="history",
        title=f"{series.workload}, {series.arm}: {series.metric}",
        x_label="run, by its number in the table of runs",
        y_label=series.unit,
        series=drawn,
        style="points over spread and level",
        ticks=tuple(str(n + 1) if n % step == 0 else "" for n in range(len(numbers))),
    )


def write(path: Path, text: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: if the folder is missing or refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        problem = Problem(str(path), "--html", reason(error), "name a file in a folder that can be written")
        raise ConfigError([problem]) from error

"""Figures over many sessions: a series of run medians for each figure, with the points where its level
changed.

A point is one session (its run folder). Sessions of different fingerprints, which means other hardware or
other package versions, are never in one series unless the caller joins them; neither are two of which one has
an incomplete fingerprint, because nobody knows on which GPUs it ran.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from disagglab import text
from disagglab.errors import ConfigError, Problem
from disagglab.results.archive import Archive, HistoryRun
from disagglab.stats.changepoint import MIN_VALUES, ChangePoint, find
from disagglab.stats.metric import Direction

HEADER = ("arm", "runs", "first", "last", "last change point")
NUMBERS = (1, 2, 3)  # columns of it
OF_FIGURE, OF_ARM = "  ", "    "  # indents: of a figure below its lab, of an arm below its figure
DATE_DIGITS = 8  # of a run's id
NARROWEST = 8  # to which a name is shortened


@dataclass(frozen=True)
class SessionValues:
    """One session's values of a series, one a valid round."""

    run: HistoryRun
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The session's value."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Series:
    """One figure over sessions, oldest first, with its confirmed change points.

    ``group``: what the series of one section of the page have in common. ``keys``: fingerprints, in order of
    appearance; several only where the caller joined them. ``not_judged``: why no change point was looked for;
    empty where it was.
    """

    group: tuple[str, ...]
    lab: str
    model: str
    keys: tuple[str, ...]
    workload: str
    arm: str
    metric: str
    unit: str
    better: Direction
    points: tuple[SessionValues, ...] = ()
    changes: tuple[ChangePoint, ...] = ()
    not_judged: str = ""

    @property
    def medians(self) -> list[float]:
        """One value a session."""
        return [point.median for point in self.points]

    @property
    def newest(self) -> HistoryRun:
        """Its last session."""
        return self.points[-1].run

    @property
    def gated(self) -> bool:
        """Whether a gate of the last session's lab file compares it."""
        return (self.workload, self.arm, self.metric) in self.newest.gated

    @property
    def rounds(self) -> str:
        """How many rounds the sessions had."""
        counts = [len(point.values) for point in self.points]
        return text.number(min(counts)) + (f" to {max(counts)}" if max(counts) > min(counts) else "")

    def outcome(self, change: ChangePoint) -> str:
        """``better`` or ``worse``."""
        return "better" if (change.change > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Filters:
    """Names to keep, by column; an empty tuple keeps all."""

    lab: tuple[str, ...] = ()
    workload: tuple[str, ...] = ()
    arm: tuple[str, ...] = ()
    metric: tuple[str, ...] = ()


def collect(
    runs: Sequence[HistoryRun], filters: Filters | None = None, across_fingerprints: bool = False
) -> list[Series]:
    """The series of these sessions, judged: the newest session's first, those of one lab and figure together.

    Raises:
        ConfigError: if a filter leaves nothing of what there is, naming what there is.
    """
    found: dict[tuple[str, ...], Series] = {}
    for run in runs:
        for f in run.figures:
            group = (run.lab, run.model) if across_fingerprints else (run.lab, run.model, run.identity)
            name = (*group, f.workload, f.definition, f.arm, f.metric, f.unit, f.better)
            series = found.get(name) or Series(
                group, run.lab, run.model, (), f.workload, f.arm, f.metric, f.unit, f.better
            )
            found[name] = replace(
                series,
                keys=tuple(dict.fromkeys([*series.keys, run.key])),
                points=(*series.points, SessionValues(run, f.values)),
            )
    kept = _filtered(list(found.values()), filters or Filters())
    kept.sort(key=lambda series: series.newest.run_id, reverse=True)  # stable: in a session as it wrote them
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[Series]]] = {}
    for series in kept:
        of_group = groups.setdefault(series.group, {})
        of_group.setdefault((series.workload, series.metric), []).append(series)
    return [_judged(series) for figures in groups.values() for arms in figures.values() for series in arms]


def _filtered(found: list[Series], filters: Filters) -> list[Series]:
    for column, names in vars(filters).items():
        if not names or not found:
            continue
        there = sorted({getattr(series, column) for series in found})
        absent = [name for name in names if name not in there]
        if absent:
            problem = Problem(
                f"--{column}",
                ", ".join(absent),
                "no series has it",
                f"there {'is' if len(there) == 1 else 'are'}: {', '.join(there)}",
            )
            raise ConfigError([problem])
        found = [series for series in found if getattr(series, column) in names]
    return found


def _judged(series: Series) -> Series:
    medians = series.medians
    count = len(medians)
    if count < MIN_VALUES:
        return replace(series, not_judged=f"too few runs ({count} of {MIN_VALUES})")
    zeros = medians.count(0)
    if zeros:
        return replace(series, not_judged=f"not judged: the median is 0 in {_count(zeros, 'run')}")
    return replace(series, changes=find(medians))


def change_text(series: Series, change: ChangePoint) -> str:
    """A change point as text: the first run of the new level, both levels, ratio - 1, outcome, p."""
    run_id = series.points[change.index].run.run_id
    levels = f"{text.number(change.before)} → {text.number(change.after)}"
    effect = f"{text.percent(change.change)} ({series.outcome(change)})"
    return f"{run_id}: {levels}, {effect}, p {change.p:.2g}"


def lines(found: Sequence[Series], width: int) -> list[str]:
    """The series as plain text, one line each below their lab and figure, none wider than ``width`` columns
    as long as numbers fit: names and change points are shortened, numbers never.
    """
    if not found:
        return []
    rows = [HEADER, *map(_row, found)]
    others = sum(max(len(row[n]) for row in rows) + len(text.BETWEEN) for n in NUMBERS) + len(OF_ARM)
    room = width - others - len(text.BETWEEN)
    arms = min(max(len(row[0]) for row in rows), max(room // 2, NARROWEST))
    cut = [
        (text.shortened(row[0], arms), *row[1:-1], text.shortened(row[-1], room - arms, end=True))
        for row in rows
    ]
    head, *below = (OF_ARM + line for line in text.table(cut, NUMBERS))
    told = [head]
    lab: tuple[str, ...] = ()
    figure: tuple[str, ...] = ()
    for series, line in zip(found, below, strict=True):
        if lab != series.group:
            lab, figure = series.group, ()
            told.append(_lab_line(series, width))
        if figure != (series.workload, series.metric):
            figure = (series.workload, series.metric)
            told.append(_figure_line(series, width))
        told.append(line)
    return told


def _row(series: Series) -> tuple[str, ...]:
    medians = series.medians
    ends = text.number(medians[0]), text.number(medians[-1])
    last = _short_change(series, series.changes[-1]) if series.changes else "none"
    return series.arm, str(len(medians)), *ends, series.not_judged or last


def _short_change(series: Series, change: ChangePoint) -> str:
    """What happened first, because a narrow terminal shows the beginning; levels and p are in the page."""
    run_id = series.points[change.index].run.run_id
    return f"{text.percent(change.change)} {series.outcome(change)} at {run_id}"


def _lab_line(series: Series, width: int) -> str:
    """Lab, model, fingerprint, last session of a group; where room lacks, its date, and less of the model."""
    keys, last = "+".join(series.keys), series.newest.run_id
    line = f"{series.lab}, {series.model}, {keys}, last {last}"
    if len(line) > width:
        end = f", {keys}, last {last[:DATE_DIGITS]}"
        room = width - len(series.lab) - len(", ") - len(end)
        line = f"{series.lab}, {text.shortened(series.model, max(room, NARROWEST))}{end}"
    return text.shortened(line, width, end=True)


def _figure_line(series: Series, width: int) -> str:
    """Workload, metric and unit; the workload's name is shortened first."""
    end = f": {series.metric}, {series.unit}"
    room = width - len(OF_FIGURE) - len(end)
    line = f"{OF_FIGURE}{text.shortened(series.workload, max(room, NARROWEST))}{end}"
    return text.shortened(line, width, end=True)


def summary(archive: Archive, found: Sequence[Series], left_out: int = 0) -> list[str]:
    """Two lines: what was read and passed over; how many series changed, and how many were left out."""
    changed = sum(bool(series.changes) for series in found)
    more = f"; {left_out:,} more with --all" if left_out else ""
    return [
        f"{_count(len(archive.runs), 'run')} with figures, {archive.passed_over} without, passed over",
        f"{len(found)} series, {changed} with a change point{more}",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

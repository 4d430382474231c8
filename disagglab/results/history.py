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

HEADER = (
    *("lab", "model", "fingerprint", "workload", "arm", "metric", "unit", "runs", "rounds"),
    *("first", "last", "last change point"),
)


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
    """The series of these sessions, judged, in the order in which they first appear.

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
    groups = list(dict.fromkeys(series.group for series in kept))
    return [_judged(series) for series in sorted(kept, key=lambda series: groups.index(series.group))]


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


def lines(found: Sequence[Series]) -> list[str]:
    """The series as a plain text table, one line each."""
    rows: list[Sequence[str]] = [HEADER]
    for series in found:
        medians = series.medians
        last = change_text(series, series.changes[-1]) if series.changes else "none"
        rows.append(
            (
                *(series.lab, series.model, "+".join(series.keys)),
                *(series.workload, series.arm, series.metric, series.unit),
                *(str(len(medians)), series.rounds, text.number(medians[0]), text.number(medians[-1])),
                series.not_judged or last,
            )
        )
    return text.table(rows)


def summary(archive: Archive, found: Sequence[Series]) -> str:
    """One line: what was read, what was passed over, how many series changed."""
    changed = sum(bool(series.changes) for series in found)
    return (
        f"{_count(len(archive.runs), 'run')} with figures, {archive.passed_over} without, passed over; "
        f"{len(found)} series, {changed} with a change point"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

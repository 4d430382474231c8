"""Figures over many sessions: a series of run medians for each figure, with the points where its level
changed.

A point is one session (its run folder). Sessions of different fingerprints, which means other hardware or
other package versions, are never in one series unless the caller joins them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from disagglab import plot, report
from disagglab.changepoint import MIN_SIDE, MIN_VALUES, ChangePoint, find, segments
from disagglab.errors import ConfigError, Problem
from disagglab.store import Plot
from disagglab.verdict import Direction

RUN_ID = re.compile(r"\d{8}-\d{6}")
META, FIGURES, PAGE, COMMITTED = "run.json", "figures.jsonl", "history.html", "reference"
JOINED = "different fingerprints joined on request"
NOT_RECORDED = "not recorded"
LAB_FILE_DIGITS = 8
MOST_TICKS = 20
HEADER = (
    *("lab", "model", "fingerprint", "workload", "arm", "metric", "unit", "runs", "rounds"),
    *("first", "last", "last change point"),
)


@dataclass(frozen=True)
class Figure:
    """One figure of one arm in one session: ``values`` has one a valid round, in ``unit``. ``definition``:
    a hash of the workload's settings; empty where it was not recorded.
    """

    workload: str
    arm: str
    metric: str
    unit: str
    better: Direction
    values: tuple[float, ...]
    definition: str = ""


@dataclass(frozen=True)
class HistoryRun:
    """One session as its folder tells it.

    ``fingerprint``: name → value, with a package's version as ``versions.NAME``. ``lab_file``: a short hash
    of the lab file's text. ``copy_gb_per_s``: the speed probe before the session, None where there was none.
    """

    run_id: str
    lab: str
    model: str
    commit: str
    command: str
    lab_file: str
    key: str
    fingerprint: Mapping[str, str]
    copy_gb_per_s: float | None
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Archive:
    """What a reports folder holds. ``passed_over``: sessions without figures. ``problems``: what could not
    be read and is left out.
    """

    runs: tuple[HistoryRun, ...]
    passed_over: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Point:
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
    points: tuple[Point, ...] = ()
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
        return report.number(min(counts)) + (f" to {max(counts)}" if max(counts) > min(counts) else "")

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


def read(reports: Path) -> Archive:
    """All sessions of a reports folder and of its ``reference`` folder, oldest first.

    A session without ``figures.jsonl`` is counted and passed over. One whose ``run.json`` cannot be read is
    left out, and so is a line of figures that is malformed; both are among the problems. A session that is
    in both folders counts once.

    Raises:
        ConfigError: if there is no such folder.
    """
    if not reports.is_dir():
        problem = Problem(str(reports), "--reports", "no such folder", "name the folder of the run folders")
        raise ConfigError([problem])
    found = {path.name: path for path in [*_run_folders(reports / COMMITTED), *_run_folders(reports)]}
    runs, problems, passed_over = [], [], 0
    for run_id in sorted(found):
        folder = found[run_id]
        try:
            meta = _meta(folder / META)
            if (folder / FIGURES).exists():
                figures, bad = _figures(folder / FIGURES)
                problems += bad
                runs.append(_run(run_id, folder / META, meta, figures))
            else:
                passed_over += 1
        except ConfigError as error:
            problems += error.problems
    return Archive(tuple(runs), passed_over, tuple(problems))


def _run_folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [path for path in parent.iterdir() if RUN_ID.match(path.name) and path.is_dir()]


def _meta(path: Path) -> Mapping[str, Any]:
    """The session's ``run.json``; a session that was killed before it wrote one and has no figures has
    nothing to tell.
    """
    mend = "mend the file, or move the run folder away"
    if not path.exists() and not (path.parent / FIGURES).exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([Problem(str(path), "(whole file)", _reason(error), mend)]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([Problem(str(path), "(whole file)", f"not JSON: {error}", mend)]) from error
    if not isinstance(raw, Mapping):
        raise ConfigError([Problem(str(path), "(whole file)", "not an object", mend)])
    return raw


def _reason(error: OSError) -> str:
    return str(error.strerror or error)


def _run(run_id: str, path: Path, meta: Mapping[str, Any], figures: Sequence[Figure]) -> HistoryRun:
    facts = meta.get("fingerprint")
    facts = facts if isinstance(facts, Mapping) else {}
    named = {"lab": meta.get("lab"), "model": meta.get("model"), "fingerprint.key": facts.get("key")}
    missing = [
        Problem(str(path), key, "missing, or no text", "a session writes it; move the run folder away")
        for key, value in named.items()
        if not isinstance(value, str) or not value
    ]
    if missing:
        raise ConfigError(missing)
    text = meta.get("lab_file")
    return HistoryRun(
        run_id=run_id,
        lab=str(named["lab"]),
        model=str(named["model"]),
        commit=str(meta.get("commit", NOT_RECORDED)),
        command=str(meta.get("command", NOT_RECORDED)),
        lab_file=hashlib.sha256(text.encode(errors="replace")).hexdigest()[:LAB_FILE_DIGITS]
        if isinstance(text, str)
        else NOT_RECORDED,
        key=str(named["fingerprint.key"]),
        fingerprint=dict(_flat({key: value for key, value in facts.items() if key != "key"})),
        copy_gb_per_s=_copy_speed(meta.get("speed")),
        figures=tuple(figures),
    )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _copy_speed(speed: Any) -> float | None:
    before = speed.get("before") if isinstance(speed, Mapping) else None
    value = before.get("copy_gb_per_s") if isinstance(before, Mapping) else None
    return float(value) if value is not None and _is_figure(value) else None


def _figures(path: Path) -> tuple[list[Figure], list[Problem]]:
    """The figures of a session, and what is wrong with the lines that are left out."""
    figures: dict[tuple[str, str, str], Figure] = {}
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        wrong = _reason(error) if isinstance(error, OSError) else f"not UTF-8: {error}"
        return [], [Problem(str(path), "(whole file)", wrong, "mend the file, or move the run folder away")]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            figure = _figure(line)
            name = (figure.workload, figure.arm, figure.metric)
            if name in figures:
                raise ValueError("repeats a figure of a line above")
        except (ValueError, RecursionError) as error:
            problems.append(Problem(str(path), f"line {number}", str(error), "mend or delete the line"))
            continue
        figures[name] = figure
    return [figure for figure in figures.values() if figure.values], problems


def _figure(line: str) -> Figure:
    """One line of ``figures.jsonl``; keys that are not asked for are ignored.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise ValueError("not an object")
    texts: dict[str, Any] = {key: raw.get(key) for key in ("workload", "arm", "metric", "unit")}
    for key, text in texts.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{key}: missing, or no text")
    better: Any = raw.get("better")
    if better not in get_args(Direction):
        raise ValueError(f'better: {better!r:.60} is neither "lower" nor "higher"')
    values = raw.get("values")
    if not isinstance(values, list) or not all(map(_is_figure, values)):
        raise ValueError(f"values: {values!r:.60} is no list of finite numbers from 0 on")
    definition = str(raw.get("definition", ""))
    return Figure(**texts, better=better, values=tuple(map(float, values)), definition=definition)


def _is_figure(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and float(value) >= 0
    except OverflowError:
        return False


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
            group = (run.lab, run.model) if across_fingerprints else (run.lab, run.model, run.key)
            name = (*group, f.workload, f.definition, f.arm, f.metric, f.unit, f.better)
            series = found.get(name) or Series(
                group, run.lab, run.model, (), f.workload, f.arm, f.metric, f.unit, f.better
            )
            found[name] = replace(
                series,
                keys=tuple(dict.fromkeys([*series.keys, run.key])),
                points=(*series.points, Point(run, f.values)),
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
    levels = f"{report.number(change.before)} → {report.number(change.after)}"
    effect = f"{report.percent(change.change)} ({series.outcome(change)})"
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
                *(str(len(medians)), series.rounds, report.number(medians[0]), report.number(medians[-1])),
                series.not_judged or last,
            )
        )
    return report.table_lines(rows)


def page(archive: Archive, found: Sequence[Series], across_fingerprints: bool = False) -> str:
    """The whole HTML page: fingerprints, then charts and runs of each group of series."""
    groups: dict[tuple[str, ...], list[Series]] = {}
    for series in found:
        groups.setdefault(series.group, []).append(series)
    shown = {point.run.run_id: point.run for series in found for point in series.points}
    return report.template("history.html").render(
        css=report.CSS.read_text(),
        summary=summary(archive, found),
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
                "svg": plot.render(_chart(series, numbers)),
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
        problem = Problem(str(path), "--html", _reason(error), "name a file in a folder that can be written")
        raise ConfigError([problem]) from error


def summary(archive: Archive, found: Sequence[Series]) -> str:
    """One line: what was read, what was passed over, how many series changed."""
    changed = sum(bool(series.changes) for series in found)
    return (
        f"{_count(len(archive.runs), 'run')} with figures, {archive.passed_over} without, passed over; "
        f"{len(found)} series, {changed} with a change point"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

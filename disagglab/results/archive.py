"""Run folders as they lie on disk, read for their history: what each session was, and its figures."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from disagglab import jsonfile
from disagglab.config.arms import BEST, DISAGGREGATED, rivals
from disagglab.errors import ConfigError, Problem
from disagglab.results import fingerprint, speed
from disagglab.results.records import FigureRow
from disagglab.results.run_folder import META
from disagglab.stats.metric import Direction, of_stream

RUN_ID = re.compile(r"\d{8}-\d{6}")
FIGURES, COMMITTED = "figures.jsonl", "reference"
NOT_RECORDED = "not recorded"
LAB_FILE_DIGITS = 8


@dataclass(frozen=True)
class HistoryRun:
    """One session as its folder tells it.

    ``key``: of its fingerprint, and whether that is incomplete. ``fingerprint``: name → value, with a
    package's version as ``versions.NAME``, a host's fact as ``lab.TITLE.NAME``. ``lab_file``: a short hash of
    what the lab file says. ``gated``: workload, arm and metric of what its gates compare. ``copy_speed``: of
    memory, as the probe before the session found it.
    """

    run_id: str
    lab: str
    model: str
    commit: str
    command: str
    lab_file: str
    gated: frozenset[tuple[str, str, str]]
    key: str
    complete: bool
    fingerprint: Mapping[str, str]
    copy_speed: str
    figures: tuple[FigureRow, ...]

    @property
    def identity(self) -> str:
        """Equal for two sessions only where hardware and software are known to be."""
        return self.key if self.complete else f"{self.key} of {self.run_id}"


@dataclass(frozen=True)
class Archive:
    """What a reports folder holds. ``passed_over``: sessions without figures. ``problems``: what could not
    be read and is left out.
    """

    runs: tuple[HistoryRun, ...]
    passed_over: int
    problems: tuple[Problem, ...]


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
    found = _references(reports) | _references(reports / COMMITTED)
    found |= {path.name: path for path in [*_run_folders(reports / COMMITTED), *_run_folders(reports)]}
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


def _references(parent: Path) -> dict[str, Path]:
    """Sessions that ``python -m disagglab reference`` made, by run id: a folder each, or folders in one."""
    found = {}
    paths = [*parent.glob(f"*/{META}"), *parent.glob(f"*/*/{META}")]
    for path in sorted(path for path in paths if not path.parent.is_symlink()):
        run_id = path.parent.name
        if not RUN_ID.match(run_id):
            with contextlib.suppress(ConfigError):  # said of the folder's name when it is read
                run_id = str(_meta(path).get("run", run_id))
        found[run_id] = path.parent
    return found


def _meta(path: Path) -> Mapping[str, Any]:
    """The session's ``run.json``; a session that was killed before it wrote one and has no figures has
    nothing to tell.
    """
    mend = "mend the file, or move the run folder away"
    if not path.exists() and not (path.parent / FIGURES).exists():
        return {}
    return jsonfile.read(path, mend)


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in a few words."""
    return str(error.strerror or error)


def _run(run_id: str, path: Path, meta: Mapping[str, Any], figures: Sequence[FigureRow]) -> HistoryRun:
    facts = meta.get("fingerprint")
    facts = facts if isinstance(facts, Mapping) else {}
    named = {
        "lab": meta.get("lab"),
        "model": meta.get("model"),
        "fingerprint.key": facts.get(fingerprint.KEY),
    }
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
        lab_file=_lab_hash(text) if isinstance(text, str) else NOT_RECORDED,
        gated=frozenset(_gated(text, meta.get("arms"))) if isinstance(text, str) else frozenset(),
        key=fingerprint.label(facts),
        complete=fingerprint.complete(facts),
        fingerprint=dict(_flat({key: value for key, value in facts.items() if key != fingerprint.KEY})),
        copy_speed=_copy_speed(meta.get("speed")),
        figures=tuple(figures),
    )


def _lab_hash(text: str) -> str:
    """The same for two files that say the same, be it with other comments, or by way of ``extends``."""
    try:
        said = json.dumps(tomllib.loads(text), sort_keys=True, default=str)
    except ValueError:
        said = text
    return hashlib.sha256(said.encode(errors="replace")).hexdigest()[:LAB_FILE_DIGITS]


def _gated(text: str, measured: Any) -> Iterable[tuple[str, str, str]]:
    """What the gates of a lab file of any version compare; a gate that names no figure compares none.

    Args:
        measured: the arms of the session, all other ways of which a gate against the best compares.
    """
    arms = [str(arm) for arm in measured] if isinstance(measured, list) else []
    try:
        gates = tomllib.loads(text).get("gate")
    except ValueError:
        return
    for gate in filter(lambda one: isinstance(one, Mapping), gates if isinstance(gates, list) else ()):
        figure = of_stream(str(gate.get("metric")), str(gate.get("stream") or ""))
        candidate, baseline = str(gate.get("candidate") or DISAGGREGATED), gate.get("baseline")
        against = rivals(candidate, arms) if baseline == BEST else (baseline,)
        for arm in filter(None, (candidate, *against)):
            yield str(gate.get("workload")), str(arm), figure


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _copy_speed(probes: Any) -> str:
    return speed.one(probes.get("before") if isinstance(probes, Mapping) else None, speed.COPY)


def _figures(path: Path) -> tuple[list[FigureRow], list[Problem]]:
    """The figures of a session, and what is wrong with the lines that are left out."""
    figures: dict[tuple[str, str, str], FigureRow] = {}
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        wrong = reason(error) if isinstance(error, OSError) else f"not UTF-8: {error}"
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


def _figure(line: str) -> FigureRow:
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
    return FigureRow(**texts, better=better, values=tuple(map(float, values)), definition=definition)


def _is_figure(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and float(value) >= 0
    except OverflowError:
        return False

"""What a search found as a lab file that a session can serve: ``tuned.toml`` in the folder of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from disagglab import text
from disagglab.config import toml
from disagglab.config.arms import BEST as BEST  # the baseline that it writes
from disagglab.config.arms import kind_of
from disagglab.config.schema import Lab
from disagglab.config.setting import Setting
from disagglab.config.way import SHARDED
from disagglab.results import search_words
from disagglab.results.search_record import Outcome, Search

NAME = "tuned"  # of every way that it writes
FILE = "tuned.toml"
FOLDER = "tuned"  # of the files with one way each


def write(folder: Path, lab: Lab, search: Search, command: str, day: date) -> Path:
    """Write ``tuned.toml``, and ``tuned/KIND.toml`` with one way each; the path of the first.

    The file extends the lab, by a path from the run's folder. It has one ``[[way]]`` a kind in place of the
    lab's ways, and the lab's gates with the tuned way of the same kind as candidate and the best of the
    others as baseline. A kind of which the lab's own setting was picked has no way: its arm is that of the
    lab. A sharded one has a way in any case. The files with one way have the lab's gates as they are, without
    those that name one of the ways that are no longer there.

    Args:
        command: that made the search, as one would type it.
        day: on which.
    """
    path = folder / FILE
    ways = {one.kind: way for one in search.outcomes for way in _way(one, search)}
    path.write_text(_text(folder, lab, search, ways, command, day, _gates(lab, ways)), encoding="utf-8")
    (folder / FOLDER).mkdir(exist_ok=True)
    for kind, way in ways.items():
        alone = _text(folder / FOLDER, lab, search, {kind: way}, command, day, _own_gates(lab))
        (folder / FOLDER / f"{kind}.toml").write_text(alone, encoding="utf-8")
    return path


def arm_of(kind: str, search: Search) -> str:
    """The arm by which a session knows what was picked of a kind.

    Raises:
        KeyError: if it was not tuned.
    """
    return f"{kind}@{NAME}" if any(_way(search.outcome(kind), search)) else kind


def _way(one: Outcome, search: Search) -> Iterator[dict[str, Any]]:
    """The ``[[way]]`` of a kind, if it has one."""
    if one.pick is None or (one.pick == Setting() and one.kind != SHARDED):
        return
    what = f"tuned on {search.workload}: {one.pick.words}"
    yield one.pick.table(one.kind, NAME, what, search_words.expects(one))


def _gates(lab: Lab, ways: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lab's gates, best against best. Two that differed in the baseline alone are one then."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for gate in lab.gates:
        kind = kind_of(gate.candidate)
        candidate = f"{kind}@{NAME}" if kind in ways else kind
        if candidate == SHARDED:
            continue  # an arm of the lab's ways, which are not in the file
        row = {**gate.model_dump(exclude_defaults=True), "candidate": candidate}
        if gate.baseline is not None:
            row["baseline"] = BEST
        found.setdefault((candidate, gate.workload, gate.figure, gate.limit), row)
    return list(found.values())


def _own_gates(lab: Lab) -> list[dict[str, Any]]:
    """The lab's gates between arms of its own settings."""
    gone = {one.arm for one in lab.ways}
    kept = [gate for gate in lab.gates if not gone & {gate.candidate, gate.baseline}]
    return [gate.model_dump(exclude_defaults=True) for gate in kept]


def _text(
    folder: Path,
    lab: Lab,
    search: Search,
    ways: Mapping[str, Mapping[str, Any]],
    command: str,
    day: date,
    gates: Sequence[Mapping[str, Any]],
) -> str:
    table: dict[str, Any] = {
        "name": f"{lab.name}-{NAME}",
        "label": f"{lab.label}, {NAME}" if lab.label else NAME,
        "extends": os.path.relpath(Path(lab.file).resolve(), folder.resolve()),
        # An empty list takes away what the lab has; one that is not there would keep it
        "way": list(ways.values()),
        "gate": list(gates),
    }
    head = [
        f"Made by: {command}, {day.isoformat()}",
        f"Run: {folder.name if folder.name != FOLDER else folder.parent.name}",
        *search_words.outcome_lines(search),
    ]
    return "".join(f"# {_one_line(line)}\n" for line in head) + toml.dumps(table)


def _one_line(line: str) -> str:
    return text.shortened(" ".join(line.split()), 300, end=True)

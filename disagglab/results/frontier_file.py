"""``frontier.json`` of a session: what its frontier is recomputed from, times in whole microseconds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from disagglab import jsonfile
from disagglab.errors import ConfigError, Problem
from disagglab.problems import problems_of
from disagglab.results.frontier import Frontier
from disagglab.results.rated_run import MICRO, RatedRun

NAME = "frontier.json"
VERSION = 1
LISTS = {"ttft_s": "ttft_us", "tpot_s": "tpot_us", "gap_s": "gap_us"}  # of RatedRun, of the file
GAPS, GAPS_US = "gaps", "gaps_us"
MEND = "name the folder of a session that measured a frontier, or copy the file again"


def write(frontier: Frontier, folder: Path) -> Path:
    """Write the file into a session's folder; it gets its name when it is whole."""
    raw = asdict(frontier) | {"version": VERSION, "runs": [_packed(run) for run in frontier.runs]}
    path = folder / NAME
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(raw, separators=(",", ":")))
    os.replace(unfinished, path)
    return path


def read(folder: Path) -> Frontier:
    """The frontier of a session's folder.

    Raises:
        ConfigError: if the file is missing, damaged, or of another version.
    """
    path = folder / NAME
    raw = jsonfile.read(path, MEND)
    version = raw.pop("version", None)
    if version != VERSION:
        wrong = f"version {version}, this suite reads {VERSION}"
        raise ConfigError([Problem(str(path), "version", wrong, "read it with the suite that wrote it")])
    try:
        raw["runs"] = [_unpacked(run) for run in raw["runs"]]
        found = TypeAdapter(Frontier).validate_python(raw)
    except ValidationError as error:
        raise ConfigError(problems_of(error, str(path), mend=MEND)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError([Problem(str(path), "runs", f"no runs of a frontier: {error!r}", MEND)]) from error
    bad = [
        Problem(str(path), f"runs[{i}]", f"lists of unequal lengths, or no footprint of {run.arm}", MEND)
        for i, run in enumerate(found.runs)
        if not len(run.ttft_s) == len(run.tpot_s) == len(run.gap_s) > 0 or run.arm not in found.footprints
    ]
    if bad:
        raise ConfigError(bad)
    return found


def _packed(run: RatedRun) -> dict[str, Any]:
    raw = asdict(run)
    for ours, theirs in LISTS.items():
        raw[theirs] = [None if value is None else round(value * MICRO) for value in raw.pop(ours)]
    raw[GAPS_US] = {str(round(gap * MICRO)): count for gap, count in raw.pop(GAPS).items()}
    return raw


def _unpacked(raw: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(raw)
    for ours, theirs in LISTS.items():
        found[ours] = tuple(None if value is None else value / MICRO for value in found.pop(theirs))
    found[GAPS] = {int(gap) / MICRO: count for gap, count in found.pop(GAPS_US).items()}
    return found

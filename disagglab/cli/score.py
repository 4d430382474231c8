"""``disagglab score RECORD RUN_FOLDER``: a stored forecast held against what a session measured."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from disagglab.cli import command
from disagglab.errors import ConfigError, Problem


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "score",
        run,
        "a stored forecast held against a session",
        "Hold the forecasts that propose --out stored against the figures of a later session: relative errors"
        " by arm, and whether the arm that was forecast to be best was.",
        [
            "disagglab score proposed/aiconfigurator.json reports/latest",
            "disagglab score proposed/aiconfigurator.json reports/latest --json",
        ],
    )
    asked.add_argument("record", type=Path, help="file that propose --out wrote")
    asked.add_argument("folder", type=Path, help="folder of the session, as reports/latest")
    asked.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Score and print it."""
    from disagglab import jsonfile
    from disagglab.predict import armforecast, proposal
    from disagglab.results import archive

    record = jsonfile.read(arguments.record, mend="disagglab propose --out FOLDER writes one")
    forecasts, asked = proposal.read_record(record, str(arguments.record))
    folder = arguments.folder.resolve()
    sessions = [one for one in archive.read(folder.parent).runs if one.run_id == folder.name]
    if not sessions:
        mend = "name the folder of a session that wrote figures.jsonl"
        raise ConfigError([Problem(str(arguments.folder), "(folder)", "no figures of a session", mend)])
    found = armforecast.measured(sessions[0].figures, asked["workload"], asked["definition"])
    result = armforecast.score(forecasts, found)
    print(json.dumps(asdict(result)) if arguments.json else "\n".join(result.lines()))
    return 0

"""``disagglab history``: figures over many runs, and where their level changed."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from disagglab.cli import command, words
from disagglab.paths import REPORTS

OF_A_FIGURE = ("workload", "arm", "metric")
COLUMNS = ("lab", *OF_A_FIGURE)
COLUMNS_OF_A_FILE = 100  # where the output is no terminal and COLUMNS is not set


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "history",
        run,
        "figures over many runs, with change points",
        "Print one line a series of run medians, newest first, and write a page with a chart of each that has"
        " more than one run: of what the labs' gates compare, or of what --workload, --arm and --metric name."
        " Exit status 1: a part could not be read; the rest was computed.",
        [
            "disagglab history",
            "disagglab history --lab embedded --metric itl_p99",
            "disagglab history --all --lab embedded",
            "disagglab history --reports reports/reference --html history.html --across-fingerprints",
        ],
    )
    asked.add_argument("--reports", type=Path, default=REPORTS, help="folder of run folders (%(default)s)")
    asked.add_argument("--html", type=Path, help="the page (history.html in the folder of run folders)")
    for column in COLUMNS:
        option = asked.add_argument(
            f"--{column}", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
        )
        if column == "lab":
            command.complete(option, words.labs)
    asked.add_argument(
        "--all", action="store_true", help="every figure, not only those that a gate of the lab compares"
    )
    asked.add_argument(
        "--across-fingerprints",
        action="store_true",
        help="join runs of different hardware and package versions",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the lines and write the page."""
    from disagglab.results import archive, history, historypage

    found_runs = archive.read(arguments.reports)
    filters = history.Filters(**{name: tuple(getattr(arguments, name)) for name in COLUMNS})
    joined = arguments.across_fingerprints
    every = history.collect(found_runs.runs, filters, joined)
    named = arguments.all or any(getattr(arguments, name) for name in OF_A_FIGURE)
    found = every if named else [series for series in every if series.gated]
    left_out = len(every) - len(found)
    path = arguments.html or arguments.reports / historypage.NAME
    historypage.write(path, historypage.render(found_runs, found, joined, left_out))
    head = [historypage.JOINED] if joined else []
    table = history.lines(found, shutil.get_terminal_size((COLUMNS_OF_A_FILE, 0)).columns)
    print("\n".join([*head, *table, *history.summary(found_runs, found, left_out), str(path)]))
    for problem in found_runs.problems:
        print(command.one_line(problem), file=sys.stderr)
    return command.LEFT_OUT if found_runs.problems else 0

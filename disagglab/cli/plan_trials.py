"""``disagglab plan-trials RUN_FOLDER``: how many rounds a lab's noise asks for, from an earlier session."""

from __future__ import annotations

import argparse
from pathlib import Path

from disagglab.cli import command

DIFFERENCE = "5%"


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "plan-trials",
        run,
        "how many rounds find a difference, at an earlier session's noise",
        "Print, for each gate of an earlier session's lab, the spread of a pair of runs there, and how many"
        " rounds and minutes find a difference at that spread.",
        [
            "disagglab plan-trials reports/latest",
            "disagglab plan-trials reports/latest --difference 2%",
            "disagglab plan-trials reports/latest --budget 10m",
        ],
    )
    asked.add_argument("folder", type=Path, help="folder of the session, as reports/latest")
    asked.add_argument(
        "--difference",
        default=DIFFERENCE,
        metavar="SHARE",
        help="that is to be found four times out of five (default 5%%)",
    )
    asked.add_argument("--budget", metavar="TIME", help="also what this time would tell: 90s, 10m, 1h")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from disagglab.errors import ConfigError, Problem
    from disagglab.experiments import foresight
    from disagglab.units import seconds, share

    difference = share(arguments.difference)
    budget_s = seconds(arguments.budget) if arguments.budget else None
    problems = []
    if difference is None or not 0 < difference < 1:
        wrong = f"no share: {arguments.difference!r}"
        problems.append(Problem("command line", "--difference", wrong, "write 5% or 0.05"))
    if arguments.budget and not budget_s:
        wrong = f"no time: {arguments.budget!r}"
        problems.append(Problem("command line", "--budget", wrong, "write 90s, 10m or 1h"))
    if problems or difference is None:
        raise ConfigError(problems)
    print("\n".join(foresight.lines(arguments.folder, difference, budget_s)))
    return 0

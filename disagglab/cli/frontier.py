"""``disagglab frontier RUN_FOLDER``: which way wins at which load and promise, from a finished session."""

from __future__ import annotations

import argparse
from pathlib import Path

from disagglab.cli import command

LIMITS = {"ttft": "ttft_s", "tpot": "tpot_s", "itl": "itl_s"}


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "frontier",
        run,
        "which way wins at which load and promise",
        "Print the frontier of a finished session: which way is ahead at which offered rate and by how much,"
        " a row for each way and rate, and who wins for limits around the promise. Computed from"
        " frontier.json of the session, so another promise or price needs no new run. Limits that are given"
        " take the place of all of the session's.",
        [
            "disagglab frontier reports/latest",
            "disagglab frontier reports/latest --ttft 1s --tpot 50ms",
            "disagglab frontier reports/latest --itl 50ms --price 2.5EUR/gpu-hour",
        ],
    )
    asked.add_argument("folder", type=Path, help="folder of the session, as reports/latest")
    asked.add_argument("--ttft", metavar="TIME", help="longest time to first token: 1s, 800ms")
    asked.add_argument("--tpot", metavar="TIME", help="longest time per output token")
    asked.add_argument("--itl", metavar="TIME", help="longest gap, of 99%% of a request's gaps")
    asked.add_argument("--margin", metavar="SHARE", help="differences below it count as none (default 5%%)")
    asked.add_argument(
        "--own-spread", action="store_true", help="bands of each rate's own rounds: wider, and assume less"
    )
    asked.add_argument("--price", metavar="PRICE", help="2.5EUR/gpu-hour or 8USD/node-hour")


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    from dataclasses import replace

    from disagglab.errors import ConfigError, InvalidRun, Problem
    from disagglab.results import frontier_file, frontier_text
    from disagglab.results.price import Price
    from disagglab.results.promise import Promise
    from disagglab.results.standing import MARGIN, Terms
    from disagglab.units import seconds, share

    given = {name: getattr(arguments, name) for name in LIMITS if getattr(arguments, name) is not None}
    limits = {name: seconds(value) for name, value in given.items()}
    margin = MARGIN if arguments.margin is None else share(arguments.margin)
    price = None if arguments.price is None else Price.parse(arguments.price)
    wrong = [(f"--{name}", given[name], "no time", "50ms or 1s") for name in limits if not limits[name]]
    if margin is None or not 0 <= margin < 1:
        wrong.append(("--margin", arguments.margin, "no share", "5% or 0.05"))
    if arguments.price is not None and price is None:
        wrong.append(("--price", arguments.price, "no price", "2.5EUR/gpu-hour or 8USD/node-hour"))
    if wrong or margin is None:
        raise ConfigError(
            [
                Problem("command line", key, f"{what}: {text!r}", f"write {mend}")
                for key, text, what, mend in wrong
            ]
        )
    found = frontier_file.read(arguments.folder)
    if limits:
        found = found.promising(Promise(**{LIMITS[name]: value for name, value in limits.items()}))
    terms = Terms(margin, arguments.own_spread)
    try:
        shown = frontier_text.lines(replace(found, price=price or found.price), terms)
    except InvalidRun as error:
        path = str(arguments.folder / frontier_file.NAME)
        raise ConfigError([Problem(path, "runs", str(error), frontier_file.MEND)]) from error
    print("\n".join(shown))
    return 0

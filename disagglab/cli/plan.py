"""``disagglab plan``: what a session would run on every host, without starting any of it."""

from __future__ import annotations

import argparse
import sys

from disagglab.cli import command, words
from disagglab.errors import ConfigError, LabError


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "plan",
        run,
        "every command of a session, none of them started",
        "Print what a session with a lab would run on every host; the same as pytest --plan.",
        [
            "disagglab plan --lab embedded",
            "disagglab plan --lab two-h200 --way stock --workload chat",
            "disagglab plan --lab two-h200 --without single",
        ],
    )
    lab = asked.add_argument("--lab", default="embedded", help="a lab by its name or path (%(default)s)")
    command.complete(lab, words.labs)
    asked.add_argument("--vllm", metavar="X.Y.Z", help="serve with this vLLM version instead of the lab's")
    asked.add_argument("--against", metavar="X.Y.Z", help="also serve with this vLLM version")
    workload = asked.add_argument(
        "--workload", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    command.complete(workload, words.workloads)
    way = asked.add_argument(
        "--way", action="append", default=[], metavar="NAME", help="also this one; may be repeated"
    )
    command.complete(way, words.ways)
    asked.add_argument(
        "--arm", action="append", default=[], metavar="NAME", help="only this arm; may be repeated"
    )
    asked.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="not this arm; may be repeated"
    )
    asked.add_argument("--dedicated", action="store_true", help="also servers without any KV connector")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from disagglab.experiments import plan
    from disagglab.experiments.asked import Asked

    asked = Asked(
        lab=arguments.lab,
        vllm=arguments.vllm or "",
        against=arguments.against or "",
        workloads=tuple(arguments.workload),
        ways=tuple(arguments.way),
        arms=tuple(arguments.arm),
        without=tuple(arguments.without),
        dedicated=arguments.dedicated,
    )
    try:
        print("\n".join(plan.lines(asked)))
    except ConfigError:
        raise
    except LabError as error:
        print(error, file=sys.stderr)
        return command.MISSING
    return 0

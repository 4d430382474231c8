"""The command line of the suite: ``disagglab COMMAND``, or ``python -m disagglab COMMAND``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Sequence

from disagglab.cli import (
    command,
    completion,
    frontier,
    gate,
    history,
    kv,
    labs,
    plan,
    plan_trials,
    predict,
    propose,
    provision,
    publish,
    scatter,
    score,
    tune,
)
from disagglab.errors import ConfigError

PROGRAM = "disagglab"
DESCRIPTION = (
    "What the suite does beside its experiments, which pytest runs. kv, gate, score, frontier, predict,"
    " history, reference, labs, plan and plan-trials compute from files and start nothing; propose asks"
    " another program on this machine; provision and scatter go to the hosts of a lab; tune runs a session of"
    " pytest."
)
EXAMPLES = ("disagglab labs", "disagglab kv Llama-3.1-8B-Instruct --link 100Gbps", "disagglab kv --help")
COMMANDS = (
    *(labs, kv, predict, propose, plan, plan_trials, provision, scatter, tune),
    *(gate, score, frontier, history, publish, completion),
)
READER_GONE = 128 + signal.SIGPIPE  # as shells have it
COMPLETING = "_ARGCOMPLETE"  # argcomplete's own variable: a shell asks for completions


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The whole command line. Loads no more than names and defaults of options need."""
    found = command.OneLineParser(
        prog=prog,
        description=textwrap.fill(DESCRIPTION, command.HELP_COLUMNS),
        epilog=command.examples(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = found.add_subparsers(
        dest="command", required=True, metavar="command", parser_class=command.OneLineParser
    )
    for one in COMMANDS:
        one.add(commands)
    return found


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run one command; the exit status is 2 if the input cannot be computed, and 1 if a part of it or of a
    host is missing.
    """
    asked = parser(prog)
    if COMPLETING in os.environ:
        import argcomplete

        argcomplete.autocomplete(asked)
    arguments = asked.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        return command.refuse(error)
    except BrokenPipeError:  # whoever reads has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at the exit
        return READER_GONE
    return status

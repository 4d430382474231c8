"""What every command has: a parser that errs in one line, help with examples, an exit status."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

from disagglab.errors import ConfigError, Problem

LEFT_OUT = 1  # exit status: a part of the input could not be read; the rest was computed
MISSING = 1  # exit status: a host lacks something
REFUSED = 2  # exit status: the input cannot be computed
INTERRUPTED = 130

HELP_COLUMNS = 100


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(REFUSED)


Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"


def add(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    description: str,
    lines: Sequence[str],
) -> OneLineParser:
    """Add a command. ``what``: its line in the list of commands; ``lines``: the examples under its help."""
    asked = commands.add_parser(
        name,
        help=what,
        description=textwrap.fill(" ".join(description.split()), HELP_COLUMNS),
        epilog=examples(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asked.set_defaults(run=run)
    return asked


def examples(lines: Sequence[str]) -> str:
    """What stands under a command's help."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def complete(action: argparse.Action, words: Callable[..., Sequence[str]]) -> None:
    """Let a shell complete an option. ``words``: called by argcomplete, with keyword arguments."""
    action.completer = words  # type: ignore[attr-defined]


def refuse(error: ConfigError) -> int:
    """Say every problem, in one line; the exit status."""
    print(" | ".join(map(one_line, error.problems)), file=sys.stderr)
    return REFUSED


def one_line(problem: Problem) -> str:
    """A problem as one line."""
    return " ".join(f"{problem.file}: {problem.key}: {problem.wrong} (mend: {problem.mend})".split())

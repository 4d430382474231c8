"""``disagglab reference``: finished sessions as files to commit."""

from __future__ import annotations

import argparse
from pathlib import Path

from disagglab.cli import command
from disagglab.errors import ConfigError, Problem


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "reference",
        run,
        "finished sessions as files to commit",
        "Make reports/reference/NAME/ from run folders, without paths and names of their hosts.",
        [
            "disagglab reference reports/latest my-lab",
            "disagglab reference reports/latest my-lab --replace '/mnt/models=$MODELS' --note 'Idle host.'",
        ],
    )
    asked.add_argument("folder", type=Path, nargs="+", metavar="RUN_FOLDER", help="of a session that ended")
    asked.add_argument("name", metavar="NAME", help="lower-case letters, digits, dots, hyphens")
    asked.add_argument(
        "--allow-failures", action="store_true", help="also sessions that failed; the README says which tests"
    )
    asked.add_argument(
        "--replace",
        action="append",
        default=[],
        metavar="TEXT=BY",
        help="replace a further path or name; may be repeated",
    )
    asked.add_argument(
        "--note",
        action="append",
        default=[],
        metavar="TEXT",
        help="a paragraph for the README; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the folder and print its path."""
    from disagglab.results import publish  # needs matplotlib and jinja2; the arithmetic does without

    parts = [text.partition("=") for text in arguments.replace]
    further = {text: by for text, equals, by in parts if text and equals}
    if len(further) < len(parts):
        wrong = f"{' '.join(arguments.replace)}: TEXT=BY is wanted, each TEXT once"
        raise ConfigError([Problem("reference", "--replace", wrong, "--replace '/mnt/models=$MODELS'")])
    made = publish.make(
        arguments.folder, arguments.name, arguments.allow_failures, further, notes=arguments.note
    )
    print(made)
    return 0

"""``disagglab provision``: environments on the hosts of a lab, over SSH."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from disagglab.cli import command, words
from disagglab.errors import ConfigError, LabError


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "provision",
        run,
        "environments on the hosts of a lab, over SSH",
        "Bring files and environments of a lab's hosts up to date, and print what they hold.",
        [
            "disagglab provision --lab spark --check",
            "disagglab provision --lab spark --vllm 0.30.0",
            "disagglab provision --lab spark --host spark-02 --offline",
        ],
    )
    lab = asked.add_argument("--lab", required=True, help="a lab by its name or path")
    command.complete(lab, words.labs)
    asked.add_argument("--vllm", default="", metavar="X.Y.Z", help="for this vLLM version (the lab's)")
    asked.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if something lacks"
    )
    asked.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    asked.add_argument(
        "--offline", action="store_true", help="the hosts reach no registry: download wheels here, copy them"
    )
    asked.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="keep these wheels here (the user's cache); implies it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Look at the hosts, bring them up to date unless only asked to look, and print the table."""
    from disagglab.config import labs
    from disagglab.hosts.provision import audit, provision

    want = provision.wanted(
        labs.load_lab(arguments.lab), arguments.vllm, arguments.host, arguments.offline, arguments.wheels
    )
    try:
        rows = provision.check(want) if arguments.check else provision.provision(want)
    except ConfigError:
        raise
    except LabError as error:
        print(error, file=sys.stderr)
        return command.MISSING
    except KeyboardInterrupt:
        print("interrupted; what was started on the host has ended", file=sys.stderr)
        return command.INTERRUPTED
    print("\n".join(audit.table(rows)))
    return command.MISSING if any(row.missing for row in rows) else 0

"""``disagglab labs``: every lab, what it needs, and whether this machine has it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from disagglab.cli import command, words
from disagglab.errors import ConfigError
from disagglab.paths import LABS

if TYPE_CHECKING:
    from disagglab.hosts.needs import Standing

HEAD = ("lab", "nodes", "model", "needs", "here")
GAP = "  "


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "labs",
        run,
        "every lab: what it needs, and whether this machine has it",
        "List the labs in labs/: nodes, model, what each needs, and whether this machine has it, with the"
        " reason if not. Starts nothing; hosts over SSH are not looked at.",
        [
            "disagglab labs",
            "disagglab labs --lab embedded --json",
        ],
    )
    lab = asked.add_argument(
        "--lab",
        action="append",
        default=[],
        metavar="LAB",
        help="only this one (name or path); may be repeated",
    )
    command.complete(lab, words.labs)
    asked.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Look, and print the table."""
    from disagglab.config.labs import load_lab
    from disagglab.hosts import needs

    machine = needs.Machine.here()
    found: list[Standing | Unusable] = []
    for name in arguments.lab or map(str, sorted(LABS.glob("*.toml"), key=lambda file: file.stem)):
        try:
            found.append(needs.standing(load_lab(name), machine))
        except ConfigError as error:
            if arguments.lab:
                raise
            found.append(Unusable(name, error))
    print(json.dumps([one.as_dict() for one in found]) if arguments.json else "\n".join(table(found)))
    return 0


@dataclass(frozen=True)
class Unusable:
    """A lab file in labs/ that is wrong, or names what this machine cannot have."""

    file: str
    error: ConfigError

    @property
    def name(self) -> str:
        """The lab's, by its file."""
        return Path(self.file).stem

    @property
    def reasons(self) -> list[str]:
        """All that is wrong."""
        return [f"{one.key}: {one.wrong}" for one in self.error.problems]

    def as_dict(self) -> dict[str, object]:
        """For JSON, with the keys of a lab that can be read."""
        empty: dict[str, object] = {"nodes": [], "model": "", "needs": None}
        return {"name": self.name, "file": self.file, **empty, "here": False, "reasons": self.reasons}


def table(found: Sequence[Standing | Unusable]) -> list[str]:
    """The labs as lines of equal columns."""
    rows = [HEAD, *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    return [
        GAP.join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _row(one: Standing | Unusable) -> tuple[str, ...]:
    if isinstance(one, Unusable):
        return one.name, "", "", "", f"no: {'; '.join(one.reasons)}"
    lab = one.lab
    roles = [("prefill", lab.prefill), ("decode", lab.decode)]
    nodes = "; ".join(f"{role} {' '.join(node.name for node in on)}" for role, on in roles)
    said = {True: "yes", False: "no: ", None: "not known: "}[one.here]
    reasons = "; ".join([*one.lacking, *one.unknown])
    return lab.name, nodes, _short(lab.model.id), str(one.needs), f"{said}{reasons}"


def _short(model: str) -> str:
    """A model's id without organisation or folder."""
    return Path(model).name

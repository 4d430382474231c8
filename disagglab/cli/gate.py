"""``disagglab gate FILE``: a verdict on pairs of figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from disagglab.cli import command

EXAMPLE = (
    """echo '{"metric": "ttft_p50", "better": "lower", "margin": 0.05,"""
    """ "pairs": [[1.0, 0.8], [1.1, 0.9], [1.0, 0.8]]}' | disagglab gate /dev/stdin"""
)


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "gate",
        run,
        "verdict on pairs of figures",
        "Print a verdict on pairs of figures (baseline, candidate) as JSON."
        ' With "sequential": true in the file'
        " pairs may be appended and judged again until something is decided. With candidate and baselines in"
        " the place of pairs the candidate is judged against the best of them.",
        ["disagglab gate pairs.json", EXAMPLE],
    )
    asked.add_argument(
        "file", type=Path, help='{"metric": …, "better": "lower", "margin": 0.05, "pairs": [[a, b], …]}'
    )


def run(arguments: argparse.Namespace) -> int:
    """Judge and print it."""
    from disagglab.stats import gatefile  # needs scipy; the arithmetic does without

    gate = gatefile.read(arguments.file)
    print(json.dumps(gatefile.as_dict(gate, gate.judge())))
    return 0

"""What the suite computes without a lab: ``kv CONFIG``, a model's KV cache in bytes; ``gate FILE``, a
verdict on pairs of figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from disagglab import kv, kvlayout, kvtable
from disagglab.errors import ConfigError

REFUSED = 2  # exit status: the input cannot be computed
DTYPE_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class _OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(REFUSED)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="python -m disagglab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_OneLineParser)
    table = commands.add_parser("kv", help="KV cache bytes of a model", description=kvtable.__doc__)
    table.add_argument(
        "config", help="model folder, config.json, or a shipped name (Llama-3.1-8B-Instruct …)"
    )
    table.add_argument("--tokens", type=int, default=2048, help="prompt length (%(default)s)")
    table.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *kv.DTYPES, *DTYPE_SHORT],
        help="of the KV cache (%(default)s: the model's own)",
    )
    table.add_argument("--tp", type=int, default=1, help="tensor parallel size (%(default)s)")
    table.add_argument(
        "--block-size",
        type=int,
        default=kvlayout.DEFAULT_BLOCK_SIZE,
        help="tokens per block (%(default)s; 128 on CPUs)",
    )
    table.add_argument("--link", help="rate for the transfer time: 100Gbps, 12.5GB/s")
    table.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    gate = commands.add_parser(
        "gate", help="verdict on pairs of figures", description="Print a verdict as JSON."
    )
    gate.add_argument(
        "file", type=Path, help='{"metric": …, "better": "lower", "margin": 0.05, "pairs": [[a, b], …]}'
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 2 if the input cannot be computed."""
    arguments = _parser().parse_args(argv)
    try:
        print(_kv(arguments) if arguments.command == "kv" else _gate(arguments.file))
    except ConfigError as error:
        reasons = (f"{p.file}: {p.key}: {p.wrong} (mend: {p.mend})" for p in error.problems)
        print(" | ".join(" ".join(reason.split()) for reason in reasons), file=sys.stderr)
        return REFUSED
    return 0


def _gate(path: Path) -> str:
    from disagglab import gatefile  # needs scipy; the arithmetic does without

    gate = gatefile.read(path)
    return json.dumps(gatefile.as_dict(gate, gate.judge()))


def _kv(arguments: argparse.Namespace) -> str:
    result = kvtable.table(
        arguments.config,
        tokens=arguments.tokens,
        dtype=DTYPE_SHORT.get(arguments.dtype, arguments.dtype),
        tensor_parallel=arguments.tp,
        block_size=arguments.block_size,
        link_bytes_per_s=None if arguments.link is None else kvtable.parse_rate(arguments.link),
    )
    return json.dumps(result.as_dict()) if arguments.json else "\n".join(result.lines())


if __name__ == "__main__":
    sys.exit(main())

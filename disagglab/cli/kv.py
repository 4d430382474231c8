"""``disagglab kv CONFIG``: a model's KV cache in bytes."""

from __future__ import annotations

import argparse
import json

from disagglab.cli import command, words
from disagglab.kv import layout, shape, table

DTYPE_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "kv",
        run,
        "KV cache bytes of a model",
        "Print a model's KV cache in bytes, by token, block and prompt, and its time on a link.",
        [
            "disagglab kv Llama-3.1-8B-Instruct --link 100Gbps",
            "disagglab kv gemma-3-1b-it --block-size 128 --tokens 4096 --json",
        ],
    )
    config = asked.add_argument(
        "config", help="model folder, config.json, or a shipped name (Llama-3.1-8B-Instruct …)"
    )
    command.complete(config, words.models)
    asked.add_argument("--tokens", type=int, default=2048, help="prompt length (%(default)s)")
    asked.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *shape.DTYPES, *DTYPE_SHORT],
        help="of the KV cache (%(default)s: the model's own)",
    )
    asked.add_argument("--tp", type=int, default=1, help="tensor parallel size (%(default)s)")
    asked.add_argument(
        "--block-size",
        type=int,
        default=layout.DEFAULT_BLOCK_SIZE,
        help="tokens per block (%(default)s; 128 on CPUs)",
    )
    asked.add_argument("--link", help="rate for the transfer time: 100Gbps, 12.5GB/s")
    asked.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Compute and print it."""
    result = table.table(
        arguments.config,
        tokens=arguments.tokens,
        dtype=DTYPE_SHORT.get(arguments.dtype, arguments.dtype),
        tensor_parallel=arguments.tp,
        block_size=arguments.block_size,
        link_bytes_per_s=None if arguments.link is None else table.parse_rate(arguments.link),
    )
    print(json.dumps(result.as_dict()) if arguments.json else "\n".join(result.lines()))
    return 0

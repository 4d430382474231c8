"""Options of ``vllm serve`` that a lab file cannot give, and where each comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disagglab.errors import Problem

ARGS = {
    "host": "the node's address",
    "port": "[ports]",
    "model": "[model] id",
    "served-model-name": "nothing: each run gives its own name, which proves whose server answers",
    "dtype": "[model] dtype",
    "max-model-len": "[model] max_model_len",
    "load-format": "[model] load_format",
    "tokenizer": "[model] tokenizer",
    "kv-transfer-config": "[transport]",
    "kv-events-config": "the suite, for servers whose router chooses by KV events",
    "nnodes": "the hosts of the nodes",
    "node-rank": "the hosts of the nodes",
    "master-addr": "data_address of the first node",
    "master-port": "[ports]",
    "headless": "the hosts of the nodes",
}
BESIDE_ARGS = {
    "gpu-memory-utilization": "the number of ways that share the GPU",
    "kv-cache-memory-bytes": "[memory] kv_beside_gib",
}  # of servers beside others
# Both roles have to agree on these: NixlConnector refuses another block size, and reads blocks rank by rank.
ROLE_ARGS = ("block-size", "kv-cache-dtype", "tensor-parallel-size", "pipeline-parallel-size")


def name_of(arg: str) -> str:
    """An option as the command line has it, without dashes in front."""
    return arg.lstrip("-").replace("_", "-")


def problems(
    args: Mapping[str, Any], where: str, file: str, also: Mapping[str, str] | None = None
) -> Iterator[Problem]:
    """What of a table of options is set by the suite, or written wrongly.

    Args:
        also: options that come from elsewhere in this table, beside ARGS.
    """
    taken = {**ARGS, **(also or {})}
    for arg in args:
        if arg.startswith("-"):
            wrong = "written with dashes in front"
            yield Problem(file, f"{where}.{arg}", wrong, f"write {arg.lstrip('-')} = …")
        elif name_of(arg) in taken:
            mend = f"remove it; it comes from {taken[name_of(arg)]}"
            yield Problem(file, f"{where}.{arg}", "set by the suite", mend)
        elif "_" in arg:
            wrong = "written with underscores"
            yield Problem(file, f"{where}.{arg}", wrong, f"write {name_of(arg)} = …")

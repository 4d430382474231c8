"""The table that ``python -m disagglab kv`` prints: a model's KV cache in bytes, and its time on a link."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from disagglab import text
from disagglab.errors import ConfigError, Problem
from disagglab.kv import attention, modelconfig, shape
from disagglab.kv import layout as kv_layout

PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
RATE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(bps|bit/s|b/s|Bps|B/s)\s*$", re.IGNORECASE)
BITS = 8
MOST = 10**12  # tokens, ranks
MOST_BYTES_PER_S = 1e18


@dataclass(frozen=True)
class KvTable:
    """One model's KV cache. Bytes, tokens, seconds; ``*_per_rank`` on one of ``tensor_parallel`` ranks.

    ``bytes_per_block``: ``block_size`` tokens in all layers. ``bytes_per_pool_block``: what one block of
    vLLM's pool takes; smaller in hybrid models, where a block holds one group of layers only.
    ``bytes_to_move``: what NixlConnector reads for the prompt, all ranks together. ``transfer_s``: that
    over one link, None without one.
    """

    model: str
    dtype: str
    layers: int
    block_size: int
    tensor_parallel: int
    bytes_per_token: int
    bytes_per_block: int
    bytes_per_token_per_rank: int
    bytes_per_block_per_rank: int
    groups: int
    bytes_per_pool_block: int
    tokens: int
    blocks: int
    bytes_per_prompt: int
    bytes_per_prompt_per_rank: int
    bytes_to_move: int
    link_bytes_per_s: float | None
    transfer_s: float | None

    def as_dict(self) -> dict[str, object]:
        """The fields, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The table as text."""
        rows: list[tuple[str, str, str]] = [
            ("KV cache per token", f"{self.bytes_per_token:,}", "B"),
            (f"per block of {self.block_size} tokens", f"{self.bytes_per_block:,}", "B"),
            (
                f"per prompt of {self.tokens:,} tokens",
                f"{self.bytes_per_prompt:,}",
                f"B in {self.blocks:,} block{'s' * (self.blocks > 1)}",
            ),
        ]
        if self.tensor_parallel > 1:
            share = f"on each of {self.tensor_parallel} ranks: per"
            rows += [
                (f"{share} token", f"{self.bytes_per_token_per_rank:,}", "B"),
                (f"{share} block", f"{self.bytes_per_block_per_rank:,}", "B"),
                (f"{share} prompt", f"{self.bytes_per_prompt_per_rank:,}", "B"),
            ]
        if self.groups > 1:
            rows.append(
                (
                    "one block of the pool",
                    f"{self.bytes_per_pool_block:,}",
                    f"B, {self.groups} groups of layers",
                )
            )
        rows.append(("moved by NixlConnector", f"{self.bytes_to_move:,}", "B"))
        if self.transfer_s is not None and self.link_bytes_per_s is not None:
            rate = f"ms at {self.link_bytes_per_s * BITS / 1e9:g} Gbit/s"
            rows.append(("transfer time, at least", f"{self.transfer_s * 1e3:,.3f}", rate))
        names, values, units = zip(*rows, strict=True)
        aligned = text.column(values, right=True)
        figures = [f"{value} {unit}" for value, unit in zip(aligned, units, strict=True)]
        head = f"{self.model}: {self.layers} layers with a KV cache, {self.dtype}"
        return [head, *(f"  {line}" for line in text.table(list(zip(names, figures, strict=True))))]


def table(
    name: str,
    *,
    tokens: int,
    dtype: str = "auto",
    tensor_parallel: int = 1,
    block_size: int = kv_layout.DEFAULT_BLOCK_SIZE,
    link_bytes_per_s: float | None = None,
    vllm_version: str = max(kv_layout.BLOCK_RULE, key=lambda release: tuple(map(int, release.split(".")))),
) -> KvTable:
    """Compute the table for a model folder, a ``config.json`` or a shipped name.

    Raises:
        ConfigError: if the config cannot be computed, or a number makes no sense.
    """
    for key, value in (
        ("tokens", tokens),
        ("tensor parallel size", tensor_parallel),
        ("block size", block_size),
    ):
        if not 1 <= value <= MOST:
            wrong = f"{value!r:.40} is not between 1 and {MOST:,}"
            raise ConfigError([Problem("command line", key, wrong, "correct it")])
    shown, config = modelconfig.find(name)
    whole = attention.shape(config, dtype, shown)
    heads = attention.query_heads(config, shown) if tensor_parallel > 1 else 1
    if heads % tensor_parallel:
        wrong = f"{tensor_parallel} does not divide {heads} attention heads"
        raise ConfigError([Problem("command line", "tensor parallel size", wrong, "choose a divisor")])
    rank = whole.on_rank(tensor_parallel)
    layout = kv_layout.layout(rank, block_size)
    moved = layout.bytes_to_move(tokens, vllm_version) * tensor_parallel
    return KvTable(
        model=shown,
        dtype=whole.dtype,
        layers=len(whole.layers),
        block_size=block_size,
        tensor_parallel=tensor_parallel,
        bytes_per_token=whole.bytes_per_token,
        bytes_per_block=whole.bytes_per_block(block_size),
        bytes_per_token_per_rank=rank.bytes_per_token,
        bytes_per_block_per_rank=rank.bytes_per_block(block_size),
        groups=len(layout.groups),
        bytes_per_pool_block=layout.bytes_per_block,
        tokens=tokens,
        blocks=shape.blocks(tokens, block_size),
        bytes_per_prompt=whole.bytes_per_prompt(tokens, block_size),
        bytes_per_prompt_per_rank=rank.bytes_per_prompt(tokens, block_size),
        bytes_to_move=moved,
        link_bytes_per_s=link_bytes_per_s,
        transfer_s=shape.transfer_time_s(moved, link_bytes_per_s) if link_bytes_per_s else None,
    )


def parse_rate(text: str) -> float:
    """A link rate in bytes per second from "100Gbps", "100 Gbit/s" or "12.5GB/s": b is a bit, B a byte.

    Raises:
        ConfigError: if it is not a positive rate with a unit.
    """
    match = RATE.match(text)
    if match is not None:
        number, prefix, unit = match.groups()
        in_bytes = unit.startswith("B") and unit.lower() != "bit/s"
        rate = float(number) * PREFIXES[prefix.lower()] / (1 if in_bytes else BITS)
        if 0 < rate <= MOST_BYTES_PER_S:
            return rate
    wrong = f"{text!r:.40} is not a rate"
    raise ConfigError([Problem("command line", "link", wrong, "write 100Gbps, 400Gbit/s or 12.5GB/s")])

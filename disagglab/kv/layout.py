"""How vLLM puts a model's KV cache into blocks, and which of them NixlConnector moves, by vLLM version.

Models of one kind of layer have one block table. Hybrid ones (Gemma 2 and 3, gpt-oss …) are split into groups
with a block table each; all groups draw from one pool, so a block is as large as the largest group needs, and
groups with fewer layers leave a part of it unused. Followed here: get_kv_cache_groups in
vllm/v1/core/kv_cache_utils.py, with layouts that keep layers apart (not the packed block-outermost ones).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from disagglab.errors import ConfigError, Problem
from disagglab.kv.shape import KvShape, Layer, blocks

DEFAULT_BLOCK_SIZE = 16  # tokens, on GPUs; 128 on CPUs. The effective one is in vllm:cache_config_info
PADDING_LIMIT = 1.5  # kinds whose layer counts differ by less share one padded group size (kv_cache_utils.py)

# What NixlConnector moves for a prompt, by vLLM version (major.minor), each as measured; 0.26 with models
# of one group only. Pull mode reads whole blocks, the last partial one included, and skips those that the
# decode server holds already, and those that lie wholly before the window of a sliding group
# (SlidingWindowManager, get_num_skipped_tokens). A block is read in every memory region that more than one
# group uses, its padding too (nixl/base_worker.py: _compute_desc_ids).
WHOLE_BLOCKS = "whole blocks, the last partial one included"
RULE_MEND = "add a line for it, and see whether tests/disagg/test_path.py holds on that version"
BLOCK_RULE = {"0.31": WHOLE_BLOCKS, "0.30": WHOLE_BLOCKS, "0.26": WHOLE_BLOCKS}


@dataclass(frozen=True)
class Group:
    """Layers that share a block table. ``page_bytes``: one layer's bytes in one block, padding included."""

    layers: tuple[Layer, ...]
    page_bytes: tuple[int, ...]
    block_size: int
    window: int | None

    @property
    def bytes_per_block(self) -> int:
        """Bytes that this group uses of a block of the pool."""
        return sum(self.page_bytes)

    def blocks_to_move(self, tokens: int, held_tokens: int = 0) -> int:
        """Blocks read for a prompt of which the decode server holds the first ``held_tokens``.

        The next token looks back ``window`` tokens, itself included; blocks before the first of them are
        skipped.
        """
        skipped = 0 if self.window is None else max(0, tokens - self.window + 1) // self.block_size
        return max(0, blocks(tokens, self.block_size) - max(held_tokens // self.block_size, skipped))


@dataclass(frozen=True)
class KvLayout:
    """A model's KV cache in blocks, on one rank."""

    groups: tuple[Group, ...]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block of the pool that all groups draw from."""
        return max(group.bytes_per_block for group in self.groups)

    def blocks_in(self, budget_bytes: int) -> int:
        """Blocks that a memory budget holds."""
        return budget_bytes // self.bytes_per_block

    def bytes_to_move(self, tokens: int, vllm_version: str, held_tokens: int = 0) -> int:
        """Bytes that the connector reads for a prompt.

        Args:
            tokens: prompt tokens.
            vllm_version: decides the block rule.
            held_tokens: how much of its beginning the decode server holds, in whole blocks of every group.

        Raises:
            ConfigError: if the rule of this vLLM version is not known.
        """
        require_rule(vllm_version)
        return sum(
            group.blocks_to_move(tokens, held_tokens) * self._moved_per_block(group) for group in self.groups
        )

    def _moved_per_block(self, group: Group) -> int:
        """Bytes read for one block of a group: its own regions, and those that several groups use."""
        if len(self.groups) == 1:
            return group.bytes_per_block
        widest = max(len(other.page_bytes) for other in self.groups)
        used_by = [sum(region < len(g.page_bytes) for g in self.groups) for region in range(widest)]
        page = group.page_bytes[0]
        return page * sum(region < len(group.page_bytes) or used_by[region] > 1 for region in range(widest))


def require_rule(vllm_version: str) -> None:
    """Refuse a vLLM version whose block rule nobody has measured.

    Raises:
        ConfigError: naming the version.
    """
    if not has_rule(vllm_version):
        raise ConfigError(
            [
                Problem(
                    "disagglab/kv/layout.py",
                    "BLOCK_RULE",
                    f"no block rule known for vLLM {vllm_version}",
                    RULE_MEND,
                )
            ]
        )


def has_rule(vllm_version: str) -> bool:
    """Whether the block rule of a vLLM version is known; patch releases follow that of their minor one."""
    release = ".".join(vllm_version.split("+")[0].split(".")[:2])
    return BLOCK_RULE.get(release) == WHOLE_BLOCKS


def layout(shape: KvShape, block_size: int, hybrid: bool = True) -> KvLayout:
    """The block layout of a model.

    Args:
        shape: what the model's layers keep, on one rank.
        block_size: tokens per block (``--block-size``, as ``vllm:cache_config_info`` reports it).
        hybrid: False follows ``--disable-hybrid-kv-cache-manager``: beside full attention, sliding layers
            keep all tokens too.
    """
    layers = shape.layers
    windows = {layer.window for layer in layers}
    if not hybrid and None in windows:
        layers = tuple(dataclasses.replace(layer, window=None) for layer in layers)
        windows = {None}
    pages = [layer.bytes_per_token(shape.dtype) * block_size for layer in layers]
    if len(windows) == 1:
        return KvLayout((Group(layers, tuple(pages), block_size, windows.pop()),))
    largest = max(pages)
    kinds: dict[tuple[Layer, int], list[Layer]] = {}
    for layer, page in zip(layers, pages, strict=True):
        # a smaller page holds more tokens if it divides the largest one, else it is padded to it
        ratio = largest // page if largest % page == 0 else 1
        kinds.setdefault((layer, block_size * ratio), []).append(layer)
    smallest, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = most if most < smallest * PADDING_LIMIT else smallest
    groups = []
    for (layer, tokens), members in kinds.items():
        parts = blocks(len(members), size)
        for part in range(parts):
            taken = tuple(members[part::parts])
            groups.append(Group(taken, (largest,) * len(taken), tokens, layer.window))
    return KvLayout(tuple(groups))

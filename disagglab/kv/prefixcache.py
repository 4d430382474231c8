"""The prefix cache of one server as vLLM 0.31.0 keeps it, requests one at a time, without a server.

The pool is a queue of free blocks. A request takes the blocks that it finds out of the queue, wherever they
stand, and its new blocks from the front; a new block loses what it was known by. Every block that is full
when the request ends is known by the hash of all tokens up to its end, and goes to the back of the queue, the
last one first, so that the end of a conversation is lost before its beginning. The block that is not full
goes to the front.

Source of the rule: ``vllm/v1/core``, ``BlockPool`` (``get_new_blocks``, ``touch``, ``free_blocks``),
``FullAttentionManager.find_longest_cache_hit`` and ``KVCacheManager.get_computed_blocks``,
``allocate_slots``. It holds for models with full attention only and for requests that end by their number of
tokens: under asynchronous scheduling a request that ends by a stop token may take one block more.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagglab.errors import InvalidRun
from disagglab.kv.shape import blocks as blocks_of

NULL_BLOCKS = 1  # vLLM sets the first block of a pool aside as a placeholder


@dataclass(frozen=True, slots=True)
class Chain:
    """A request as a block pool sees it: ``keys`` of the blocks that are full at its end, in order; the first
    ``lookup`` of them may be found; ``held`` blocks are needed in all.
    """

    keys: tuple[bytes, ...]
    lookup: int
    held: int


def chain(prompt_ids: Sequence[int], output_ids: Sequence[int], block_size: int) -> Chain:
    """What a request asks of a pool.

    The last token of the prompt is always computed, because its logits are needed: a request finds at most
    ``(prompt - 1) // block_size`` blocks. The last sampled token is never computed: the cache holds
    ``prompt + output - 1`` tokens at the end.

    Args:
        prompt_ids: at least one token.
        output_ids: every sampled token, a stop token too.
        block_size: tokens per KV cache block.
    """
    ids = [*prompt_ids, *output_ids[:-1]]
    keys, key = [], b""
    for start in range(0, len(ids) - block_size + 1, block_size):
        tokens = array("q", ids[start : start + block_size]).tobytes()
        key = hashlib.blake2b(key + tokens, digest_size=16).digest()
        keys.append(key)
    return Chain(tuple(keys), (len(prompt_ids) - 1) // block_size, blocks_of(len(ids), block_size))


@dataclass(frozen=True)
class Request:
    """One turn of a conversation: tokens of the whole prompt and of the answer. ``turn`` counts from 0."""

    conversation: int
    turn: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    _chains: dict[int, Chain] = field(default_factory=dict, compare=False, repr=False)

    def chain(self, block_size: int) -> Chain:
        """:func:`chain` of this request, hashed once for each block size."""
        found = self._chains.get(block_size)
        if found is None:
            found = self._chains[block_size] = chain(self.prompt_ids, self.output_ids, block_size)
        return found


class PrefixCache:
    """A server's block pool.

    Args:
        blocks: ``num_gpu_blocks``; one of them is never used.
        block_size: tokens per block.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = OrderedDict.fromkeys(range(NULL_BLOCKS, blocks))
        self._key: list[bytes | None] = [None] * blocks
        self._known: dict[bytes, list[int]] = {}  # the same tokens may lie in several blocks; oldest first

    def request(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """Tokens that a request finds; then it computes the others, and ends.

        Raises:
            InvalidRun: if the request needs more blocks than the pool has.
        """
        return self.run(chain(prompt_ids, output_ids, self.block_size))

    def find(self, wanted: Chain) -> int:
        """Tokens of its prompt that a request would find now. Changes nothing."""
        return len(self._hits(wanted)) * self.block_size

    def run(self, wanted: Chain) -> int:
        """:meth:`request` of what is hashed already."""
        free, known = self._free, self._known
        if wanted.held > len(free):
            raise InvalidRun(
                f"A request needs {wanted.held} KV blocks, the server has {len(free)}. "
                "Raise --num-gpu-blocks-override or shorten the conversations."
            )
        held = self._hits(wanted)
        found = len(held)
        for block in held:
            del free[block]
        for _ in range(wanted.held - found):
            block, _none = free.popitem(last=False)
            self._forget(block)
            held.append(block)
        for block, key in zip(held[found:], wanted.keys[found:], strict=False):
            self._key[block] = key
            known.setdefault(key, []).append(block)
        full = len(wanted.keys)
        for block in reversed(held[:full]):
            free[block] = None
        for block in held[full:]:  # one at most
            free[block] = None
            free.move_to_end(block, last=False)
        return found * self.block_size

    def _hits(self, wanted: Chain) -> list[int]:
        hits = []
        for key in wanted.keys[: wanted.lookup]:
            places = self._known.get(key)
            if places is None:
                break
            hits.append(places[0])
        return hits

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is None:
            return
        self._key[block] = None
        places = self._known[key]
        places.remove(block)
        if not places:
            del self._known[key]

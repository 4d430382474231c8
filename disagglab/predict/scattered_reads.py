"""What scattered memory costs a transfer: time as latency + pieces x a piece's time + bytes / bandwidth.

A KV cache is moved block by block. Blocks that lie apart are one descriptor each, and each costs time of its
own, however few bytes it has.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disagglab import text
from disagglab.errors import InvalidRun
from disagglab.kv.layout import KvLayout

LEAST_POINTS = 4  # one more than there are constants


@dataclass(frozen=True)
class ReadTime:
    """One kind of read: bytes and pieces of it, and its median time."""

    bytes: int
    pieces: int
    seconds: float


@dataclass(frozen=True)
class ScatterFit:
    """The three constants, none of them negative, and how well they tell what they were fitted to.

    ``bytes_per_s`` is infinite where time did not grow with bytes. ``median_factor`` and ``worst_factor``:
    by how much predicted and measured time differ, 1 for equal, 2 for half or twice.
    """

    latency_s: float
    per_piece_s: float
    bytes_per_s: float
    median_factor: float
    worst_factor: float
    points: int

    def time_s(self, size_bytes: float, pieces: float) -> float:
        """Predicted time of a read."""
        return self.latency_s + pieces * self.per_piece_s + size_bytes / self.bytes_per_s

    def even_bytes(self) -> float:
        """Size of a piece that takes as long for its bytes as for being one; infinite without a bandwidth."""
        return self.per_piece_s * self.bytes_per_s

    def __str__(self) -> str:
        return (
            f"{self.latency_s * 1e3:.3f} ms + pieces x {self.per_piece_s * 1e6:.3f} us"
            f" + bytes / {self.bytes_per_s / 1e9:.2f} GB/s"
            f" (off by a factor of {self.median_factor:.2f} in the median, {self.worst_factor:.2f} at most,"
            f" {self.points} points)"
        )


def fit(points: Sequence[ReadTime]) -> ScatterFit:
    """Least squares of relative errors, with constants of at least 0, so that short reads count like long
    ones (Lawson and Hanson's NNLS).

    Raises:
        InvalidRun: with fewer than four points, one size only, one number of pieces only, a figure that is
            not positive and finite, or where no constant is above 0.
    """
    import numpy as np
    import scipy.optimize

    sizes, counts = {point.bytes for point in points}, {point.pieces for point in points}
    if len(points) < LEAST_POINTS or len(sizes) < 2 or len(counts) < 2:
        raise InvalidRun(
            f"{len(points)} points of {len(sizes)} sizes and {len(counts)} numbers of pieces decide no"
            f" fit; {LEAST_POINTS} of two and two are needed"
        )
    if not all(_usable(value) for one in points for value in (one.bytes, one.pieces, one.seconds)):
        raise InvalidRun(f"bytes, pieces and seconds of a read must be positive and finite: {list(points)}")
    table = np.array([[1.0, point.pieces, point.bytes] for point in points])
    table /= np.array([[point.seconds] for point in points])
    scale = table.max(axis=0)  # columns of like size, for the arithmetic's sake
    found, _ = scipy.optimize.nnls(table / scale, np.ones(len(points)))
    latency, per_piece, per_byte = (float(constant) for constant in found / scale)
    shares = [float(share) for share in table @ (found / scale)]
    if not all(map(_usable, shares)):
        raise InvalidRun(f"no constants fit these reads: {list(points)}")
    factors = [max(share, 1 / share) for share in shares]
    return ScatterFit(
        latency_s=latency,
        per_piece_s=per_piece,
        bytes_per_s=1 / per_byte if per_byte else float("inf"),
        median_factor=statistics.median(factors),
        worst_factor=max(factors),
        points=len(points),
    )


def _usable(value: float) -> bool:
    """Whether it is positive, and neither it nor its reciprocal is too large for a number."""
    return 1 / sys.float_info.max < value < sys.float_info.max


def points(rows: Sequence[Mapping[str, Any]]) -> list[ReadTime]:
    """The probe's rows (:func:`disagglab.measure.oracles.nixlprobe.between_nodes`) of single reads as points.

    The first repeat of a row is left out: it also connects, or maps memory.

    Raises:
        InvalidRun: if a row has one repeat only.
    """
    if any(len(row["seconds"]) < 2 for row in rows):
        raise InvalidRun("the first repeat of a read does not count; two are needed")
    single = [row for row in rows if row["at_once"] == 1]
    return [ReadTime(row["bytes"], row["pieces"], statistics.median(row["seconds"][1:])) for row in single]


def descriptors(blocks: KvLayout, tokens: int, vllm_version: str, cross_layer: bool = False) -> int:
    """Descriptors of a prompt's transfer when no two of its blocks lie side by side.

    Args:
        blocks: the model's KV cache in blocks.
        cross_layer: whether all layers of a block lie together (``enable_cross_layers_blocks``), so that a
            block is one descriptor; else it is one in each layer.

    Raises:
        ConfigError: if the block rule of this vLLM version is not known.
        ValueError: for ``cross_layer`` and a hybrid model, whose groups vLLM keeps apart.
    """
    moved_bytes = blocks.bytes_to_move(tokens, vllm_version)
    if len(blocks.groups) > 1:
        if cross_layer:
            raise ValueError(f"{len(blocks.groups)} groups of layers do not lie together in a block")
        return moved_bytes // blocks.groups[0].page_bytes[0]  # pages of all groups have one size
    (group,) = blocks.groups
    return group.blocks_to_move(tokens) * (1 if cross_layer else len(group.page_bytes))


def lines(rows: Sequence[Mapping[str, Any]], found: ScatterFit | None) -> list[str]:
    """The probe's rows as a table, with what the fit says of each single read."""
    head = ("MiB", "pieces", "KiB each", "at once", "used", "median ms", "min", "max", "post ms", "GB/s")
    table: list[tuple[str, ...]] = [(*head, "predicted ms")]
    for row in rows:
        times = [seconds * 1e3 for seconds in row["seconds"][1:]]
        median, total = statistics.median(times), row["bytes"] * row["at_once"]
        said = found.time_s(row["bytes"], row["pieces"]) if found and row["at_once"] == 1 else None
        table.append(
            (
                f"{row['bytes'] / 2**20:g}",
                f"{row['pieces']:,}",
                f"{row['bytes'] / row['pieces'] / 2**10:g}",
                str(row["at_once"]),
                f"{statistics.median(row['descriptors']):,.0f}",
                *(f"{value:.3f}" for value in (median, min(times), max(times))),
                f"{statistics.median(row['post_s'][1:]) * 1e3:.3f}",
                f"{total / median / 1e6:.2f}",
                "" if said is None else f"{said * 1e3:.3f}",
            )
        )
    return text.table(table, right=range(len(table[0])))

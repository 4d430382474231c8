"""What scattered blocks cost on the bare link: reads of equal bytes in more and more pieces, no servers.

Two bare processes with the settings of the lab's servers, in the memory that KV transfers use. The oracles
are the content (every 64-bit word tells its place in the other pool) and NIXL's own count of descriptors.
Times are recorded; what is asserted of them holds whatever the hardware.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from disagglab.config.schema import Lab
from disagglab.hosts.hosts import Hosts
from disagglab.measure.oracles import nixlprobe
from disagglab.measure.oracles.nixlprobe import Read
from disagglab.predict import scattered_reads
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder

MIB = 2**20
SIZES = {"DRAM": (4 * MIB, 16 * MIB), "VRAM": (256 * MIB, 1024 * MIB)}
SHORT_SIZES = {"DRAM": (MIB, 4 * MIB), "VRAM": (256 * MIB, 1024 * MIB)}
PIECES = (1, 16, 128, 1024, 4096)
AT_ONCE, PIECES_AT_ONCE = (1, 4, 16), 512
REPEATS, SHORT_REPEATS = 10, 6
LIMIT_S = 300.0
WITHIN = 2.0  # factor between fit and measurement, in the median; the rows span a factor of ten and more

Row = dict[str, Any]


def probed(hosts: Hosts, lab: Lab, live: Session, name: str, reads: list[Read]) -> tuple[list[Row], str]:
    """The probe's rows, one a read, and its command."""
    repeats = SHORT_REPEATS if live.short else REPEATS
    rows, command = nixlprobe.between_nodes(hosts, lab, name, reads, repeats + 1, LIMIT_S)
    assert len(rows) == len(reads), f"{len(reads)} kinds of reads were asked for, {len(rows)} reported"
    return rows, command


def sizes(lab: Lab, live: Session) -> tuple[int, ...]:
    """Bytes of a read on this lab."""
    return (SHORT_SIZES if live.short else SIZES)[nixlprobe.memory_of(lab)]


def record_row(record: Recorder, row: Row, command: str) -> None:
    """Time and rate of one kind of read, without the first repeat, which also connects."""
    what = f"{row['bytes'] // MIB} MiB in {row['pieces']} pieces"
    if row["at_once"] > 1:
        what += f", {row['at_once']} reads at once"
    times, total = row["seconds"][1:], row["bytes"] * row["at_once"]
    share = statistics.median(row["post_s"][1:]) / statistics.median(times)
    note = f"{row['memory']}, {row['threads']} threads; posting took {share:.0%} of it"
    record.numbers(f"NIXL read, {what}", times, "s", what="reads", command=command, note=note)
    record.numbers(f"NIXL rate, {what}", [total / time / 1e9 for time in times], "GB/s", what="reads")


@pytest.fixture(scope="module")
def scattered(hosts: Hosts, lab: Lab, live: Session) -> tuple[list[Row], str]:
    """Reads one at a time, of two sizes and five numbers of pieces."""
    reads = [Read(size, pieces) for size, pieces in itertools.product(sizes(lab, live), PIECES)]
    return probed(hosts, lab, live, "nixlprobe-scatter", reads)


@pytest.fixture(scope="module")
def together(hosts: Hosts, lab: Lab, live: Session) -> tuple[list[Row], str]:
    """Reads of the smaller size, 1, 4 and 16 posted at once."""
    size = min(sizes(lab, live))
    reads = [Read(size, PIECES_AT_ONCE, at_once) for at_once in AT_ONCE]
    return probed(hosts, lab, live, "nixlprobe-scatter-at-once", reads)


def test_every_scattered_byte_arrives(
    scattered: tuple[list[Row], str], record: Recorder, timing: Callable[..., None]
) -> None:
    """Pieces from scattered places of one memory arrive at scattered places of another, byte for byte.

    A scatter-gather list in one picture: two page tables, two lists of page numbers, one request. No page is
    copied to a common buffer first; each is a transfer of its own below one handle.
    """
    rows, command = scattered
    for row in rows:
        record_row(record, row, command)
    timing(rows[-1]["seconds"][1:], bytes=rows[-1]["bytes"], pieces=rows[-1]["pieces"], command=command)
    damaged = [(row["bytes"], row["pieces"]) for row in rows if not row["equal"]]
    assert not damaged, f"read, and differ from what the other process holds: (bytes, pieces) {damaged}"


def test_scattered_pieces_are_not_merged(scattered: tuple[list[Row], str]) -> None:
    """NIXL moves as many descriptors as there are pieces.

    It joins descriptors that lie side by side in both memories. If it could here, the times below would be
    those of fewer, larger pieces.
    """
    rows, _ = scattered
    used = {(row["bytes"], row["pieces"]): set(row["descriptors"]) for row in rows}
    assert used == {(size, pieces): {pieces} for size, pieces in used}


def test_more_pieces_of_the_same_bytes_are_not_faster(scattered: tuple[list[Row], str]) -> None:
    """A read in 4,096 pieces is not clearly faster than one of the same bytes in one piece.

    Clearly faster would be: each of its repeats beats each of the other's. By chance alone that happens once
    in 184,756 times (10 repeats each; with --short 6 each, once in 924).
    """
    rows, _ = scattered
    times = {(row["bytes"], row["pieces"]): row["seconds"][1:] for row in rows}
    for size in {size for size, _ in times}:
        whole, parts = times[size, min(PIECES)], times[size, max(PIECES)]
        assert max(parts) >= min(whole), (
            f"{size} B in {max(PIECES)} pieces took {max(parts):.6f} s at most, in one {min(whole):.6f} s at"
            " least: something else than pieces differs"
        )


def test_time_is_latency_plus_pieces_plus_bytes(
    scattered: tuple[list[Row], str], lab: Lab, record: Recorder
) -> None:
    """Latency, a time per piece and a bandwidth tell the time of a read within a factor of 2 in the median.

    So a prompt's transfer is known before a server runs: its blocks and layers give the pieces, its tokens
    the bytes. The product of a piece's time and the bandwidth is the size at which a piece takes as long for
    being one as for its bytes; blocks below it are what makes transfers slow.
    """
    rows, command = scattered
    found = scattered_reads.fit(scattered_reads.points(rows))
    note = f"worst factor {found.worst_factor:.2f}, median {found.median_factor:.2f}, {found.points} points"
    constants = (("latency", found.latency_s * 1e3, "ms"), ("time per piece", found.per_piece_s * 1e6, "us"))
    for name, value, unit in constants:
        record.numbers(f"scattered read: {name}", [value], unit, what="fit", note=note, command=command)
    if found.bytes_per_s < float("inf"):
        rate, even = found.bytes_per_s / 1e9, found.even_bytes() / 1024
        record.numbers("scattered read: bandwidth", [rate], "GB/s", what="fit", note=note, command=command)
        record.numbers("scattered read: size of an even piece", [even], "KiB", what="fit", note=note)
    series: dict[str, tuple[list[float], list[float]]] = {}
    for size in sorted({row["bytes"] for row in rows}):
        mine = [row for row in rows if row["bytes"] == size]
        pieces = [float(row["pieces"]) for row in mine]
        measured = [statistics.median(row["seconds"][1:]) * 1e3 for row in mine]
        series[f"{size // MIB} MiB"] = (pieces, measured)
        series[f"{size // MIB} MiB, fitted"] = (pieces, [found.time_s(size, n) * 1e3 for n in pieces])
    record.plot(
        "NIXL read time by number of pieces", "pieces", "ms", series, "points and their lines", f"{found}."
    )
    assert found.median_factor < WITHIN, f"the model does not tell these times: {found}"


def test_reads_at_once_arrive(together: tuple[list[Row], str], record: Recorder) -> None:
    """Up to 16 reads of the same memory, posted together, all arrive intact and unmerged.

    Serving does that: each request's KV transfer is a read of its own. What they reach together is the rate
    that a burst of prompts sees; each of them waits for the others.
    """
    rows, command = together
    for row in rows:
        record_row(record, row, command)
    rates = [row["bytes"] * row["at_once"] / statistics.median(row["seconds"][1:]) / 1e9 for row in rows]
    record.plot(
        f"NIXL rate by reads at once, {PIECES_AT_ONCE} pieces each",
        "reads at once",
        "GB/s, all together",
        {"median": ([float(row["at_once"]) for row in rows], rates)},
    )
    assert [row["at_once"] for row in rows] == list(AT_ONCE)
    assert all(row["equal"] for row in rows), f"bytes arrived damaged: {rows}"
    used = {row["at_once"]: set(row["descriptors"]) for row in rows}
    assert used == {at_once: {PIECES_AT_ONCE * at_once} for at_once in AT_ONCE}

"""What a KV transfer costs: latency + bytes / bandwidth, fitted to the connector's own times.

Every transfer is proved to the byte before its time counts. The same prompt is transferred again and again:
its blocks stay in prefill's prefix cache, and a fresh salt on the decode side hides what it fetched before.
Beside it stands the raw link: one NIXL read of as many bytes between two bare processes with the same
settings.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab.config.schema import Lab
from disagglab.hosts.hosts import Hosts
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.oracles import nixlprobe
from disagglab.measure.transfer import transfer
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.serving.topology import Topology
from disagglab.stats import linefit
from disagglab.stats.linefit import LineFit
from disagglab.stats.metric import percentile

BLOCKS = (1, 4, 8, 16, 24)
REPEATS, SHORT_REPEATS = 10, 5
PROBE_LIMIT_S = 300.0

Measured = dict[int, list[float]]  # bytes: seconds of each transfer


@pytest.fixture(scope="module")
def transfers(
    prefix_cache: None, disaggregated: Topology, lab: Lab, shape: KvShape, live: Session
) -> Measured:
    """Transfer times by bytes; the first one of each length fills prefill's cache and warms the path."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    repeats = SHORT_REPEATS if live.short else REPEATS
    found: Measured = {}
    for count in BLOCKS:
        books = [
            transfer(disaggregated, count * block, number, lab, shape, block) for number in range(repeats + 1)
        ]
        found[books[0].kv_bytes] = [book.transfer_s for book in books[1:]]
    return found


@pytest.fixture(scope="module")
def raw(transfers: Measured, hosts: Hosts, lab: Lab, live: Session) -> tuple[Measured, str]:
    """NIXL reads of the same sizes between two bare processes, and the command."""
    repeats = SHORT_REPEATS if live.short else REPEATS
    reads = [nixlprobe.Read(size) for size in transfers]
    rows, command = nixlprobe.between_nodes(
        hosts, lab, "nixlprobe-transfer", reads, repeats + 1, PROBE_LIMIT_S
    )
    assert all(row["equal"] for row in rows), f"bytes arrived damaged: {rows}"
    return {row["bytes"]: row["seconds"][1:] for row in rows}, command  # the first read also connects


def fitted(measured: Measured) -> LineFit:
    """The line through all points."""
    sizes = [size for size, times in measured.items() for _ in times]
    return linefit.fit(sizes, [seconds for times in measured.values() for seconds in times])


def record_line(record: Recorder, what: str, line: LineFit, command: str = "") -> None:
    """Both constants with their intervals."""
    low, high = (rate / 1e9 for rate in line.bytes_per_s_ci)
    note = f"95 % CI {low:.2f} to {high:.2f}; least squares, {line.points} points, R2 {line.r_squared:.2f}"
    record.numbers(
        f"{what}: bandwidth", [line.bytes_per_s / 1e9], "GB/s", what="fit", note=note, command=command
    )
    low, high = (seconds * 1e3 for seconds in line.latency_ci_s)
    note = f"95 % CI {low:.2f} to {high:.2f}"
    record.numbers(f"{what}: latency", [line.latency_s * 1e3], "ms", what="fit", note=note, command=command)


def test_bytes_of_every_length_are_computed(
    transfers: Measured, disaggregated: Topology, lab: Lab, shape: KvShape
) -> None:
    """The sizes behind the fit are those of the arithmetic."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    blocks = layout(shape, block)
    assert list(transfers) == [blocks.bytes_to_move(count * block, lab.vllm.version) for count in BLOCKS]


def test_transfer_time_is_latency_plus_bytes_over_bandwidth(
    transfers: Measured,
    raw: tuple[Measured, str],
    lab: Lab,
    record: Recorder,
    timing: Callable[..., None],
) -> None:
    """A line explains the connector's transfer times; its slope is the bandwidth, beside that of the raw
    link.

    Latency is what a transfer of nothing would cost: posting, notification, and the wait for the engine step
    that looks for its end. Bandwidth below the raw link's is lost in small descriptors and shared cores.
    """
    line = fitted(transfers)
    by_hand, command = raw
    bare = fitted(by_hand)
    record_line(record, "KV transfer", line)
    record_line(record, "raw NIXL read", bare, command)
    share = line.bytes_per_s / bare.bytes_per_s
    record.numbers("KV transfer bandwidth / raw NIXL bandwidth", [share], "ratio", what="fit")
    sizes = list(transfers)
    for size, times in transfers.items():
        name = f"transfer time, {size / 2**20:.1f} MiB"
        record.numbers(
            name,
            times,
            "s",
            arm="disaggregated",
            what="transfers",
            note=f"predicted {line.time_s(size):.4f} s",
        )
    mebibytes = [size / 2**20 for size in sizes]
    series = {
        "measured": (
            [size / 2**20 for size, times in transfers.items() for _ in times],
            [seconds for times in transfers.values() for seconds in times],
        ),
        "predicted: latency + bytes / bandwidth": (mebibytes, [line.time_s(size) for size in sizes]),
        "raw NIXL read, median": (mebibytes, [percentile(by_hand[size], 50) or 0 for size in sizes]),
    }
    if lab.transport.link_gbit_s is not None:
        rate = lab.transport.link_gbit_s * 1e9 / 8
        series[f"arithmetic, {lab.transport.link_gbit_s:g} Gbit/s"] = (
            mebibytes,
            [size / rate for size in sizes],
        )
    record.plot(
        "KV transfer time, measured and predicted",
        "MiB moved",
        "s",
        series,
        style="points over lines",
        caption=f"latency {line.latency_s * 1e3:.1f} ms + bytes / {line.bytes_per_s / 1e9:.2f} GB/s.",
    )
    timing(transfers[sizes[-1]], kv_bytes=sizes[-1], command=command)
    slowest = line.bytes_per_s_ci[1]
    assert slowest < float("inf"), f"time does not grow with size beyond noise: {line}"

"""The link as a variable: transfer time and its share of TTFT at several rates of the link between the hosts.

The rate is set with a token bucket filter at both ends and read back from the kernel. Three parties count
what moved: connector (proved to the byte for every transfer), scheduler, and the interface. Rates take turns
within a round, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from disagglab.config.schema import Lab
from disagglab.hosts import link_counters, shaping
from disagglab.hosts.hosts import Hosts
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, transfer_time_s
from disagglab.measure import ledger
from disagglab.measure.transfer import transfer
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.serving import openai
from disagglab.serving.topology import Topology
from disagglab.stats import linefit
from disagglab.stats.metric import percentile

pytestmark = pytest.mark.lab_has("own_link")

GBIT_S, SHORT_GBIT_S = (0.6, 1.0, 2.0, 10.0, None), (0.6, 2.0, None)  # None: as fast as the machine can
BLOCKS, SHORT_BLOCKS = (1, 4, 8, 16, 24), (1, 8, 16)
ROUNDS, SHORT_ROUNDS = 5, 3
PROMPT_BLOCKS = 16  # of the request whose TTFT is looked at: 2,048 tokens in blocks of 128
OUTPUT_TOKENS = 2
BITS = 8
FRAME_SHARE = (1500 - 52) / (1500 + 14)  # payload of a full Ethernet frame; tbf counts the frame
FASTEST = 1.05  # of the rate that was set: the bucket's first burst goes at once
SLOWEST = 1.5  # of the predicted time, at the slowest rate, where the link and not the cores decides
SLOWEST_FAST, FASTEST_SLOW = 10.0, 1.0  # Gbit/s; in between nobody claims anything
SLOW_CLAIM, FAST_CLAIM = (
    (0.15, 0.30),
    0.05,
)  # share of TTFT: seeds' plain TCP, and what a fast link should show
RDMA_GBIT_S = 100.0


@dataclass
class Measured:
    """What was seen at one rate: seconds by bytes, shares of TTFT, interface's bytes over the connector's."""

    transfer_s: dict[int, list[float]] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    wire_ratio: list[float] = field(default_factory=list)

    def fit(self) -> linefit.LineFit:
        """The line through all points."""
        sizes = [size for size, times in self.transfer_s.items() for _ in times]
        return linefit.fit(sizes, [seconds for times in self.transfer_s.values() for seconds in times])


ByRate = dict[float | None, Measured]


def label(gbit_s: float | None) -> str:
    """A rate as the report calls it."""
    return "unshaped" if gbit_s is None else f"{gbit_s:g} Gbit/s"


@pytest.fixture(scope="module")
def measured(hosts: Hosts, disaggregated: Topology, lab: Lab, shape: KvShape, live: Session) -> ByRate:
    """Transfers and requests at every rate, in turns; each proved."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    rates = SHORT_GBIT_S if live.short else GBIT_S
    counts = SHORT_BLOCKS if live.short else BLOCKS
    found: ByRate = {rate: Measured() for rate in rates}
    for count in counts:  # fills prefill's cache
        transfer(disaggregated, count * block, 0, lab, shape, block, "-rates")
    number = 0
    with shaping.lifted_afterwards(hosts, lab):
        for turn in range(SHORT_ROUNDS if live.short else ROUNDS):
            for rate in rates[turn % len(rates) :] + rates[: turn % len(rates)]:
                number += 1
                shaping.set_rate(hosts, lab, None if rate is None else rate * 1e9)
                at_rate(found[rate], hosts, disaggregated, lab, shape, block, counts, number)
    return found


def at_rate(
    found: Measured, hosts: Hosts, disaggregated: Topology, lab: Lab, shape: KvShape, block: int,
    counts: tuple[int, ...], number: int,
) -> None:  # fmt: skip
    """One turn of a rate: a transfer of each size, and one cold request; the wire read around them."""
    node = lab.decode[0]
    first = link_counters.read(hosts.of(node), node)
    total = 0
    for count in counts:
        book = transfer(disaggregated, count * block, number, lab, shape, block, "-rates")
        found.transfer_s.setdefault(book.kv_bytes, []).append(book.transfer_s)
        total += book.kv_bytes
    length = PROMPT_BLOCKS * block
    before = ledger.read(disaggregated)
    request = openai.body(disaggregated.served_name, openai.prompt_of(length, 7000 + number), OUTPUT_TOKENS)
    answer = openai.complete(disaggregated.router.url, request | {"cache_salt": f"rates-{number}"})
    after = ledger.settle(disaggregated, before, 1)
    book = ledger.prove(disaggregated, before, after, [Sent(length, OUTPUT_TOKENS)], shape, lab.vllm.version)
    found.ttft_s.append(answer.ttft_s)
    found.share.append(book.transfer_s / answer.ttft_s)
    last = link_counters.read(hosts.of(node), node)
    assert first is not None
    assert last is not None
    total += book.kv_bytes
    found.wire_ratio.append(link_counters.prove(first, last, total, len(counts) + 1) / total)


def test_the_wire_carries_the_computed_bytes_at_every_rate(measured: ByRate, record: Recorder) -> None:
    """Interface bytes are the connector's plus protocol overhead, whatever the rate: nothing goes around the
    link, and nothing is sent twice.

    Lost and repeated segments would show here first: a link that drops looks fast to the sender.
    """
    for rate, row in measured.items():
        record.numbers(f"wire / connector, link {label(rate)}", row.wire_ratio, "ratio", what="turns")
        assert all(ratio >= 1 for ratio in row.wire_ratio), f"{label(rate)}: {row.wire_ratio}"


def test_transfer_time_follows_the_rate_of_the_link(
    measured: ByRate, lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """Transfers take latency + bytes / bandwidth; none beats its link; a slower link takes longer.

    Predicted: latency of the link without a limit, and the rate that was set less the frames' headers. Where
    the measured points lie above that line, something else than the link is the limit: here the cores.
    """
    free = measured[None].fit()
    series: dict[str, tuple[list[float], list[float]]] = {}
    rates = sorted(rate for rate in measured if rate is not None)
    for rate in [*rates, None]:
        row = measured[rate]
        sizes = list(row.transfer_s)
        line = row.fit()
        set_to = free.bytes_per_s if rate is None else rate * 1e9 / BITS * FRAME_SHARE
        expected = [max(free.time_s(size), free.latency_s + size / set_to) for size in sizes]
        low, high = (value / 1e9 * BITS for value in line.bytes_per_s_ci)
        record.numbers(
            f"fitted bandwidth, link {label(rate)}", [line.bytes_per_s * BITS / 1e9], "Gbit/s", what="fit",
            note=f"95 % CI {low:.3g} to {high:.3g}; latency {line.latency_s * 1e3:.2f} ms;"
            f" {line.points} points",
        )  # fmt: skip
        largest = max(sizes)
        times = row.transfer_s[largest]
        record.numbers(
            f"transfer of {largest / 2**20:.1f} MiB, link {label(rate)}", times, "s", what="transfers",
            note=f"predicted {max(expected):.4f} s; median / predicted"
            f" {(percentile(times, 50) or 0) / max(expected):.2f}",
        )  # fmt: skip
        mebibytes = [size / 2**20 for size in sizes for _ in row.transfer_s[size]]
        series[f"measured, {label(rate)}"] = mebibytes, [s for size in sizes for s in row.transfer_s[size]]
        series[f"predicted, {label(rate)}"] = [size / 2**20 for size in sizes], expected
    sizes = list(measured[None].transfer_s)
    rdma = [transfer_time_s(size, RDMA_GBIT_S * 1e9 / BITS) for size in sizes]
    series[f"arithmetic, {RDMA_GBIT_S:g} Gbit/s"] = [size / 2**20 for size in sizes], rdma
    record.plot(
        "KV transfer time at several rates of the link", "MiB moved", "s", series,
        style="points and their lines",
        caption="Points: the connector's times, each transfer proved to the byte. Lines: latency without a"
        f" limit + bytes / (rate x {FRAME_SHARE:.3f}). {RDMA_GBIT_S:g} Gbit/s is arithmetic.",
    )  # fmt: skip
    medians = {}
    for rate in rates:
        row = measured[rate]
        for size, times in row.transfer_s.items():
            least = size * BITS / (rate * 1e9) / FASTEST - shaping.BURST_S
            assert min(times) >= least, f"{size:,} B in {min(times)} s beat a link of {label(rate)}"
        medians[rate] = percentile(row.transfer_s[max(row.transfer_s)], 50) or 0.0
    slowest = rates[0]
    size = max(measured[slowest].transfer_s)
    predicted = free.latency_s + size / (slowest * 1e9 / BITS * FRAME_SHARE)
    assert medians[slowest] <= SLOWEST * predicted, (
        f"{size:,} B took {medians[slowest]:.3f} s at {label(slowest)}, predicted {predicted:.3f} s;"
        " look: tc -s qdisc show dev data0 (drops)"
    )
    assert list(medians.values()) == sorted(medians.values(), reverse=True), medians


def on_claim(gbit_s: float | None, share: float) -> str:
    """What the seeds say about such a link, and by how much it is wrong here."""
    if gbit_s is not None and FASTEST_SLOW < gbit_s < SLOWEST_FAST:
        return ""
    slow = gbit_s is not None and gbit_s <= FASTEST_SLOW
    low, high = SLOW_CLAIM if slow else (0.0, FAST_CLAIM)
    off = max(low - share, share - high, 0.0)
    held = "holds" if off == 0 else f"off by {100 * off:.1f} percentage points"
    return f"claim for a {'slow' if slow else 'fast'} link, {low:.0%} to {high:.0%}: {held}"


def test_transfer_share_of_ttft_falls_with_the_rate(
    measured: ByRate, lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """The slower the link, the larger the share of TTFT that the KV transfer takes.

    The seeds claim 15 to 30 % over plain TCP and less than 5 % over a fast link. Share = bytes / rate over
    (prefill + that), so it depends on the model and on how fast it prefills as much as on the link: a node
    that prefills ten times faster makes the same link look ten times worse.
    """
    shares = {}
    for rate, row in measured.items():
        shares[rate] = percentile(row.share, 50) or 0.0
        claim = on_claim(rate, shares[rate])
        record.numbers(f"TTFT of 16 blocks, link {label(rate)}", row.ttft_s, "s", what="requests")
        record.numbers(
            f"transfer / TTFT, link {label(rate)}", row.share, "ratio", what="requests", note=claim
        )
    block = layout(shape, lab.block_size)
    size = block.bytes_to_move(PROMPT_BLOCKS * lab.block_size, lab.vllm.version)
    others = [
        ttft * (1 - share)
        for row in measured.values()
        for ttft, share in zip(row.ttft_s, row.share, strict=True)
    ]
    rest = percentile(others, 50) or 0.0
    rdma = transfer_time_s(size, RDMA_GBIT_S * 1e9 / BITS)
    record.numbers(
        f"transfer / TTFT, {RDMA_GBIT_S:g} Gbit/s", [rdma / (rest + rdma)], "ratio", what="computed",
        note=f"{size:,} B at the nominal rate beside {rest:.3f} s for the rest of TTFT: arithmetic",
    )  # fmt: skip
    within = [size * BITS * (1 - share) / (share * rest) / FRAME_SHARE / 1e9 for share in SLOW_CLAIM]
    record.numbers(
        "links on which the claim for plain TCP holds here", within[::-1], "Gbit/s", what="computed",
        note=f"share of {SLOW_CLAIM[1]:.0%} and {SLOW_CLAIM[0]:.0%}: {size:,} B beside {rest:.3f} s;"
        " prefill k times as fast wants k times the link",
    )  # fmt: skip
    rates = sorted(rate for rate in measured if rate is not None)
    ordered = [shares[rate] for rate in rates]
    assert ordered == sorted(ordered, reverse=True), f"share of TTFT by Gbit/s: {shares}"
    assert shares[rates[0]] > shares[None], f"a slow link costs no more than a free one: {shares}"

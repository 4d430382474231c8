"""Proof of path on made-up counters: the true story passes, and each way of being wrong is caught.

The oracle is a pair of readings that a correct run would leave; every test changes one number of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.agent.supervisor import Process
from disagglab.errors import InvalidRun, TransferError
from disagglab.kv.shape import KvShape, Layer
from disagglab.measure import ledger
from disagglab.results.records import Ledger, Reading, Sent, Snapshot
from disagglab.serving import prometheus
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, Topology

SHAPE = KvShape((Layer(3, 64, 64),) * 30, "bfloat16")
BLOCK_BYTES = 128 * 23_040
SENT = [Sent(300, 8), Sent(128, 8)]  # 3 blocks and 1 block
# The same, but of the first prompt decode holds one block and prefill two: 44 tokens are new to prefill.
SENT_HELD = [Sent(300, 8, held_by_decode=128, held_by_prefill=256), Sent(128, 8)]
HELD = "disaggregated, a part held"
VERSION = "0.31.0"

COUNTERS = {
    ledger.BYTES: 0.0,
    ledger.TRANSFERS: 0.0,
    ledger.TRANSFER_TIME: 0.0,
    ledger.FAILED: 0.0,
    ledger.FAILED_NOTIFICATIONS: 0.0,
    ledger.EXPIRED: 0.0,
    ledger.FINISHED: 0.0,
    ledger.PROMPT_TOKENS: 0.0,
    ledger.GENERATED: 0.0,
    ledger.SERVED: 0.0,
    "external_kv_transfer": 0.0,
    "local_compute": 0.0,
    "local_cache_hit": 0.0,
}
SOURCES = ("external_kv_transfer", "local_compute", "local_cache_hit")


def snapshot(server: str, counters: Mapping[str, float], start: float = 1.0) -> Snapshot:
    """A scrape with these counters."""
    rows: list[tuple[str, frozenset[tuple[str, str]], float]] = [
        (prometheus.PROCESS_START, frozenset(), start),
        (ledger.CACHE_CONFIG, frozenset({("block_size", "128")}), 1.0),
    ]
    for name, value in counters.items():
        if name in SOURCES:
            rows.append((ledger.BY_SOURCE, frozenset({("source", name)}), value))
        else:
            rows.append((name, frozenset(), value))
    return Snapshot(server, f"http://{server}/metrics", tuple(rows))


def server(name: str, role: str) -> Any:
    """As much of a server as a ledger looks at."""
    return SimpleNamespace(name=name, plan=SimpleNamespace(connector=True, node=SimpleNamespace(role=role)))


A, B = server("a", "prefill"), server("b", "decode")
TOPOLOGIES: dict[str, Any] = {
    SINGLE: Topology(SINGLE, SINGLE, VERSION, None, (A,)),  # type: ignore[arg-type]
    REPLICATED: Topology(REPLICATED, REPLICATED, VERSION, None, (A, B)),  # type: ignore[arg-type]
    DISAGGREGATED: Topology(DISAGGREGATED, DISAGGREGATED, VERSION, None, (A, B), (A,), (B,)),  # type: ignore[arg-type]
    HELD: Topology(DISAGGREGATED, DISAGGREGATED, VERSION, None, (A, B), (A,), (B,)),  # type: ignore[arg-type]
}
TRUE: dict[str, dict[str, dict[str, float]]] = {
    SINGLE: {
        "a": {ledger.FINISHED: 2, ledger.PROMPT_TOKENS: 428, ledger.GENERATED: 16, "local_compute": 428}
    },
    REPLICATED: {
        "a": {ledger.FINISHED: 1, ledger.PROMPT_TOKENS: 300, ledger.GENERATED: 8, "local_compute": 300},
        "b": {ledger.FINISHED: 1, ledger.PROMPT_TOKENS: 128, ledger.GENERATED: 8, "local_compute": 128},
    },
    DISAGGREGATED: {
        "a": {ledger.FINISHED: 2, ledger.PROMPT_TOKENS: 428, ledger.GENERATED: 2, "local_compute": 428},
        "b": {
            ledger.FINISHED: 2,
            ledger.PROMPT_TOKENS: 428,
            ledger.GENERATED: 16,
            ledger.TRANSFERS: 2,
            ledger.BYTES: 4 * BLOCK_BYTES,
            ledger.TRANSFER_TIME: 0.01,
            "external_kv_transfer": 428,
        },
    },
}
TRUE[HELD] = {
    "a": {**TRUE[DISAGGREGATED]["a"], "local_compute": 44 + 128, "local_cache_hit": 256},
    "b": {
        **TRUE[DISAGGREGATED]["b"],
        ledger.BYTES: (2 + 1) * BLOCK_BYTES,
        "external_kv_transfer": (300 - 128) + 128,
        "local_cache_hit": 128,
    },
}


@dataclass(frozen=True)
class Story:
    """Two readings of a topology."""

    topology: Any
    before: Reading
    after: Reading
    sent: Sequence[Sent]

    def prove(self) -> Ledger:
        """What the ledger makes of it."""
        return ledger.prove(self.topology, self.before, self.after, self.sent, SHAPE, VERSION)


def story(name: str, **changes: float) -> Story:
    """The true story of a topology, with counters changed: ``b__BYTES=…`` (the ledger's constants)."""
    topology = TOPOLOGIES[name]
    grown = {s.name: {**COUNTERS, **TRUE[name][s.name]} for s in topology.servers}
    for key, value in changes.items():
        owner, _, counter = key.partition("__")
        grown[owner][getattr(ledger, counter, counter)] = value
    processes = {s.name: Process(100, 1) for s in topology.servers}
    before = Reading({s.name: snapshot(s.name, COUNTERS) for s in topology.servers}, processes)
    after = Reading({n: snapshot(n, c) for n, c in grown.items()}, processes)
    return Story(topology, before, after, SENT_HELD if name == HELD else SENT)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_true_story_passes(name: str) -> None:
    """Counters that a correct run leaves are accepted."""
    book = story(name).prove()
    assert book.kv_bytes == {DISAGGREGATED: 4, HELD: 3}.get(name, 0) * BLOCK_BYTES
    assert book.cached_tokens == (128 if name == HELD else 0)


def exposed(transfers: int, notifications: int, release: str) -> str:
    """NIXL's two failure counters as that release writes them, behind the metrics that every scrape needs."""
    note = ", including handshake and notification failures" if release == "0.31.0" else ""
    return f"""\
# HELP vllm:nixl_num_failed_transfers_total Number of failed NIXL KV Cache transfers{note}.
# TYPE vllm:nixl_num_failed_transfers_total counter
vllm:nixl_num_failed_transfers_total{{engine="0",model_name="M"}} {transfers}.0
# HELP vllm:nixl_num_failed_notifications_total Number of failed NIXL KV Cache notifications.
# TYPE vllm:nixl_num_failed_notifications_total counter
vllm:nixl_num_failed_notifications_total{{engine="0",model_name="M"}} {notifications}.0
"""


@pytest.mark.parametrize(
    ("release", "transfers", "notifications", "failed"),
    [("0.26.0", 2, 3, 5), ("0.30.0", 0, 3, 3), ("0.31.0", 5, 3, 5), ("0.31.0", 3, 3, 3), ("0.31.0", 0, 0, 0)],
)
def test_a_failed_notification_is_counted_once(
    release: str, transfers: int, notifications: int, failed: int
) -> None:
    """Two failed transfers and three notifications are five, whether or not the release adds them up itself;
    the texts are in the form that 0.30.0 and 0.31.0 expose.
    """
    true = story(DISAGGREGATED)
    zero, grown = (
        prometheus.parse("b", "u", exposed(*counts, release)).samples
        for counts in ((0, 0), (transfers, notifications))
    )
    readings = []
    for reading, counted in ((true.before, zero), (true.after, grown)):
        one = reading.snapshots["b"]
        kept = tuple(row for row in one.samples if row[0] not in (ledger.FAILED, ledger.FAILED_NOTIFICATIONS))
        snapshots = {**reading.snapshots, "b": replace(one, samples=kept + counted)}
        readings.append(replace(reading, snapshots=snapshots))
    topology = replace(true.topology, version=release)
    assert ledger.compare(topology, *readings).failed == failed


WRONG: list[tuple[str, dict[str, float], type[Exception], str]] = [
    (DISAGGREGATED, {"b__BYTES": 4 * BLOCK_BYTES - 1}, TransferError, "bytes moved"),
    (DISAGGREGATED, {"b__BYTES": 0}, TransferError, "bytes moved"),
    (DISAGGREGATED, {"b__TRANSFERS": 1}, TransferError, "transfers: expected 2, got 1"),
    (DISAGGREGATED, {"b__FAILED": 1}, InvalidRun, "failed transfers"),
    (DISAGGREGATED, {"b__FAILED_NOTIFICATIONS": 1}, InvalidRun, "failed transfers"),
    (DISAGGREGATED, {"a__EXPIRED": 1}, InvalidRun, "expired KV leases"),
    (
        DISAGGREGATED, {"b__external_kv_transfer": 300, "b__local_compute": 128},
        TransferError, "decode took from prefill",
    ),
    (DISAGGREGATED, {"a__local_compute": 300}, InvalidRun, "prefill computed: expected 428, got 300"),
    (DISAGGREGATED, {"b__local_compute": 1}, TransferError, "decode computed itself: expected 0, got 1"),
    (DISAGGREGATED, {"a__FINISHED": 1}, InvalidRun, "finished by prefill"),
    (DISAGGREGATED, {"b__FINISHED": 1}, InvalidRun, "finished by decode"),
    (DISAGGREGATED, {"b__GENERATED": 15}, InvalidRun, "tokens generated"),
    (DISAGGREGATED, {"b__local_cache_hit": 1}, TransferError, "decode held already: expected 0, got 1"),
    (HELD, {"b__BYTES": 4 * BLOCK_BYTES}, TransferError, "bytes moved"),
    (HELD, {"b__BYTES": 2 * BLOCK_BYTES}, TransferError, "bytes moved"),
    (HELD, {"b__local_cache_hit": 0}, TransferError, "decode held already: expected 128, got 0"),
    (HELD, {"b__local_cache_hit": 256}, TransferError, "decode held already: expected 128, got 256"),
    (HELD, {"b__external_kv_transfer": 428}, TransferError, "took from prefill: expected 300, got 428"),
    (HELD, {"b__local_compute": 1}, TransferError, "decode computed itself: expected 0, got 1"),
    (HELD, {"a__local_compute": 428}, InvalidRun, "prefill computed: expected 172, got 428"),
    (HELD, {"a__local_compute": 171}, InvalidRun, "prefill computed: expected 172, got 171"),
    (SINGLE, {"a__BYTES": 1}, InvalidRun, "bytes moved by the connector: expected 0"),
    (SINGLE, {"a__FINISHED": 3}, InvalidRun, "requests finished"),
    (SINGLE, {"a__GENERATED": 15}, InvalidRun, "tokens generated"),
    (SINGLE, {"a__local_compute": 300, "a__local_cache_hit": 128}, InvalidRun, "prompt tokens held already"),
    (SINGLE, {"a__local_compute": 427}, InvalidRun, "prompt tokens computed"),
    (REPLICATED, {"a__FINISHED": 2, "b__FINISHED": 0}, InvalidRun, "did not alternate"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "error", "message"), WRONG)
def test_every_wrong_number_is_caught(
    name: str, changes: dict[str, float], error: type[Exception], message: str
) -> None:
    """One counter off, and the run is refused with both numbers in the message."""
    with pytest.raises(error, match=message):
        story(name, **changes).prove()


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (Sent(300, 8, 128, 128), "prefill computed: expected 300, got 172"),
        (Sent(300, 8, 128, 0), "prefill computed: expected 428, got 172"),
        (Sent(300, 8, 0, 256), "bytes moved"),
        (Sent(300, 8, 256, 256), "bytes moved"),
    ],
)
def test_a_wrong_claim_of_held_blocks_is_caught(claim: Sent, message: str) -> None:
    """Who says that a server holds more or less than it does is contradicted by the counters."""
    with pytest.raises((TransferError, InvalidRun), match=message):
        replace(story(HELD), sent=[claim, SENT_HELD[1]]).prove()


def test_a_token_that_decode_recomputes_counts_as_its_own() -> None:
    """Of a prompt of one token the block moves, but decode computes the token."""
    told = story(
        DISAGGREGATED, b__FINISHED=1, a__FINISHED=1, b__TRANSFERS=1, b__BYTES=BLOCK_BYTES, a__GENERATED=1,
        b__GENERATED=8, a__local_compute=1, b__external_kv_transfer=0, b__local_compute=1,
    )  # fmt: skip
    assert replace(told, sent=[Sent(1, 8)]).prove().computed_tokens == 1


def test_time_by_the_servers_is_that_of_all_of_them() -> None:
    """Of disaggregated serving prefill's part and decode's."""
    assert story(DISAGGREGATED, a__SERVED=1.5, b__SERVED=2.25).prove().served_s == 3.75
    assert story(SINGLE, a__SERVED=1.5).prove().served_s == 1.5


def test_requests_that_wait_elsewhere_are_caught() -> None:
    """By the client four requests took 8 s. A quarter of it may pass in router and HTTP, and any share where
    it is less than 0.1 s a request.
    """
    e2e_s = [2.0] * 4

    def require(served_s: float | None, e2e_s: list[float] = e2e_s) -> None:
        ledger.require_served("single", replace(story(SINGLE).prove(), served_s=served_s), e2e_s)

    require(8.0)
    require(6.0)
    require(None)  # a file of an earlier version
    require(0.1, [0.1] * 4)
    with pytest.raises(InvalidRun, match=r"took 8\.00 s in all, by the servers 5\.90 s: 26%"):
        require(5.9)
    with pytest.raises(InvalidRun, match="in router or client"):
        require(0.0, [0.11] * 4)


def test_a_missing_metric_is_an_error_that_names_it() -> None:
    """A renamed counter must not read as zero."""
    told = story(DISAGGREGATED)
    after = told.after.snapshots["b"]
    kept = tuple(row for row in after.samples if row[0] != ledger.BYTES)
    snapshots = {**told.after.snapshots, "b": replace(after, samples=kept)}
    with pytest.raises(InvalidRun, match=f"b exposes no metric {ledger.BYTES}"):
        replace(told, after=replace(told.after, snapshots=snapshots)).prove()


def test_a_restarted_process_is_invalid() -> None:
    """Counters of another process are not compared, by pid and by the process's own start time."""
    told = story(SINGLE)
    with pytest.raises(InvalidRun, match="server processes changed"):
        replace(told, after=replace(told.after, processes={"a": Process(100, 2)})).prove()
    restarted = {"a": snapshot("a", {**COUNTERS, **TRUE[SINGLE]["a"]}, start=2.0)}
    with pytest.raises(InvalidRun, match="restarted between"):
        replace(told, after=replace(told.after, snapshots=restarted)).prove()


def test_a_counter_that_fell_is_invalid() -> None:
    """A reset counter is named, with how far it fell."""
    told = story(SINGLE)
    with pytest.raises(InvalidRun, match="fell by"):
        Story(told.topology, told.after, told.before, SENT).prove()


def test_the_prometheus_text_format_is_read() -> None:
    """Labels select, and samples that match are summed."""
    text = 'a_total{engine="0",source="x"} 2.0\na_total{engine="1",source="x"} 3.0\na_total{source="y"} 7.0\n'
    parsed = prometheus.parse("s", "http://s/metrics", text)
    assert parsed.value("a_total", source="x") == 5.0
    assert parsed.value("a_total") == 12.0
    with pytest.raises(InvalidRun, match="curl -s http://s/metrics"):
        parsed.value("a_total", source="z")


PREFIXED = [Sent(300, 8)] * 4  # of which the first 130 tokens are shared: one whole block of 128


def prefixed(a_hits: int, b_hits: int) -> Story:
    """Disaggregated serving of PREFIXED, where the servers found the shared block so many times."""
    told = story(
        DISAGGREGATED,
        a__FINISHED=4, a__PROMPT_TOKENS=1200, a__GENERATED=4, a__local_compute=1200 - 128 * a_hits,
        b__FINISHED=4, b__PROMPT_TOKENS=1200, b__GENERATED=32, b__TRANSFERS=4,
        b__BYTES=(12 - b_hits) * BLOCK_BYTES,
        b__external_kv_transfer=1200 - 128 * b_hits, b__local_cache_hit=128 * b_hits,
    )  # fmt: skip
    return replace(told, sent=PREFIXED)


@pytest.mark.parametrize(("a_hits", "b_hits"), [(3, 3), (2, 3), (3, 2)])
def test_a_shared_prefix_moves_once(a_hits: int, b_hits: int) -> None:
    """Hits are taken from the counters, and the bytes have to follow from them exactly."""
    told = prefixed(a_hits, b_hits)
    sent = ledger.with_shared_prefix(told.topology, told.before, told.after, told.sent, 130, 2)
    book = replace(told, sent=sent).prove()
    assert book.cached_tokens == 128 * b_hits
    assert book.kv_bytes == (12 - b_hits) * BLOCK_BYTES


@pytest.mark.parametrize(
    ("a_hits", "b_hits", "changes"),
    [(3, 4, {}), (3, 1, {}), (4, 3, {}), (1, 3, {}), (3, 3, {"b__local_cache_hit": 3 * 128 - 1})],
)
def test_hits_that_cannot_be_are_refused(a_hits: int, b_hits: int, changes: dict[str, float]) -> None:
    """All but the first one or two requests find the prefix, whole: nothing else is believed."""
    told = prefixed(a_hits, b_hits)
    if changes:
        wrong = story(DISAGGREGATED, **changes).after.snapshots["b"]
        told = replace(told, after=replace(told.after, snapshots={**told.after.snapshots, "b": wrong}))
    with pytest.raises(InvalidRun, match="shared prefix"):
        ledger.with_shared_prefix(told.topology, told.before, told.after, told.sent, 130, 2)


def test_bytes_do_not_follow_from_a_wrong_hit() -> None:
    """Decode says that it found the block three times, yet the connector moved all twelve blocks."""
    told = prefixed(3, 3)
    sent = ledger.with_shared_prefix(told.topology, told.before, told.after, told.sent, 130, 2)
    moved = prefixed(3, 0).after.snapshots["b"].samples
    samples = [row for row in told.after.snapshots["b"].samples if row[0] != ledger.BYTES]
    samples += [row for row in moved if row[0] == ledger.BYTES]
    after = replace(told.after.snapshots["b"], samples=tuple(samples))
    told = replace(told, after=replace(told.after, snapshots={**told.after.snapshots, "b": after}), sent=sent)
    with pytest.raises(TransferError, match="bytes moved"):
        told.prove()


def test_a_prefix_below_one_block_is_never_found() -> None:
    """Blocks are shared whole: the requests count as if they had nothing in common."""
    told = story(SINGLE)
    assert ledger.with_shared_prefix(told.topology, told.before, told.after, SENT, 127, 2) == SENT


class Catching:
    """The servers of a topology, whose counters stand still until ``late_s`` after the first look.

    The clock moves only while the wait sleeps. ``together``: every scrape waits at it, and ends only if all
    servers are asked at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, late_s: float) -> None:
        self.now_s, self.late_s = 0.0, late_s
        self.true = story(name)
        self.together = threading.Barrier(len(self.true.topology.servers), timeout=10.0)
        self.asked_s: list[float] = []
        self.running = 0.0
        monkeypatch.setattr("disagglab.waiting.time.monotonic", lambda: self.now_s)
        monkeypatch.setattr("disagglab.waiting.time.sleep", self._sleep)
        servers = {s.name: self._server(s) for s in self.true.topology.servers}
        roles = {
            role: tuple(servers[s.name] for s in getattr(self.true.topology, role))
            for role in ("servers", "prefill", "decode")
        }
        self.topology = replace(self.true.topology, **roles)

    def _sleep(self, amount_s: float) -> None:
        self.now_s += amount_s

    def _server(self, one: Any) -> Any:
        def metrics() -> Snapshot:
            if self.together.wait() == 0:
                self.asked_s.append(round(self.now_s, 9))
            told = self.true.before if self.now_s < self.late_s else self.true.after
            no_labels: frozenset[tuple[str, str]] = frozenset()
            under_way = ((ledger.RUNNING, no_labels, self.running), (ledger.WAITING, no_labels, 0.0))
            kept = told.snapshots[one.name]
            return replace(kept, samples=kept.samples + under_way)

        process = SimpleNamespace(identity=Process(100, 1))
        alive: Any = lambda: None  # noqa: E731
        return SimpleNamespace(
            name=one.name, plan=one.plan, process=process, require_alive=alive, metrics=metrics
        )

    def settle(self) -> Ledger:
        """What the ledger makes of the reading that it waited for."""
        after = ledger.settle(self.topology, self.true.before, len(SENT))
        return ledger.prove(self.topology, self.true.before, after, SENT, SHAPE, VERSION)


@pytest.mark.parametrize("name", [SINGLE, REPLICATED, DISAGGREGATED])
def test_counters_that_have_caught_up_are_read_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No pause before or after, and all servers at once."""
    servers = Catching(monkeypatch, name, late_s=0.0)
    servers.settle()
    assert servers.asked_s == [0.0]


def test_counters_that_lag_are_read_soon_again_then_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of 20, 40, 80, 160 ms, then 200 ms, until all that was sent is there: here after 0.6 s."""
    servers = Catching(monkeypatch, DISAGGREGATED, late_s=0.6)
    servers.settle()
    assert servers.asked_s == [0.0, 0.02, 0.06, 0.14, 0.3, 0.5, 0.7]


def test_counters_that_never_catch_up_are_waited_for_30_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the last reading is handed out, and the proof says what is missing."""
    servers = Catching(monkeypatch, DISAGGREGATED, late_s=math.inf)
    with pytest.raises(InvalidRun, match=r"prompt tokens that prefill computed: expected 428, got 0"):
        servers.settle()
    assert 30.0 <= servers.asked_s[-1] <= 30.2 + 0.01


def test_a_server_that_still_computes_has_not_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counters are those of the run, and yet a request is under way."""
    servers = Catching(monkeypatch, SINGLE, late_s=0.0)
    servers.running = 1.0
    servers.settle()
    assert servers.asked_s[-1] >= 30.0


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Catching(monkeypatch, REPLICATED, late_s=0.0)

    def silent() -> Snapshot:
        raise InvalidRun("b: no metrics")

    servers.together = threading.Barrier(1)
    monkeypatch.setattr(servers.topology.servers[1], "metrics", silent)
    with pytest.raises(InvalidRun, match="b: no metrics"):
        ledger.read(servers.topology)


# Servers of two ranks each: every rank of decode reads from its own rank of prefill.
FOUR_HEADS = KvShape((Layer(4, 64, 64),) * 30, "bfloat16")  # two heads a rank: 15,360 B a token and rank
ONE_HEAD = KvShape((Layer(1, 64, 64),) * 30, "bfloat16")  # a copy of it on each: 7,680 B a token and rank
LATENT = KvShape((Layer(1, 576, 0),) * 30, "bfloat16")  # not divided: 34,560 B a token and rank
BLOCKS = 3 + 1  # of SENT


@pytest.mark.parametrize(
    ("shape", "ranks", "kv_bytes"),
    [
        (FOUR_HEADS, 1, BLOCKS * 128 * 30_720),
        (FOUR_HEADS, 2, 2 * BLOCKS * 128 * 15_360),  # divided: the same bytes in all
        (FOUR_HEADS, 4, 4 * BLOCKS * 128 * 7_680),
        (FOUR_HEADS, 8, 8 * BLOCKS * 128 * 7_680),  # two ranks hold a copy of each head
        (ONE_HEAD, 1, BLOCKS * 128 * 7_680),
        (ONE_HEAD, 2, 2 * BLOCKS * 128 * 7_680),  # copied: twice the bytes
        (LATENT, 1, BLOCKS * 128 * 34_560),
        (LATENT, 2, 2 * BLOCKS * 128 * 34_560),
    ],
)
def test_bytes_of_all_ranks(shape: KvShape, ranks: int, kv_bytes: int) -> None:
    """What one keeps, times how many there are: doubled where each holds a copy, the same where heads are
    divided.
    """
    assert ledger.expected_bytes(SENT, shape, 128, VERSION, ranks) == kv_bytes


def split(shape: KvShape, ranks: int, transfers: int, kv_bytes: int) -> Ledger:
    """What the ledger makes of a disaggregated run on servers of so many ranks, by these counters."""
    told = story(DISAGGREGATED, b__TRANSFERS=transfers, b__BYTES=kv_bytes)
    topology = replace(told.topology, ranks=ranks)
    return ledger.prove(topology, told.before, told.after, told.sent, shape, VERSION)


@pytest.mark.parametrize(
    ("shape", "kv_bytes"), [(FOUR_HEADS, BLOCKS * 128 * 30_720), (ONE_HEAD, 2 * BLOCKS * 128 * 7_680)]
)
def test_every_rank_makes_a_transfer_of_its_own(shape: KvShape, kv_bytes: int) -> None:
    """Two requests and two ranks: four transfers. Any other count of transfers or bytes is refused, also
    what one rank alone would have moved.
    """
    book = split(shape, 2, 4, kv_bytes)
    assert (book.transfers, book.kv_bytes) == (4, kv_bytes)
    with pytest.raises(TransferError, match="transfers: expected 4, got 2"):
        split(shape, 2, 2, kv_bytes)
    with pytest.raises(TransferError, match="bytes moved by the connector: expected"):
        split(shape, 2, 4, kv_bytes // 2)
    with pytest.raises(TransferError, match="transfers: expected 2, got 4"):
        split(shape, 1, 4, kv_bytes)


def test_a_copied_head_moves_more_than_a_server_of_one_rank_would() -> None:
    """The bytes of one rank are wrong for two, and the other way round."""
    one, two = (BLOCKS * 128 * 7_680 * ranks for ranks in (1, 2))
    split(ONE_HEAD, 1, 2, one)
    for ranks, transfers, kv_bytes in ((2, 4, one), (1, 2, two)):
        with pytest.raises(TransferError, match=f"expected {3 * one - kv_bytes:,}, got {kv_bytes:,}"):
            split(ONE_HEAD, ranks, transfers, kv_bytes)


def test_ranks_share_the_transfers_of_each_server_that_pulls() -> None:
    """Two decode servers of two ranks, a request each: two transfers each, not three and one."""
    other = server("c", "decode")
    told = story(DISAGGREGATED)
    servers = (A, B, other)
    topology = replace(told.topology, servers=servers, decode=(B, other), ranks=2)

    def grown(b: int, c: int) -> Reading:
        common = {**COUNTERS, ledger.FINISHED: 1, ledger.GENERATED: 8}
        b_counts = {**common, ledger.PROMPT_TOKENS: 300, "external_kv_transfer": 300, ledger.TRANSFERS: b}
        c_counts = {**common, ledger.PROMPT_TOKENS: 128, "external_kv_transfer": 128, ledger.TRANSFERS: c}
        b_counts[ledger.BYTES], c_counts[ledger.BYTES] = 3 * 128 * 30_720, 128 * 30_720
        counts = {"a": {**COUNTERS, **TRUE[DISAGGREGATED]["a"]}, "b": b_counts, "c": c_counts}
        return Reading({name: snapshot(name, found) for name, found in counts.items()}, processes)

    processes = {name: Process(100, 1) for name in "abc"}
    before = Reading({name: snapshot(name, COUNTERS) for name in "abc"}, processes)
    assert ledger.prove(topology, before, grown(2, 2), SENT, FOUR_HEADS, VERSION).transfers == 4
    with pytest.raises(
        TransferError, match="transfers by b, which finished as many requests: expected 2, got 3"
    ):
        ledger.prove(topology, before, grown(3, 1), SENT, FOUR_HEADS, VERSION)


def test_a_sharded_server_moves_no_kv() -> None:
    """One server of two ranks without a connector: its counters are those of a single one."""
    told = story(SINGLE)
    topology = replace(told.topology, name="sharded", kind="sharded", ranks=2)
    assert replace(told, topology=topology).prove().transfers == 0
    with pytest.raises(InvalidRun, match="bytes moved by the connector: expected 0"):
        replace(story(SINGLE, a__BYTES=1), topology=topology).prove()

"""Proof of path: what the servers' own counters say about a run, checked against what was sent and computed.

No figure is stored before :func:`prove` has returned. Three rules: a counter that is missing is an error, a
counter that was reset makes the run invalid, and the router's word counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from disagglab import waiting
from disagglab.errors import InvalidRun, TransferError
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, tokens_from_prefill
from disagglab.results.records import Ledger, Reading, Sent, Snapshot
from disagglab.results.seconds import Phase, spends
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, Topology
from disagglab.serving.vllm import VllmServer

SETTLE_DEADLINE_S = 30.0  # counters follow a finished request by an engine step, leases by a notification
FIRST_POLL_S, POLL_S = 0.02, 0.2  # most have caught up at the first or the second look

BYTES = "vllm:nixl_bytes_transferred_sum"
TRANSFERS = "vllm:nixl_bytes_transferred_count"
TRANSFER_TIME = "vllm:nixl_xfer_time_seconds_sum"
FAILED = "vllm:nixl_num_failed_transfers_total"
FAILED_NOTIFICATIONS = "vllm:nixl_num_failed_notifications_total"
NOTIFICATIONS_APART_UNTIL = (0, 30)  # the last vLLM release whose FAILED does not hold them; see failures
EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"
FINISHED = "vllm:request_success_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATED = "vllm:generation_tokens_total"
BY_SOURCE = "vllm:prompt_tokens_by_source_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_CONFIG = "vllm:cache_config_info"
QUERIED = "vllm:prefix_cache_queries_total"
FOUND = "vllm:prefix_cache_hits_total"
SERVED = "vllm:e2e_request_latency_seconds_sum"
METRICS = (
    BYTES,
    TRANSFERS,
    TRANSFER_TIME,
    FAILED,
    FAILED_NOTIFICATIONS,
    EXPIRED,
    FINISHED,
    PROMPT_TOKENS,
    GENERATED,
    BY_SOURCE,
    RUNNING,
    WAITING,
    CACHE_CONFIG,
    QUERIED,
    FOUND,
    SERVED,
)  # all that a ledger needs of a server

# How much of the requests' time may pass elsewhere than in servers, in router and HTTP. The most that was
# seen is 0.074 s a request, and 11 % where an answer took 0.1 to 0.25 s (docs/reference/metrics.md).
ELSEWHERE_SHARE = 0.25
ELSEWHERE_S = 0.1  # for each request; below it any share may pass, as answers may be short


@spends(Phase.COUNTERS)
def read(topology: Topology) -> Reading:
    """Scrape every server of a topology, all at once.

    Raises:
        InvalidRun: if one has died or does not answer.
    """
    servers = topology.servers
    for server in servers:
        server.require_alive()
    with ThreadPoolExecutor(len(servers)) as pool:
        snapshots = list(pool.map(lambda server: server.metrics(), servers))
    return Reading(
        {server.name: snapshot for server, snapshot in zip(servers, snapshots, strict=True)},
        {server.name: server.process.identity for server in servers},
    )


def block_size(snapshot: Snapshot) -> int:
    """Tokens per KV cache block, as the server reports it.

    Raises:
        InvalidRun: if it reports none.
    """
    return int(cache_config(snapshot)["block_size"])


def cache_config(snapshot: Snapshot) -> dict[str, str]:
    """The labels of ``vllm:cache_config_info``.

    Raises:
        InvalidRun: if the server exposes none.
    """
    for name, labels, _ in snapshot.samples:
        if name == CACHE_CONFIG:
            return dict(labels)
    raise InvalidRun(
        f"{snapshot.server} exposes no {CACHE_CONFIG}; look: curl -s {snapshot.url} | grep cache_config"
    )


@spends(Phase.COUNTERS)
def settle(topology: Topology, before: Reading, requests: int) -> Reading:
    """Read again once the counters have caught up with ``requests`` finished ones, at the latest at the
    deadline.

    A reading that has not caught up is returned all the same; :func:`prove` then says what is missing.
    """
    finishing = topology.decode or topology.servers
    after = before

    def caught_up() -> bool:
        nonlocal after
        after = read(topology)
        finished = sum(_delta(before, after, server.name, FINISHED) for server in finishing)
        idle = all(s.value(RUNNING) + s.value(WAITING) == 0 for s in after.snapshots.values())
        connected = (server for server in topology.servers if server.plan.connector)
        moved = sum(_delta(before, after, server.name, TRANSFERS) for server in connected)
        return finished >= requests and idle and (not topology.decode or moved >= requests * topology.ranks)

    waiting.last_answer(caught_up, SETTLE_DEADLINE_S, POLL_S, FIRST_POLL_S)
    return after


def _delta(before: Reading, after: Reading, server: str, name: str, **labels: str) -> float:
    return delta(before.snapshots[server], after.snapshots[server], name, **labels)


def failures(version: str, transfers: int, notifications: int) -> int:
    """Failed transfers and notifications of one server, each counted once.

    Args:
        version: of vLLM. Up to 0.30 ``vllm:nixl_num_failed_transfers`` leaves notifications out; from 0.31 on
            it counts them (and failed handshakes) too, and the other counter is "retained for compatibility".
            Source: ``NixlPromMetrics.observe`` in
            ``vllm/distributed/kv_transfer/kv_connector/v1/nixl/stats.py`` of 0.26.0, 0.30.0 and 0.31.0.
        transfers: growth of FAILED.
        notifications: growth of FAILED_NOTIFICATIONS.
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    apart = release <= NOTIFICATIONS_APART_UNTIL
    return transfers + notifications if apart else max(transfers, notifications)


def compare(topology: Topology, before: Reading, after: Reading) -> Ledger:
    """What the counters grew by between two readings of the same processes.

    Raises:
        InvalidRun: if a process is another one, a metric is missing or was reset.
    """
    if before.processes != after.processes:
        raise InvalidRun(f"{topology.name}: server processes changed during the run")
    names = [server.name for server in topology.servers]

    def by_server(metric: str) -> dict[str, int]:
        return {name: round(_delta(before, after, name, metric)) for name in names}

    def total(servers: Sequence[str], metric: str, **labels: str) -> float:
        return sum(_delta(before, after, name, metric, **labels) for name in servers)

    decode = [server.name for server in topology.decode] or names
    prefill = [server.name for server in topology.prefill]
    connected = [server.name for server in topology.servers if server.plan.connector]
    return Ledger(
        finished=by_server(FINISHED),
        prompt_tokens=by_server(PROMPT_TOKENS),
        generated=by_server(GENERATED),
        kv_bytes=round(total(connected, BYTES)),
        transfers=round(total(connected, TRANSFERS)),
        transfer_s=total(connected, TRANSFER_TIME),
        failed=sum(
            failures(topology.version, *(round(total([name], one)) for one in (FAILED, FAILED_NOTIFICATIONS)))
            for name in connected
        ),
        expired=round(total(connected, EXPIRED)),
        external_tokens=round(total(decode, BY_SOURCE, source="external_kv_transfer")),
        computed_tokens=round(total(decode, BY_SOURCE, source="local_compute")),
        cached_tokens=round(total(decode, BY_SOURCE, source="local_cache_hit")),
        prefill_computed_tokens=round(total(prefill, BY_SOURCE, source="local_compute")),
        kv_bytes_by={name: round(total([name], BYTES)) for name in connected},
        transfers_by={name: round(total([name], TRANSFERS)) for name in connected},
        served_s=total(names, SERVED),
    )


def with_shared_prefix(
    topology: Topology, before: Reading, after: Reading, sent: Sequence[Sent], prefix: int, under_way: int
) -> list[Sent]:
    """The requests, with what the prefix caches held of a prefix that all of them share.

    How many find the prefix depends on timing, so it is taken from the counters; that it is found whole or
    not at all, and by all but the first ones, is checked.

    Args:
        prefix: length of the shared prefix, tokens.
        under_way: the most requests that were under way at once.

    Raises:
        InvalidRun: if the hits are no multiple of the prefix's whole blocks, or too few or too many.
    """
    book = compare(topology, before, after)
    held = prefix // _block(topology, after) * _block(topology, after)
    if not held:
        return list(sent)  # not one whole block: no server can find it
    fresh = sum(request.prompt_tokens for request in sent)

    def hits(what: str, tokens: int, servers: int) -> int:
        count, rest = divmod(tokens, held)
        misses = len(sent) - count
        if rest or not min(servers, len(sent)) <= misses <= servers * under_way:
            raise InvalidRun(
                f"{topology.name}: {what} found {tokens:,} tokens of a shared prefix in its cache: expected"
                f" {held} for each request but the first {servers} to {servers * under_way} of {len(sent)}"
            )
        return count

    servers = len(topology.decode or topology.servers)
    by_decode = hits("the server that decodes", book.cached_tokens, servers)
    by_prefill = 0
    if topology.prefill:
        by_prefill = hits("prefill", fresh - book.prefill_computed_tokens, len(topology.prefill))
    return [
        replace(
            request,
            held_by_decode=held * (number < by_decode),
            held_by_prefill=held * (number < by_prefill),
        )
        for number, request in enumerate(sent)
    ]


def expected_bytes(sent: Sequence[Sent], shape: KvShape, block: int, version: str, ranks: int = 1) -> int:
    """Bytes the connector must move for these prompts: the blocks that the decode server does not hold.

    ``ranks``: of each server; every rank of decode reads from its own rank of prefill what that one keeps.
    """
    blocks = layout(shape.on_rank(ranks), block)
    return ranks * sum(
        blocks.bytes_to_move(request.prompt_tokens, version, request.held_by_decode) for request in sent
    )


def prove(
    topology: Topology, before: Reading, after: Reading, sent: Sequence[Sent], shape: KvShape, version: str
) -> Ledger:
    """Check that the run took the path it claims; return its ledger.

    Raises:
        InvalidRun: if requests, tokens or their split over the servers do not add up.
        TransferError: if KV moved where none should, did not move, or not exactly as computed.
    """
    book = compare(topology, before, after)
    where = topology.name
    _equal(where, "failed transfers and notifications", book.failed, 0)
    _equal(where, "expired KV leases", book.expired, 0)
    output = sum(request.output_tokens for request in sent)
    prompt = sum(request.prompt_tokens for request in sent)
    if topology.kind == DISAGGREGATED:
        block = _block(topology, after)
        expected = expected_bytes(sent, shape, block, version, topology.ranks)
        _prove_transfer(topology, book, sent, expected)
        # the prefill server adds the one token that it generates to finish its part
        _equal(where, "tokens generated", sum(book.generated.values()), output + len(sent))
        return book
    _equal(where, "bytes moved by the connector", book.kv_bytes, 0)
    _equal(where, "requests finished", sum(book.finished.values()), len(sent))
    _equal(where, "prompt tokens", sum(book.prompt_tokens.values()), prompt)
    held = sum(request.held_by_decode for request in sent)
    _equal(where, "prompt tokens held already", book.cached_tokens, held)
    _equal(where, "prompt tokens computed", book.computed_tokens, prompt - held)
    _equal(where, "tokens generated", sum(book.generated.values()), output)
    if topology.kind == REPLICATED:
        _prove_alternation(where, topology.servers, book)
    return book


def require_served(where: str, book: Ledger, e2e_s: Sequence[float]) -> None:
    """Refuse a run whose requests spent much of their time elsewhere than in the servers.

    Little's law makes it one account of the mean number in system against another: both sums over the same
    duration. What the client has more is in router and HTTP, or waits in the client.

    Args:
        e2e_s: of every request, as the client saw it.

    Raises:
        InvalidRun: if it is more than ``ELSEWHERE_SHARE`` of the client's, and more than ``ELSEWHERE_S`` a
            request.
    """
    if book.served_s is None:
        return
    spent = math.fsum(e2e_s)
    elsewhere = spent - book.served_s
    if elsewhere > max(ELSEWHERE_SHARE * spent, ELSEWHERE_S * len(e2e_s)):
        raise InvalidRun(
            f"{where}: by the client the requests took {spent:.2f} s in all, by the servers"
            f" {book.served_s:.2f} s: {elsewhere / spent:.0%} of the time passed in router or client;"
            " look at the log of the router, and at the client's CPU and limits (open files, connections)"
        )


def _prove_alternation(where: str, servers: Sequence[VllmServer], book: Ledger) -> None:
    """Round robin over equal servers leaves shares that differ by at most one request."""
    share = {server.name: book.finished[server.name] for server in servers}
    if max(share.values()) - min(share.values()) > 1:
        raise InvalidRun(f"{where}: round robin did not alternate: requests by server {share}")


def _prove_transfer(topology: Topology, book: Ledger, sent: Sequence[Sent], expected: int) -> None:
    where = topology.name
    fresh = sum(request.prompt_tokens - request.held_by_prefill for request in sent)
    _equal(where, "prompt tokens that prefill computed", book.prefill_computed_tokens, fresh)
    finished = {
        role: sum(book.finished[s.name] for s in getattr(topology, role)) for role in ("prefill", "decode")
    }
    _equal(where, "requests finished by prefill", finished["prefill"], len(sent))
    _equal(where, "requests finished by decode", finished["decode"], len(sent))
    for role in (topology.prefill, topology.decode):
        _prove_alternation(where, role, book)
    ranks = topology.ranks  # each makes a transfer of its own
    _equal(where, "transfers", book.transfers, len(sent) * ranks, TransferError)
    pulled = any(book.transfers_by[server.name] for server in topology.decode)
    for server in topology.decode if pulled else topology.prefill:
        what = f"transfers by {server.name}, which finished as many requests"
        moved = book.transfers_by[server.name]
        _equal(where, what, moved, book.finished[server.name] * ranks, TransferError)
    _equal(where, "bytes moved by the connector", book.kv_bytes, expected, TransferError)
    held = sum(request.held_by_decode for request in sent)
    external = sum(tokens_from_prefill(request.prompt_tokens) for request in sent) - held
    computed = sum(request.prompt_tokens for request in sent) - external - held
    _equal(where, "prompt tokens that decode held already", book.cached_tokens, held, TransferError)
    _equal(
        where, "prompt tokens that decode took from prefill", book.external_tokens, external, TransferError
    )
    _equal(where, "prompt tokens that decode computed itself", book.computed_tokens, computed, TransferError)


def _block(topology: Topology, reading: Reading) -> int:
    sizes = {block_size(reading.snapshots[server.name]) for server in topology.servers}
    if len(sizes) != 1:
        raise InvalidRun(f"{topology.name}: servers have different block sizes: {sorted(sizes)}")
    return sizes.pop()


def _equal(
    where: str, what: str, got: int, expected: int, error: type[InvalidRun | TransferError] = InvalidRun
) -> None:
    if got != expected:
        raise error(f"{where}: {what}: expected {expected:,}, got {got:,}")

"""Where the time of one disaggregated request goes.

The client's clock measures the whole; the two servers' histograms measure their parts. Parts measured inside
the servers cannot exceed the whole measured outside, so those bounds are strict; what remains is router and
HTTP.
"""

from __future__ import annotations

from collections.abc import Callable

from disagglab.config.schema import Lab
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.serving import openai
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import Topology
from disagglab.stats.metric import percentile

REPEATS = 5
PROMPT_TOKENS = 700
ANATOMY_SALT = 30_000  # prompts of this test alone
OUTPUT_TOKENS = 16
E2E = "vllm:e2e_request_latency_seconds_sum"
DECODE = "vllm:request_decode_time_seconds_sum"
PARTS = ("prefill", "wait for KV", "decode", "router and HTTP")


def anatomy(topology: Topology, number: int, lab: Lab, shape: KvShape) -> tuple[dict[str, float], float]:
    """One request's parts in seconds, and the time of its KV transfer alone."""
    prompt = openai.prompt_of(PROMPT_TOKENS, ANATOMY_SALT + number)
    before = ledger.read(topology)
    answer = openai.complete(topology.router.url, openai.body(topology.served_name, prompt, OUTPUT_TOKENS))
    after = ledger.settle(topology, before, 1)
    book = ledger.prove(
        topology, before, after, [Sent(PROMPT_TOKENS, OUTPUT_TOKENS)], shape, lab.vllm.version
    )

    def grew(server: str, metric: str) -> float:
        return delta(before.snapshots[server], after.snapshots[server], metric)

    prefill = sum(grew(server.name, E2E) for server in topology.prefill)
    at_decode = sum(grew(server.name, E2E) for server in topology.decode)
    decode = sum(grew(server.name, DECODE) for server in topology.decode)
    parts = {
        "prefill": prefill,
        "wait for KV": at_decode - decode,
        "decode": decode,
        "router and HTTP": answer.e2e_s - prefill - at_decode,
    }
    return parts, book.transfer_s


def test_parts_of_a_request_add_up(
    disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder, timing: Callable[..., None]
) -> None:
    """Prefill, wait for KV, decode, router and HTTP: none is negative, they sum to the client's end-to-end
    time.

    "Wait for KV" holds the transfer itself and the engine steps around it: the scheduler looks for finished
    transfers once a step.
    """
    pairs = disaggregated.cycle
    for number in range(pairs):  # the first request of a pair pays for the NIXL handshake between its engines
        anatomy(disaggregated, number, lab, shape)
    rows = [anatomy(disaggregated, pairs + number, lab, shape) for number in range(REPEATS)]
    for parts, transfer_s in rows:
        assert all(seconds >= 0 for seconds in parts.values()), f"a part exceeds the whole: {parts}"
        assert transfer_s <= parts["wait for KV"], (
            f"transfer {transfer_s} s outlasts the wait for it: {parts}"
        )
    medians = {}
    for part in PARTS:
        values = [parts[part] for parts, _ in rows]
        medians[part] = percentile(values, 50) or 0.0
        record.numbers(f"anatomy: {part}", values, "s", arm="disaggregated", what="requests")
    record.numbers(
        "anatomy: KV transfer (inside the wait)",
        [seconds for _, seconds in rows],
        "s",
        arm="disaggregated",
        what="requests",
    )
    record.plot(
        "Anatomy of a disaggregated request",
        "",
        "s",
        {"median": (list(range(len(PARTS))), list(medians.values()))},
        style="bars",
        ticks=PARTS,
        caption=f"{PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens, median of {REPEATS} requests.",
    )
    timing([sum(parts.values()) for parts, _ in rows], prompt_tokens=PROMPT_TOKENS)

"""Two clients, one server: what the load engine and our own client say about the same work.

``vllm bench serve`` sends the load of every comparison, disagglab/serving/openai.py all that it cannot send
(conversations, single requests). If they did not measure alike, their figures could not stand side by side.

The oracle is the server's own clock: it keeps sums of TTFT and end-to-end time over the same requests. A
client has to measure at least those, and what it adds (HTTP, router, its own work) is all that clients may
differ in. Client / server has the machine's noise in both parts, so it cancels, while the times of two runs
on a shared core differ by a fifth for no reason. The plain pairs of rounds are judged and recorded too, but
not asserted: a 95 % interval of two equal clients excludes the truth in one session of twenty. Both runs have
prompts of the same number of token ids (not the same ids: a dense model takes as long for any), nothing in a
prefix cache, and one request at a time.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from disagglab.config.workload import Workload, load_workload
from disagglab.experiments.rounds import mirrored
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.measure.conversation import Conversation, Transcript, converse
from disagglab.measure.run import measure
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.records import Ledger, Sent, Snapshot
from disagglab.results.run_folder import Store
from disagglab.serving import openai
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import Topology
from disagglab.stats.metric import percentile
from disagglab.stats.verdict import judge

SEED = 26_001
MARGIN = 0.10
WORKLOAD = {"name": "calibration", "prompt_tokens": 384, "output_tokens": 12, "requests": 3, "concurrency": 1}
SALT = 35_000  # prompts of this test alone
ENGINE, OWN = "vllm bench serve", "own client"
FIGURES = ("ttft", "tpot", "e2e")
SERVER_TTFT = "vllm:time_to_first_token_seconds_sum"
SERVER_E2E = "vllm:e2e_request_latency_seconds_sum"


@dataclass(frozen=True)
class Round:
    """What one client measured of one run, by request, and the server's own sums over them; s."""

    ttft_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    gaps: int
    server_ttft_s: float
    server_e2e_s: float

    def median(self, figure: str) -> float:
        """The run-level figure of docs/reference/metrics.md, from the client's times."""
        gaps = self.gaps / len(self.e2e_s)
        tpot = [(e2e - ttft) / gaps for e2e, ttft in zip(self.e2e_s, self.ttft_s, strict=True)]
        median = percentile({"ttft": self.ttft_s, "e2e": self.e2e_s, "tpot": tpot}[figure], 50)
        assert median is not None
        return median


def excess(rounds: Sequence[Round], figure: str) -> float:
    """Client's mean / server's mean - 1, over all requests of all rounds."""
    ttft, e2e = sum(sum(one.ttft_s) for one in rounds), sum(sum(one.e2e_s) for one in rounds)
    server_ttft, server_e2e = (
        sum(one.server_ttft_s for one in rounds),
        sum(one.server_e2e_s for one in rounds),
    )
    said, served = {
        "ttft": (ttft, server_ttft),
        "tpot": (e2e - ttft, server_e2e - server_ttft),
        "e2e": (e2e, server_e2e),
    }[figure]
    return said / served - 1


def require_alike(engine: Sequence[Round], own: Sequence[Round]) -> None:
    """Fail where a client measured less than the server, or the clients differ beyond MARGIN.

    They differ in what they add to the server's sums: over all requests, and by the verdict on the rounds,
    whose interval must not lie wholly beyond the margin.
    """
    for name, rounds in ((ENGINE, engine), (OWN, own)):
        for figure in ("ttft", "e2e"):
            assert excess(rounds, figure) > 0, f"{name}: {figure} is shorter than the server's own"
    for figure in FIGURES:
        ratio = (1 + excess(own, figure)) / (1 + excess(engine, figure))
        pairs = [
            (1 + excess([left], figure), 1 + excess([right], figure))
            for left, right in zip(engine, own, strict=True)
        ]
        verdict = judge(pairs, "lower", MARGIN)
        told = (
            f"{figure}: {OWN} {excess(own, figure):+.1%} above the server, {ENGINE}"
            f" {excess(engine, figure):+.1%}, interval of their ratio {verdict.low:+.1%} to"
            f" {verdict.high:+.1%}; they differ by more than {MARGIN:.0%}"
        )
        assert abs(math.log(ratio)) <= math.log1p(MARGIN), told
        assert verdict.low <= MARGIN, told
        assert verdict.high >= 1 / (1 + MARGIN) - 1, told


def by_engine(
    engine: LoadEngine, single: Topology, workload: Workload, seed: int, shape: KvShape, store: Store
) -> tuple[Round, Ledger]:
    """A run of ``vllm bench serve``, proved."""
    before = single.servers[0].metrics()
    run = measure(engine, single, workload, seed, 0, shape)
    store.add_run(run)
    assert run.invalid is None, run.invalid
    assert run.ledger is not None
    gaps = sum(run.output_tokens) - len(run.output_tokens)
    return round_of(run.ttft_s, run.e2e_s, gaps, before, single.servers[0].metrics()), run.ledger


def by_own_client(
    single: Topology, workload: Workload, seed: int, shape: KvShape
) -> tuple[Round, Ledger, Transcript]:
    """The same work through our client, proved by the same rules."""
    extra = {"cache_salt": secrets.token_hex(4), "return_token_ids": False}  # as the load engine asks
    prompts = [openai.prompt_of(workload.prompt_tokens, seed + number) for number in range(workload.requests)]
    requests = [Conversation((tuple(prompt),), workload.output_tokens, extra) for prompt in prompts]
    before = ledger.read(single)
    found = converse(single.router.url, single.served_name, requests, workload.concurrency)
    after = ledger.settle(single, before, len(requests))
    sent = [Sent(turn.prompt_tokens, turn.output_tokens) for turn in found.turns]
    book = ledger.prove(single, before, after, sent, shape, single.version)
    name = single.servers[0].name
    ttft, e2e = tuple(turn.ttft_s for turn in found.turns), tuple(turn.e2e_s for turn in found.turns)
    gaps = sum(turn.output_tokens for turn in found.turns) - len(requests)
    return round_of(ttft, e2e, gaps, before.snapshots[name], after.snapshots[name]), book, found


def round_of(
    ttft_s: tuple[float, ...], e2e_s: tuple[float, ...], gaps: int, before: Snapshot, after: Snapshot
) -> Round:
    """The client's times beside what the server's own sums grew by."""
    return Round(ttft_s, e2e_s, gaps, delta(before, after, SERVER_TTFT), delta(before, after, SERVER_E2E))


def test_both_clients_measure_alike(
    live: Session, engine: LoadEngine, single: Topology, shape: KvShape, store: Store, record: Recorder
) -> None:
    """TTFT, TPOT and end-to-end time: beside the server's own sums the two clients agree within 10 %.

    A client is an instrument, and two instruments are calibrated on one object before their readings are
    compared. Raw times of two runs cannot do it here: the machine differs more from minute to minute than
    the clients do. What a client and the server saw of the same requests can. The last lines give one client
    known faults, each of which has to be refused.
    """
    workload = load_workload("one-user").model_copy(update=WORKLOAD)
    line = live.progress("calibration")
    by_engine(engine, single, workload.model_copy(update={"requests": 1}), SEED - 1, shape, store)
    by_own_client(single, workload.model_copy(update={"requests": 1}), SALT - 1, shape)
    rounds: dict[str, list[Round]] = {ENGINE: [], OWN: []}
    transcripts = []
    for number in range(live.rounds):
        books = {}
        for name in mirrored((ENGINE, OWN), number):
            line.show(f"round {number + 1} of {live.rounds}, {name}")
            if name == ENGINE:
                one, books[name] = by_engine(engine, single, workload, SEED + number, shape, store)
            else:
                one, books[name], found = by_own_client(single, workload, SALT + 100 * number, shape)
                transcripts.append(found)
            rounds[name].append(one)
        for counted in ("finished", "prompt_tokens", "generated", "computed_tokens"):
            both = [getattr(books[name], counted) for name in (ENGINE, OWN)]
            assert both[0] == both[1], f"{counted}: the clients did not send the same work: {both}"
    line.done(f"{live.rounds} rounds")
    record_figures(record, rounds)
    loads = [found.client for found in transcripts if found.client is not None]
    record.numbers("CPU share of the client", [load.cpu_share for load in loads], "ratio", arm=OWN)
    record.numbers("event loop lag, most", [load.lag_max_s for load in loads], "s", arm=OWN)
    require_alike(rounds[ENGINE], rounds[OWN])
    for fault, message in ((first_tokens_missed, "differ by more"), (last_tokens_missed, "shorter than")):
        with pytest.raises(AssertionError, match=message):
            require_alike(rounds[ENGINE], [fault(one) for one in rounds[OWN]])


def record_figures(record: Recorder, rounds: dict[str, list[Round]]) -> None:
    """Keep each client's figures, how they stand to the server's own, and both verdicts on the pairs."""
    for figure in FIGURES:
        for name, found in rounds.items():
            medians = [one.median(figure) for one in found]
            ratios = [1 + excess([one], figure) for one in found]
            record.numbers(f"{figure}_p50", medians, "s", arm=name)
            over_all = f"over all rounds {1 + excess(found, figure):.4f}"
            record.numbers(f"{figure}, client / server", ratios, "ratio", arm=name, note=over_all)
        pairs = list(zip(rounds[ENGINE], rounds[OWN], strict=True))
        plain = [(left.median(figure), right.median(figure)) for left, right in pairs]
        beside_server = [(1 + excess([left], figure), 1 + excess([right], figure)) for left, right in pairs]
        for what, values in ((f"{figure}_p50", plain), (f"{figure}, client / server", beside_server)):
            verdict = judge(values, "lower", MARGIN)
            record.numbers(
                f"{what}, {OWN} / {ENGINE}",
                [1 + verdict.effect],
                "ratio",
                what="geometric mean",
                note=f"{verdict.outcome}; 95 % CI {1 + verdict.low:.3f} to {1 + verdict.high:.3f}",
            )


def first_tokens_missed(one: Round) -> Round:
    """The fault of a client that takes the third token for the first: 2 of 11 gaps, 18 % of all decoding.

    One token alone would be 1 of 11, and 10 / 11 is just where the margin of 10 % ends.
    """
    lost = 2 * one.median("tpot")
    return replace(one, ttft_s=tuple(ttft + lost for ttft in one.ttft_s))


def last_tokens_missed(one: Round) -> Round:
    """The fault of a client that hangs up three tokens early."""
    lost = 3 * one.median("tpot")
    return replace(one, e2e_s=tuple(e2e - lost for e2e in one.e2e_s))

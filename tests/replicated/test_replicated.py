"""Two equal servers behind round robin: the same hardware as disaggregation, used the plain way.

The oracle for routing is each server's own counter of finished requests, never the router's word. No KV may
move.
"""

from __future__ import annotations

from disagglab.config.schema import Lab
from disagglab.experiments.comparison import Comparison, run_rounds
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.results.run_folder import Store
from disagglab.serving import openai
from disagglab.serving.topology import REPLICATED, SINGLE, Topology
from disagglab.stats.metric import METRICS
from disagglab.stats.verdict import judge

REQUESTS = 10
OUTPUT_TOKENS = 4
MARGIN = 0.05


def test_round_robin_alternates(replicated: Topology, lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Ten requests through the router are five on each server, by the servers' counters, and no KV moves."""
    before = ledger.read(replicated)
    sent = []
    for number in range(REQUESTS):
        prompt = [200 + number, *range(300, 340)]
        answer = openai.complete(
            replicated.router.url,
            openai.body(replicated.served_name, prompt, OUTPUT_TOKENS)
            | {"cache_salt": f"alternate-{number}"},
        )
        sent.append(Sent(answer.prompt_tokens, answer.output_tokens))
    after = ledger.settle(replicated, before, len(sent))
    book = ledger.prove(replicated, before, after, sent, shape, lab.vllm.version)
    for server, finished in book.finished.items():
        record.numbers(
            "requests finished",
            [finished],
            "requests",
            arm=server,
            what="count",
            command=replicated.router.command,
        )
    share = REQUESTS / len(replicated.servers)
    assert all(abs(finished - share) < 1 for finished in book.finished.values()), dict(book.finished)


def test_throughput_against_single(
    live: Session,
    engine: LoadEngine,
    single: Topology,
    replicated: Topology,
    lab: Lab,
    shape: KvShape,
    store: Store,
    record: Recorder,
) -> None:
    """Output tokens per second of two servers beside one, in interleaved rounds; every run proved by its
    counters.

    The figure is reported, not gated: where client, router and both servers share two cores, two replicas may
    be slower than one, and that is then a fact about the machine. It needs an explanation all the same; the
    published notebook that this suite grew from shows exactly that (26.5 against 122.5 tokens/s) and never
    asks why.
    """
    chat = lab.workload("chat")
    line = live.progress("replicated against single")
    found: Comparison = run_rounds(engine, [single, replicated], [chat], live.rounds, store, shape, line.show)
    assert not found.invalid(), found.invalid()[0].invalid
    for arm in (SINGLE, REPLICATED):
        values = found.values(chat.name, arm, "output_tokens_per_s")
        record.numbers(
            "throughput, chat", values, "tokens/s", arm=arm, command=found.valid(chat.name, arm)[0].command
        )
    verdict = judge(
        found.pairs(chat.name, SINGLE, REPLICATED, "output_tokens_per_s"),
        METRICS["output_tokens_per_s"].better,
        MARGIN,
    )
    record.numbers(
        "replicated / single, throughput",
        [1 + verdict.effect],
        "ratio",
        what="geometric mean",
        note=f"{verdict.outcome}; 95 % CI {1 + verdict.low:.2f} to {1 + verdict.high:.2f}",
    )
    assert verdict.rounds == live.rounds

"""One node alone: the bar that every other topology has to clear.

Oracles: the server's own counters must agree with the client on requests and tokens before a time is believed
(measure/ledger.py), and a request's parts must add up to its whole. Relations between measurements are
asserted with wide factors (they hold by construction of the hardware); absolute times are recorded, never
asserted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.kv.shape import KvShape, blocks
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.measure.kv_usage import peak_blocks
from disagglab.measure.run import measure
from disagglab.pytest_plugin.session import Session
from disagglab.results.metrics import figures, tpot_s
from disagglab.results.recorder import Recorder
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving import openai
from disagglab.serving.topology import Topology
from disagglab.stats.metric import percentile

SEED = 20_001
ROUNDING_S = 0.005  # the load engine takes first-token and last-token times by separate clock reads


def run_once(
    engine: LoadEngine,
    topology: Topology,
    workload: Workload,
    seed: int,
    lab: Lab,
    shape: KvShape,
    store: Store,
) -> Run:
    """A run that counts, or a failure with the reason why it does not."""
    run = measure(engine, topology, workload, seed, 0, shape)
    store.add_run(run)
    assert run.invalid is None, run.invalid
    return run


@pytest.fixture(scope="module")
def warm(engine: LoadEngine, single: Topology, lab: Lab, shape: KvShape, store: Store) -> None:
    """The first requests of a server pay for lazy initialisation; they are sent before measuring."""
    run_once(engine, single, lab.workload("chat"), SEED - 1, lab, shape, store)


@pytest.fixture(scope="module")
def one_user(
    warm: None, engine: LoadEngine, single: Topology, lab: Lab, shape: KvShape, store: Store, live: Session
) -> list[Run]:
    """The one-user workload, repeated."""
    repeats = 2 if live.short else 3
    workload = lab.workload("one-user")
    return [run_once(engine, single, workload, SEED + n, lab, shape, store) for n in range(repeats)]


@pytest.mark.parametrize("metric", ["ttft", "tpot", "itl", "e2e"])
def test_latency_of_one_request(
    one_user: list[Run], record: Recorder, timing: Callable[..., None], metric: str
) -> None:
    """TTFT, TPOT, ITL and end-to-end time of one request at a time, from runs whose counters agree with the
    client.

    TTFT is the prefill (one pass over the whole prompt, compute-bound); TPOT is the decode (one pass over all
    weights per token, memory-bound). End to end = TTFT + TPOT x (output tokens - 1).
    """
    per_run = {
        "ttft": [list(run.ttft_s) for run in one_user],
        "tpot": [tpot_s(run) for run in one_user],
        "itl": [[gap for request in run.itl_s for gap in request] for run in one_user],
        "e2e": [list(run.e2e_s) for run in one_user],
    }[metric]
    for run in one_user:
        for ttft, gaps, e2e in zip(run.ttft_s, run.itl_s, run.e2e_s, strict=True):
            assert abs(ttft + sum(gaps) - e2e) < ROUNDING_S, (
                f"TTFT {ttft} + gaps {sum(gaps)} is not end to end {e2e}"
            )
    medians = [median for samples in per_run if (median := percentile(samples, 50)) is not None]
    assert len(medians) == len(one_user)
    record.numbers(f"{metric.upper()}, one user", medians, "s", arm="single", command=one_user[0].command)
    timing(medians, metric=metric)


def test_throughput_grows_with_concurrency(
    warm: None, engine: LoadEngine, single: Topology, lab: Lab, shape: KvShape, store: Store, record: Recorder
) -> None:
    """Continuous batching: one server makes more tokens per second for several users than for one.

    Decode reads all weights for each step, whether one sequence or eight share it: like a bus that costs the
    same with one passenger or eight.
    """
    chat = lab.workload("chat")
    series = {}
    for concurrency in (1, 2, 4, 8):
        workload = chat.model_copy(update={"concurrency": concurrency, "requests": max(3, concurrency)})
        run = run_once(engine, single, workload, SEED + 100 + concurrency, lab, shape, store)
        rate = figures(run)["output_tokens_per_s"]
        assert rate is not None
        series[concurrency] = rate
        record.numbers(
            f"throughput at concurrency {concurrency}", [rate], "tokens/s", arm="single", command=run.command
        )
    record.plot(
        "Throughput against concurrency, one node",
        "requests under way",
        "output tokens/s",
        {"single": (list(series), list(series.values()))},
        caption=f"{chat.prompt_tokens} prompt tokens, {chat.output_tokens} output tokens; one run a point.",
    )
    assert series[8] > 1.3 * series[1], f"batching gains nothing: {series} tokens/s by concurrency"


def test_prefill_grows_with_the_prompt_and_decode_hardly(
    warm: None, engine: LoadEngine, single: Topology, lab: Lab, shape: KvShape, store: Store, record: Recorder
) -> None:
    """TTFT grows with prompt length; time per output token stays within a small factor.

    This asymmetry is what disaggregation bets on: two kinds of work that want different machines.
    """
    base = lab.workload("one-user").model_copy(update={"requests": 2, "output_tokens": 8})
    longest = min(2048, lab.model.max_model_len - base.output_tokens - 1)
    lengths = [64, 256, 1024, longest]
    ttft, tpot = [], []
    for length in lengths:
        workload = base.model_copy(update={"prompt_tokens": length})
        run = run_once(engine, single, workload, SEED + 200 + length, lab, shape, store)
        numbers = figures(run)
        assert numbers["ttft_p50"] is not None
        assert numbers["tpot_p50"] is not None
        ttft.append(numbers["ttft_p50"])
        tpot.append(numbers["tpot_p50"])
        record.numbers(f"TTFT, {length} prompt tokens", run.ttft_s, "s", arm="single", what="requests")
        record.numbers(f"TPOT, {length} prompt tokens", tpot_s(run), "s", arm="single", what="requests")
    record.plot(
        "Prefill and decode against prompt length, one node",
        "prompt tokens",
        "s",
        {"TTFT": (lengths, ttft), "time per output token": (lengths, tpot)},
        caption="Median of two requests a point.",
    )
    assert ttft[-1] > 2 * ttft[0], (
        f"TTFT does not grow with the prompt: {dict(zip(lengths, ttft, strict=True))} s"
    )
    assert tpot[-1] / tpot[0] < ttft[-1] / ttft[0], (
        "decode slowed down more than prefill with the prompt length"
    )


@pytest.mark.usefixtures("one_table")
def test_kv_memory_in_use_is_the_arithmetic(
    warm: None, single: Topology, lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """While a request runs, the server holds exactly the KV blocks that its tokens need.

    The KV cache is per-request session state in fixed-size pages; the server reports the share of pages in
    use.
    """
    server = single.servers[0]
    config = ledger.cache_config(server.metrics())
    total, block = int(config["num_gpu_blocks"]), int(config["block_size"])
    prompt_tokens, output_tokens = 4 * block + 1, 24
    prompt = openai.prompt_of(prompt_tokens, prompt_tokens)
    request = openai.body(single.served_name, prompt, output_tokens) | {"cache_salt": "kv-memory"}
    used = peak_blocks(server, single.router.url, request)
    expected = blocks(prompt_tokens + output_tokens, block)
    record.numbers(
        "KV blocks in use",
        [used],
        "blocks",
        arm="single",
        what="peak",
        note=f"of {total}, {block} tokens each",
    )
    record.numbers("KV bytes in use", [used * shape.bytes_per_block(block)], "B", arm="single", what="peak")
    assert used == expected, (
        f"{prompt_tokens} + {output_tokens} tokens need {expected} blocks, the server used {used}"
    )

"""Ten defects of published hand-made notebooks, kept as recorded fixtures: every one of them must be refused.

Source: the committed outputs of elizabetht/spark (notebooks/02_disaggregated-serving, read in 2026). Each
case holds the figures as they were published, and names the check that they would have met here. One that
is not refused is a defect of this suite.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from disagglab.agent.supervisor import Process
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun, LabError
from disagglab.kv import attention, modelconfig
from disagglab.measure import bench, ledger
from disagglab.results import metrics as results_metrics
from disagglab.results.records import Reading, Run, Sent
from disagglab.results.run_folder import Store
from disagglab.serving import prometheus
from disagglab.serving.prometheus import parse
from disagglab.serving.topology import SINGLE, Topology
from disagglab.stats.metric import percentile
from disagglab.stats.verdict import judge

KNOWN_BAD: dict[str, Any] = json.loads((Path(__file__).parent / "known_bad.json").read_text())
LLAMA = attention.shape(modelconfig.shipped_config("meta-llama/Llama-3.1-8B-Instruct"))


def bench_result(completed: int, failed: int = 0, **changes: Any) -> dict[str, Any]:
    """The load engine's JSON of a run with so many requests."""
    count = completed + failed
    made = {
        "errors": [""] * completed + ["Connection refused"] * min(failed, 3),
        "completed": completed,
        "failed": failed,
        "duration": 60.0,
        "ttfts": [0.6] * count,
        "latencies": [8.0] * count,
        "itls": [[0.07] * 127] * count,
        "input_lens": [256] * count,
        "start_times": [0.0] * count,
        "output_lens": [128] * count,
    }
    return {**made, **changes}


def run_from(result: dict[str, Any], requests: int) -> Run:
    """What the suite makes of it."""
    workload = Workload(name="w", prompt_tokens=256, output_tokens=128, concurrency=8, requests=requests)
    return bench.run_from(result, "replicated", workload, 1, 0, "vllm bench serve", None)


def test_1_a_server_that_was_ready_at_once() -> None:
    """Two replicas "ready (0s)" after a start that takes 120 s: the process that answers is another one."""
    case = KNOWN_BAD["ready_at_once"]
    before, after = (Reading({}, {"a": Process(pid, 1)}) for pid in (case["old_pid"], case["new_pid"]))
    with pytest.raises(InvalidRun, match="processes changed"):
        ledger.compare(Topology(SINGLE, SINGLE, "0.31.0", None, ()), before, after)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", KNOWN_BAD["throughput_of_errors"], ids=lambda case: case["arm"])
def test_2_throughput_of_a_run_that_failed(case: dict[str, Any]) -> None:
    """0 successes beside 34,004 and 37,157 errors, printed as a peak throughput of 14 tokens/s."""
    with pytest.raises(InvalidRun, match=f"{case['successful']} of .* requests completed"):
        run_from(
            bench_result(case["successful"], 3) | {"failed": case["errored"]},
            case["successful"] + case["errored"],
        )


def test_3_a_percentile_of_one_sample() -> None:
    """TTFT mean = P95 = 612.6 ms, because n = 1: below 20 samples there is no P95."""
    assert percentile([KNOWN_BAD["p95_of_one"]["ttft_ms"]], 95) is None


def test_4_a_factor_from_one_run() -> None:
    """26.5 against 122.5 tokens/s, one sample each, explained as architecture: one pair decides nothing."""
    case = KNOWN_BAD["one_sample"]
    verdict = judge([(case["single_tok_s"], case["replicated_tok_s"])], "higher", 0.05)
    assert (verdict.outcome, verdict.high) == ("undecided", math.inf)


def test_5_two_definitions_of_latency() -> None:
    """6.53 s / 8 = 816.6 ms beside a mean of wall times: here E2E is each request's own time."""
    case = KNOWN_BAD["two_latencies"]
    batch = bench_result(8, latencies=[case["batch_s"]] * 8, duration=case["batch_s"])
    published = case["batch_s"] / 8 * 1000
    assert published == pytest.approx(case["published_ms"], rel=0.001)
    assert results_metrics.figures(run_from(batch, 8))["e2e_p50"] == case["batch_s"]


def test_6_tokens_that_were_not_made() -> None:
    """200 tokens recorded for a run that made 100: lengths are checked against what was asked for."""
    case = KNOWN_BAD["tokens"]
    with pytest.raises(InvalidRun, match="answers of"):
        run_from(bench_result(8, output_lens=[case["made"]] * 8), 8)


def test_7_half_of_the_bytes() -> None:
    """512 tokens of Llama-3.1-8B as "approximately 32 MB": the ledger expects 64 MiB, to the byte."""
    case = KNOWN_BAD["kv_bytes"]
    whole = ledger.expected_bytes([Sent(case["tokens"], 1)], LLAMA, 16, "0.31.0")
    assert whole == 64 * 2**20
    assert abs(case["published_mb"] * 10**6 - whole) > whole / 3


def test_8_success_inferred_from_parameters() -> None:
    """A non-empty kv_transfer_params taken as proof: without the connector's counter there is no ledger."""
    text = 'process_start_time_seconds 1.0\nvllm:request_success_total{finished_reason="length"} 8.0\n'
    snapshot = parse("decode", "http://decode/metrics", text)
    with pytest.raises(InvalidRun, match=ledger.BYTES):
        prometheus.delta(snapshot, snapshot, ledger.BYTES)


def test_9_a_missing_value_stored_as_zero() -> None:
    """nvidia-smi answers N/A on GB10; stored as 0, it became 0.00 MB per token. A zero is no figure."""
    case = KNOWN_BAD["memory_zero"]
    with pytest.raises(InvalidRun, match="positive and finite"):
        judge([(case["baseline_mb"], 100.0)], "lower", 0.05)
    with pytest.raises(InvalidRun, match="exposes no metric"):
        parse("a", "u", "process_start_time_seconds 1.0\n").value("vllm:kv_cache_usage_perc")


def test_10_a_token_in_a_committed_output(tmp_path: Path) -> None:
    """HF_TOKEN printed into an output: a run's folder is searched before it is pointed at."""
    store = Store.create(tmp_path, "run")
    (store.folder / "logs" / "x.log").write_text("export HF_TOKEN=" + "hf" + "_" + "A" * 34)
    with pytest.raises(LabError, match=r"x\.log"):
        store.require_no_secret()

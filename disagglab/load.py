"""Load: runs of ``vllm bench serve`` against a topology, with every request kept."""

from __future__ import annotations

import json
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagglab.errors import InvalidRun, StartError
from disagglab.host import LocalHost
from disagglab.ledger import Ledger, Sent
from disagglab.process import OwnedProcess
from disagglab.server import read_tail
from disagglab.topology import Topology
from disagglab.workload import Workload

START_DEADLINE_S = 300.0  # imports of vLLM beside two booting servers
JOB_DEADLINE_S = 1800.0
POLL_S = 0.1
PERCENTILE_SAMPLES = {50: 1, 90: 10, 95: 20, 99: 100}  # fewer samples than this: the percentile is not shown


@dataclass(frozen=True)
class Run:
    """One run of a workload on a topology. Per-request lists in the order of sending; seconds, tokens."""

    topology: str
    workload: Workload
    seed: int
    round: int
    command: str
    duration_s: float
    client_cpu_share: float
    ttft_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    itl_s: tuple[tuple[float, ...], ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    ledger: Ledger | None = None
    invalid: str | None = None

    @property
    def sent(self) -> list[Sent]:
        """The requests, for the ledger."""
        return [Sent(p, o) for p, o in zip(self.prompt_tokens, self.output_tokens, strict=True)]


def percentile(samples: Sequence[float], p: int) -> float | None:
    """The ``p``-th percentile (linear interpolation); None with fewer samples than it takes to know it."""
    if len(samples) < PERCENTILE_SAMPLES[p]:
        return None
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * p / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def tpot_s(run: Run) -> list[float]:
    """Time per output token of each request: (E2E - TTFT) / (output tokens - 1), s."""
    rows = zip(run.e2e_s, run.ttft_s, run.output_tokens, strict=True)
    return [(e2e - ttft) / (count - 1) for e2e, ttft, count in rows if count > 1]


def figures(run: Run) -> dict[str, float | None]:
    """Run-level figures by metric name: seconds, tokens per second."""
    gaps = [gap for request in run.itl_s for gap in request]
    return {
        "ttft_p50": percentile(run.ttft_s, 50),
        "tpot_p50": percentile(tpot_s(run), 50),
        "itl_p50": percentile(gaps, 50),
        "itl_p99": percentile(gaps, 99),
        "e2e_p50": percentile(run.e2e_s, 50),
        "output_tokens_per_s": sum(run.output_tokens) / run.duration_s,
    }


class LoadEngine:
    """``vllm bench serve``, kept imported in one owned worker process."""

    def __init__(self, host: LocalHost, tokenizer: Path, cpus: Sequence[int]) -> None:
        self._host = host
        self._tokenizer = tokenizer
        self._cpus = cpus
        self._process: OwnedProcess | None = None

    def start(self) -> None:
        """Start the worker; :meth:`run` waits until it answers."""
        if self._process is None:
            argv = [sys.executable, "-m", "disagglab.loadworker", "load.sock"]
            # relative to TMPDIR, since unix socket paths are short
            argv = ["/bin/sh", "-c", 'cd "$TMPDIR" && exec "$@"', "sh", *argv]
            self._process = self._host.start("load", argv, {"HF_HUB_OFFLINE": "1"}, self._cpus)

    def run(self, topology: Topology, workload: Workload, seed: int, number: int = 0) -> Run:
        """One run; prompts are random, exact in length, and differ with ``seed``.

        Raises:
            InvalidRun: if the engine fails, or a request failed or came back with another length.
            StartError: if the worker does not start.
        """
        options = bench_options(topology, workload, seed, self._tokenizer, secrets.token_hex(4))
        command = "vllm bench serve " + shlex.join(options)
        answer = self._ask(options)
        if "error" in answer:
            raise InvalidRun(f"{topology.name}: load engine: {answer['error']}; command: {command}")
        result = answer["result"]
        return run_from(result, topology.name, workload, seed, number, command, answer["client_cpu_share"])

    def _ask(self, options: list[str]) -> dict[str, Any]:
        self.start()
        assert self._process is not None
        path = Path(self._process.spec.scratch) / "load.sock"
        deadline = time.monotonic() + START_DEADLINE_S
        while not path.exists():
            if not self._process.alive or time.monotonic() > deadline:
                tail = "\n".join(read_tail(self._process.log, 20))
                raise StartError(f"the load engine did not start; last lines of {self._process.log}:\n{tail}")
            time.sleep(POLL_S)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(JOB_DEADLINE_S)
            connection.connect(str(path))
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(options).encode() + b"\n")
                stream.flush()
                line = stream.readline()
        if not line:
            tail = "\n".join(read_tail(self._process.log, 20))
            raise InvalidRun(f"the load engine died; last lines of {self._process.log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def bench_options(topology: Topology, workload: Workload, seed: int, tokenizer: Path, salt: str) -> list[str]:
    """Options of ``vllm bench serve`` for one closed-loop run.

    Every topology gets the same prompts within a round. ``salt`` keeps one run's prefix cache from serving
    another's.
    """
    return [
        "--backend",
        "openai",
        "--base-url",
        topology.router.url,
        "--endpoint",
        "/v1/completions",
        "--model",
        topology.served_name,
        "--tokenizer",
        str(tokenizer),
        "--dataset-name",
        "random",
        "--random-input-len",
        str(workload.prompt_tokens),
        "--random-output-len",
        str(workload.output_tokens),
        "--num-prompts",
        str(workload.requests),
        "--max-concurrency",
        str(workload.concurrency),
        "--seed",
        str(seed),
        "--ignore-eos",
        "--temperature",
        "0",
        "--ready-check-timeout-sec",
        "0",
        "--disable-tqdm",
        "--percentile-metrics",
        "ttft,tpot,itl,e2el",
        "--metric-percentiles",
        "50,90,99",
        "--save-detailed",
        "--extra-body",
        json.dumps({"cache_salt": salt}),
    ]


def run_from(
    result: dict[str, Any],
    topology: str,
    workload: Workload,
    seed: int,
    number: int,
    command: str,
    cpu_share: float,
) -> Run:
    """Build a :class:`Run` from the JSON of ``vllm bench serve``.

    Raises:
        InvalidRun: if a request failed, is missing, or has another length than asked for.
    """
    errors = [error for error in result["errors"] if error]
    if errors or result["failed"] or result["completed"] != workload.requests:
        raise InvalidRun(
            f"{topology}: {result['completed']} of {workload.requests} requests completed,"
            f" {result['failed']} failed;"
            f" first error: {errors[0][:300] if errors else 'none reported'}; command: {command}"
        )
    wrong = [n for n in result["output_lens"] if n != workload.output_tokens]
    if wrong:
        raise InvalidRun(
            f"{topology}: answers of {sorted(set(wrong))} tokens, {workload.output_tokens} were asked for"
        )
    return Run(
        topology=topology,
        workload=workload,
        seed=seed,
        round=number,
        command=command,
        duration_s=float(result["duration"]),
        client_cpu_share=cpu_share,
        ttft_s=tuple(result["ttfts"]),
        e2e_s=tuple(result["latencies"]),
        itl_s=tuple(tuple(gaps) for gaps in result["itls"]),
        prompt_tokens=tuple(result["input_lens"]),
        output_tokens=tuple(result["output_lens"]),
    )

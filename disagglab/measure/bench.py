"""Load: runs of ``vllm bench serve`` against a topology, with every request kept."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagglab import waiting
from disagglab.config.arrivals import MAIN, STEADY, arrivals, write
from disagglab.config.workload import CHUNK, Workload
from disagglab.errors import InvalidRun
from disagglab.hosts.host import Host, HostProcess
from disagglab.results.records import ClientLoad, Run
from disagglab.results.seconds import Phase, counts, spends
from disagglab.serving import death
from disagglab.serving.topology import Topology

LOAD = "load"  # name of its process and log
JOB_DEADLINE_S = 1800.0  # with the imports of vLLM beside two booting servers
POLL_S = 0.1  # between two looks whether a job is done, over SSH
LOCAL_POLL_S = 0.02  # the same on this machine, where a look costs 70 us of CPU
CLIENT_BOUND = 0.9  # CPU time over wall time of the load engine, which has one thread
INTERFERENCE_SHARE = 0.75  # of the other requests have to arrive while a steady one decodes
HASH_SEED = "0"  # the load engine makes a prompt's pieces from Python's hash of their ids


class LoadEngine:
    """``vllm bench serve``, kept imported in one owned worker process on the controller's host.

    Args:
        tokenizer: its folder on that host.
        traces: folder on this machine for the trace files that it replays.
    """

    def __init__(self, host: Host, tokenizer: Path, cpus: Sequence[int], traces: Path) -> None:
        self._host = host
        self._tokenizer = tokenizer
        self._traces = traces
        self._cpus = cpus
        self._process: HostProcess | None = None
        self._jobs = 0

    def start(self) -> None:
        """Start the worker; :meth:`run` waits until it answers."""
        if self._process is None:
            argv = [self._host.suite_python, "-m", "disagglab.measure.loadworker"]
            environment = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": HASH_SEED}
            self._process = self._host.start(LOAD, argv, environment, self._cpus)

    @spends(Phase.ENGINE)
    def run(self, topology: Topology, workload: Workload, seed: int, number: int = 0) -> Run:
        """One run; prompts are random, exact in length, and differ with ``seed``, as do the arrivals.

        Raises:
            InvalidRun: if the engine fails, or a request failed or came back with another length.
        """
        requests = arrivals(workload, seed)
        path = self._traces / f"{workload.name}.{seed}.{len(requests)}.jsonl"
        write(path, requests)
        where = self._on_host(path)
        options = bench_options(topology, workload, where, self._tokenizer, secrets.token_hex(4))
        command = f"PYTHONHASHSEED={HASH_SEED} vllm bench serve " + shlex.join(options)
        answer = self._ask(options)
        if "error" in answer:
            raise InvalidRun(f"{topology.name}: load engine: {answer['error']}; command: {command}")
        counts(Phase.LOAD, float(answer["result"]["duration"]))
        client = ClientLoad(**answer["client"]) if answer["client"] else None
        return run_from(answer["result"], topology.name, workload, seed, number, command, client)

    def _on_host(self, path: Path) -> Path:
        """A trace file as the worker finds it: copied, if its host is another."""
        if self._host.is_local:
            return path
        self.start()
        assert self._process is not None
        copy = f"{self._process.scratch}/{path.name}"
        self._host.write_text(copy, path.read_text())
        return Path(copy)

    def _ask(self, options: list[str]) -> dict[str, Any]:
        """Give the worker a job as a file in its scratch folder; its answer is a file, too."""
        self.start()
        assert self._process is not None
        self._jobs += 1
        job = f"{self._process.scratch}/{self._jobs}"
        self._host.write_text(f"{job}.job", json.dumps(options))
        process = self._process

        def answered() -> bool:
            if self._host.exists(f"{job}.answer"):
                return True
            death.require_alive(process, "load engine")
            return False

        waiting.until(
            answered,
            JOB_DEADLINE_S,
            lambda: InvalidRun(f"the load engine gave no answer within {JOB_DEADLINE_S:g} s"),
            LOCAL_POLL_S if self._host.is_local else POLL_S,
        )
        answer: dict[str, Any] = json.loads(self._host.read_text(f"{job}.answer"))
        return answer


def bench_options(
    topology: Topology, workload: Workload, trace_file: Path, tokenizer: Path, salt: str
) -> list[str]:
    """Options of ``vllm bench serve`` that replay a trace; a closed loop holds requests back by concurrency.

    Every topology gets the same trace within a round. ``salt`` keeps one run's prefix cache from serving
    another's.
    """
    values: dict[str, object] = {
        "backend": "openai",
        "base-url": topology.router.url,
        "endpoint": "/v1/completions",
        "model": topology.served_name,
        "tokenizer": tokenizer,
        "dataset-name": "timed_trace",
        "dataset-path": trace_file,
        "timed-trace-chunk-hash-size": CHUNK,
        "num-prompts": workload.total_requests,
        "temperature": 0,
        "ready-check-timeout-sec": 0,
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,90,99",
        "extra-body": json.dumps({"cache_salt": salt}),
    }
    if workload.concurrency is not None:
        values["max-concurrency"] = workload.concurrency
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*options, "--ignore-eos", "--disable-tqdm", "--save-detailed"]


def run_from(
    result: dict[str, Any],
    topology: str,
    workload: Workload,
    seed: int,
    number: int,
    command: str,
    client: ClientLoad | None,
) -> Run:
    """Build a :class:`Run` from the JSON of ``vllm bench serve``.

    Raises:
        InvalidRun: if a request failed, is missing, or has another length than asked for.
    """
    requests = arrivals(workload, seed)
    errors = [error for error in result["errors"] if error]
    if errors or result["failed"] or result["completed"] != len(requests):
        raise InvalidRun(
            f"{topology}: {result['completed']} of {len(requests)} requests completed,"
            f" {result['failed']} failed;"
            f" first error: {errors[0][:300] if errors else 'none reported'}; command: {command}"
        )
    for what, asked, got in (
        ("prompts", [one.prompt_tokens for one in requests], result["input_lens"]),
        ("answers", [one.output_tokens for one in requests], result["output_lens"]),
    ):
        if asked != list(got):
            raise InvalidRun(
                f"{topology}: {what} of {sorted(set(got))} tokens, {sorted(set(asked))} were asked for"
            )
    first = min(result["start_times"])
    # vLLM 0.26 does not keep E2E; its clock readings are the same ones, so the parts add up to it
    ends = [ttft + sum(gaps) for ttft, gaps in zip(result["ttfts"], result["itls"], strict=True)]
    return Run(
        topology=topology,
        workload=workload,
        seed=seed,
        round=number,
        command=command,
        duration_s=float(result["duration"]),
        client=client,
        ttft_s=tuple(result["ttfts"]),
        e2e_s=tuple(result.get("latencies") or ends),
        itl_s=tuple(tuple(gaps) for gaps in result["itls"]),
        prompt_tokens=tuple(result["input_lens"]),
        output_tokens=tuple(result["output_lens"]),
        start_s=tuple(start - first for start in result["start_times"]),
        streams=tuple(one.stream for one in requests),
    )


def require_meaning(run: Run) -> None:
    """Refuse a whole run that measured something else than its workload asks for.

    Raises:
        InvalidRun: if the load engine was the bottleneck, or the steady requests of the workload were over
            before most of the others came.
    """
    if run.client is not None and run.client.cpu_share > CLIENT_BOUND:
        raise InvalidRun(
            f"{run.topology}: the load engine was busy {run.client.cpu_share:.0%} of the time, so it is what"
            " was measured; lower the workload's concurrency or rate, or give it a core of its own"
            " ([controller] cpus)"
        )
    if run.workload.steady is None:
        return
    rows = list(zip(run.streams, run.start_s, run.ttft_s, run.e2e_s, strict=True))
    begin = min(start + ttft for stream, start, ttft, _ in rows if stream == STEADY)
    end = max(start + e2e for stream, start, _, e2e in rows if stream == STEADY)
    others = [start for stream, start, _, _ in rows if stream == MAIN]
    met = sum(begin <= start <= end for start in others)
    if met < INTERFERENCE_SHARE * len(others):
        raise InvalidRun(
            f"{run.topology}: {met} of {len(others)} prompts arrived while a steady request decoded"
            f" ({begin:.1f} to {end:.1f} s); raise [scale] steady or rate in the lab file"
        )

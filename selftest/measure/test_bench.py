"""Run-level figures from per-request lists, refusal of runs that are not whole, and jobs for the worker."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.hosts.host import Host, local_host
from disagglab.measure import bench, loadworker
from disagglab.measure.loadworker import keep_token_ids
from disagglab.results import metrics
from disagglab.results.records import Run
from disagglab.serving.death import Died
from disagglab.stats.metric import percentile

WORKLOAD = Workload(name="w", prompt_tokens=10, output_tokens=3, concurrency=1, requests=2)
RESULT: dict[str, Any] = {
    "errors": ["", ""],
    "failed": 0,
    "completed": 2,
    "duration": 2.0,
    "ttfts": [0.1, 0.3],
    "latencies": [0.5, 0.9],
    "itls": [[0.2, 0.2], [0.3, 0.3]],
    "input_lens": [10, 10],
    "output_lens": [3, 3],
    "start_times": [7.0, 7.6],
}


def run_from(**changes: Any) -> Run:
    """The run of RESULT with values changed."""
    return bench.run_from({**RESULT, **changes}, "single", WORKLOAD, 1, 0, "vllm bench serve", None)


def test_figures_follow_their_definitions() -> None:
    """TTFT and E2E medians, TPOT = (E2E - TTFT) / (tokens - 1), throughput = tokens / duration."""
    found = metrics.figures(run_from())
    assert found["ttft_p50"] == pytest.approx(0.2)
    assert found["e2e_p50"] == pytest.approx(0.7)
    assert found["tpot_p50"] == pytest.approx(((0.5 - 0.1) / 2 + (0.9 - 0.3) / 2) / 2)
    assert found["output_tokens_per_s"] == pytest.approx(3.0)


def test_a_percentile_needs_its_samples() -> None:
    """p99 of four gaps is not a number; p99 of a hundred is."""
    assert metrics.figures(run_from())["itl_p99"] is None
    assert percentile([float(i) for i in range(100)], 99) == pytest.approx(98.01)
    assert percentile([1.0] * 19, 95) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"failed": 1},
        {"completed": 1},
        {"errors": ["", "connection reset"]},
        {"output_lens": [3, 2]},
    ],
)
def test_a_run_that_is_not_whole_is_refused(changes: dict[str, Any]) -> None:
    """Failed, missing and short answers make the run invalid; nothing of it is aggregated."""
    with pytest.raises(InvalidRun):
        run_from(**changes)


class TextTrace:
    """A trace dataset that makes text of token ids, as that of vLLM 0.26."""

    def sample(self, tokenizer: Any, num_requests: int) -> list[Any]:
        """Prompts of ids that the tokenizer's vocabulary holds."""
        return [tokenizer.decode(sorted(tokenizer.get_vocab().values())) for _ in range(num_requests)]


def test_a_trace_is_sent_as_token_ids() -> None:
    """Where the load engine would decode the ids of a prompt, they stay; all else is the tokenizer's."""

    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 2}

        def decode(self, ids: list[int]) -> str:
            return " ".join("ab"[i - 1] for i in ids)

    assert TextTrace().sample(Tokenizer(), num_requests=1) == ["a b"]
    keep_token_ids(TextTrace)
    assert TextTrace().sample(tokenizer=Tokenizer(), num_requests=2) == [[1, 2], [1, 2]]


def test_a_tokenizer_is_loaded_once() -> None:
    """As main_async asks for it, job after job; another folder or mode is another tokenizer."""
    loaded: list[tuple[str, str]] = []

    def get_tokenizer(name: str, *, tokenizer_mode: str, trust_remote_code: bool) -> Any:
        loaded.append((name, tokenizer_mode))
        return object()

    module = SimpleNamespace(get_tokenizer=get_tokenizer)
    loadworker.keep_tokenizer(module)
    first, again, other = (
        module.get_tokenizer(name, tokenizer_mode="auto", trust_remote_code=False) for name in ("a", "a", "b")
    )
    assert first is again is not other
    assert loaded == [("a", "auto"), ("b", "auto")]


def test_e2e_is_the_sum_of_its_parts_where_it_is_not_kept() -> None:
    """The result of vLLM 0.26 has no latencies: TTFT and gaps are made of the same clock readings."""
    without = {key: value for key, value in RESULT.items() if key != "latencies"}
    run = bench.run_from(without, "single", WORKLOAD, 1, 0, "vllm bench serve", None)
    assert run.e2e_s == pytest.approx(RESULT["latencies"])


# Plays the worker: answers jobs until one asks it for a failure or for its death.
WORKER = """
import json, os, pathlib, sys, time
assert sys.argv[1:] == ["-m", "disagglab.measure.loadworker"], sys.argv
assert os.environ["PYTHONHASHSEED"] == "0"
folder = pathlib.Path(os.environ["TMPDIR"])
number = 0
while True:
    number += 1
    while not (folder / f"{number}.job").exists():
        time.sleep(0.01)
    options = json.loads((folder / f"{number}.job").read_text())
    given = dict(zip(options[::2], options[1::2]))
    if given["--model"] == "deadly":
        sys.exit("no more")
    prompts = pathlib.Path(given["--dataset-path"]).read_text().splitlines()
    answer = {"error": "why"} if given["--model"] == "bad" else {"result": RESULT, "client": None}
    if len(prompts) != 2 or given["--base-url"] != "http://r":
        answer = {"error": f"not what was asked for: {options}"}
    (folder / "part").write_text(json.dumps(answer))
    (folder / "part").rename(folder / f"{number}.answer")
"""


@pytest.fixture
def host(state: Path, tmp_path: Path) -> Iterator[Host]:
    """This machine, whose suite has a stand-in for the worker."""
    program = tmp_path / "worker.py"
    program.write_text(WORKER.replace("RESULT", repr(RESULT)))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{program}" "$@"\n')
    python.chmod(0o755)
    made = local_host("selftest", (20700, 20799), tmp_path, str(python))
    yield made
    made.close()


def topology(model: str) -> Any:
    """As much of one as a job needs."""
    return SimpleNamespace(name="single", served_name=model, router=SimpleNamespace(url="http://r"))


@pytest.mark.parametrize("is_local", [True, False])
def test_a_job_is_a_file_and_so_is_its_answer(
    host: Host, tmp_path: Path, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker answers run after run; on another host it finds a copy of the trace in its scratch. Of a
    job's time its own duration counts as load.
    """
    counted: list[tuple[str, float]] = []
    monkeypatch.setattr(bench, "counts", lambda phase, spent_s: counted.append((str(phase), spent_s)))
    host.is_local = is_local
    engine = bench.LoadEngine(host, Path("/words"), [], tmp_path / "traces")
    for number in range(2):
        run = engine.run(topology("M"), WORKLOAD, seed=1, number=number)
        assert run.ttft_s == tuple(RESULT["ttfts"])
        assert (run.round, run.client) == (number, None)
    assert counted == [("load", RESULT["duration"])] * 2
    (trace,) = (tmp_path / "traces").iterdir()
    process = engine._process
    assert process is not None
    copy = Path(process.scratch) / trace.name
    where = trace if is_local else copy
    assert f"--dataset-path {where} " in run.command
    assert copy.exists() != is_local
    assert where.read_text() == trace.read_text()


def test_a_job_that_fails_makes_the_run_invalid(host: Host, tmp_path: Path) -> None:
    """The reason and the command are shown; the worker lives, and the next job is answered."""
    engine = bench.LoadEngine(host, Path("/words"), [], tmp_path / "traces")
    with pytest.raises(InvalidRun, match=r"single: load engine: why; command: .* vllm bench serve "):
        engine.run(topology("bad"), WORKLOAD, seed=1)
    assert engine.run(topology("M"), WORKLOAD, seed=1).ttft_s == tuple(RESULT["ttfts"])


def test_a_worker_that_died_shows_its_last_words(host: Host, tmp_path: Path) -> None:
    """At once, not after the deadline of a job."""
    engine = bench.LoadEngine(host, Path("/words"), [], tmp_path / "traces")
    with pytest.raises(Died, match=r"load, load engine \(pid \d+\) died .*: ended with status 1") as raised:
        engine.run(topology("deadly"), WORKLOAD, seed=1)
    assert raised.value.death.last_error == "no more"


def test_the_worker_answers_jobs_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A result as vLLM computed it; an option that it does not know, or an exception, is an answer, too."""

    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--say")

    async def main_async(given: argparse.Namespace) -> dict[str, Any]:
        if given.say == "stop":
            raise KeyboardInterrupt
        if given.say == "fail":
            raise ValueError("why")
        return {"said": given.say, "start_times": []}

    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.benchmarks": {},
        "vllm.benchmarks.datasets": {},
        "vllm.benchmarks.datasets.datasets": {"TimedTrace": type("Trace", (TextTrace,), {})},
        "vllm.benchmarks.serve": {
            "add_cli_args": add_cli_args,
            "main_async": main_async,
            "get_tokenizer": lambda _: None,
        },
        "vllm.utils": {},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    jobs = (["--say", "a b"], ["--unknown"], ["--say", "fail"], ["--say", "stop"])
    for number, options in enumerate(jobs, start=1):
        (tmp_path / f"{number}.job").write_text(json.dumps(options))
    with pytest.raises(KeyboardInterrupt):
        loadworker.serve(tmp_path)
    answers = [json.loads((tmp_path / f"{number}.answer").read_text()) for number in (1, 2, 3)]
    assert answers == [
        {"result": {"said": "a b", "start_times": []}, "client": None},
        {"error": "SystemExit: 2"},
        {"error": "ValueError: why"},
    ]
    assert not (tmp_path / "4.answer").exists()

"""Runs ``vllm bench serve`` jobs in one process, because starting it costs 7 s of imports each time.

Run as a program: ``python -m disagglab.measure.loadworker``. A file ``N.job`` in TMPDIR holds the options of
one ``vllm bench serve`` as JSON; ``N.answer`` appears with its result, as vLLM computed it, and how busy
this process was meanwhile. N counts from 1. Files, because they work alike on this machine and over SSH.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import time
import traceback
from collections.abc import Awaitable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from disagglab.agent.supervisor import write_atomically
from disagglab.measure.client_lag import LoopLag

POLL_S = 0.02  # between two jobs, not within one


class _Undecoded:
    """Stands for a tokenizer; leaves token ids as they are where they would be turned into text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: list[int], *_: Any, **__: Any) -> list[int]:
        """The ids themselves."""
        return token_ids


def keep_token_ids(dataset: Any) -> None:
    """Let a trace's prompts be sent as token ids.

    vLLM 0.26 replays a trace as text, which its server cuts into another number of tokens; later releases
    send the ids. Where they do, nothing changes.
    """
    stock = dataset.sample

    def sample(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, _Undecoded(tokenizer), *args, **kwargs)

    dataset.sample = sample


def keep_tokenizer(serve: Any) -> None:
    """Let the module of ``vllm bench serve`` load a tokenizer once, not once a job.

    Its jobs differ in target and trace. The tokenizer, whose vocabulary they draw from, is the same.
    """
    serve.get_tokenizer = functools.cache(serve.get_tokenizer)


async def _watched(job: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    async with LoopLag().watch() as lag:
        result = await job
    starts = [start for start in result["start_times"] if start]  # perf_counter, as the samples
    load = lag.between(min(starts), min(starts) + result["duration"]) if starts else None
    return {"result": result, "client": asdict(load) if load else None}


def serve(folder: Path) -> None:
    """Import vLLM's load engine, then answer jobs until ended from outside."""
    from vllm.benchmarks import serve as bench_serve
    from vllm.benchmarks.datasets.datasets import TimedTrace
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = FlexibleArgumentParser()
    bench_serve.add_cli_args(parser)
    keep_token_ids(TimedTrace)
    keep_tokenizer(bench_serve)
    for number in itertools.count(1):
        job = folder / f"{number}.job"
        while not job.exists():
            time.sleep(POLL_S)
        try:
            options = parser.parse_args(json.loads(job.read_text()))
            answer: dict[str, Any] = asyncio.run(_watched(bench_serve.main_async(options)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the answer carries it to who asked
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        write_atomically(str(folder / f"{number}.answer"), json.dumps(answer, default=float))


if __name__ == "__main__":
    serve(Path(os.environ["TMPDIR"]))

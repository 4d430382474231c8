"""Runs that were never made, with times that a test chooses."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from disagglab.config.arrivals import STEADY, arrivals
from disagglab.config.workload import Workload
from disagglab.results.records import Ledger, Run


def made_run(
    topology: str,
    workload: Workload,
    number: int,
    seconds: float = 1.0,
    took_s: float = 0.0,
    seed: int = 1,
    invalid: str | None = None,
) -> Run:
    """A run in which every request takes 2 x ``seconds``, half of them until its first token, and every gap a
    tenth; its whole duration is that of its requests one after another.
    """
    requests = arrivals(workload, seed)
    count = len(requests)
    duration = 2 * seconds * count
    book = Ledger({}, {}, {}, 0, count, 0.001 * seconds * count, 0, 0, 0, 0, 0, 0)
    return Run(
        topology, workload, seed, number, "vllm bench serve", duration, None,
        ttft_s=(seconds,) * count,
        e2e_s=(2 * seconds,) * count,
        itl_s=tuple((seconds / 10,) * (120 if one.stream == STEADY else 10) for one in requests),
        prompt_tokens=tuple(one.prompt_tokens for one in requests),
        output_tokens=tuple(one.output_tokens for one in requests),
        start_s=tuple(one.arrival_s for one in requests),
        streams=tuple(one.stream for one in requests),
        ledger=book if topology.startswith("disaggregated") else None,
        invalid=invalid,
        took_s=duration + took_s,
    )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """As much of a topology as rounds ask for."""

    name: str
    router: Any
    cycle: int = 1
    servers: tuple[object, ...] = ()
    decode: tuple[object, ...] = ()

    def require_alive(self) -> None:
        """It is."""


def made_arm(name: str) -> Any:
    """An arm with a router that its twin shares."""
    return Arm(name, SimpleNamespace(url=f"http://{name.removesuffix('-again')}"))

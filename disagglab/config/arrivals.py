"""Traces: which request of a workload arrives when, and of which pieces its prompt is made.

A trace is written in the format that ``vllm bench serve --dataset-name timed_trace`` replays: one JSON object
a line with ``timestamp`` (s), ``input_length``, ``output_length`` (tokens) and ``hash_ids``, one id for each
piece of CHUNK tokens. The same id makes the same tokens, so prompts share exactly what their ids share.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disagglab.config.workload import CHUNK, Workload

MAIN, STEADY = "main", "steady"
ID_BITS = 48


@dataclass(frozen=True)
class Arrival:
    """One request. ``arrival_s``: when it is sent, from the beginning of the run."""

    arrival_s: float
    stream: str
    prompt_tokens: int
    output_tokens: int
    pieces: tuple[int, ...]


def arrivals(workload: Workload, seed: int) -> list[Arrival]:
    """The requests of one run in the order of arrival; the same for the same seed.

    A closed loop offers all requests at once and leaves it to the client to hold them back. In an open loop n
    requests arrive in n / rate seconds. Their times are independent and uniform, which is what a Poisson
    process looks like given that exactly n arrivals fell into that time (S. Ross, Introduction to Probability
    Models, "conditional distribution of the arrival times"): the number does not vary from round to round.
    """
    source = random.Random(seed)

    def pieces(tokens: int, prefix: Sequence[int] = ()) -> tuple[int, ...]:
        fresh = -(-tokens // CHUNK) - len(prefix)
        return (*prefix, *(source.getrandbits(ID_BITS) for _ in range(fresh)))

    def request(at: float, stream: str, prompt: int, output: int, prefix: Sequence[int] = ()) -> Arrival:
        return Arrival(at, stream, prompt, output, pieces(prompt, prefix))

    found: list[Arrival] = []
    lead = 0.0
    if workload.steady is not None:
        steady, lead = workload.steady, workload.steady.lead_s
        found += [
            request(0.0, STEADY, steady.prompt_tokens, steady.output_tokens) for _ in range(steady.requests)
        ]
    shared = pieces(workload.shared_prefix_tokens)
    times = [0.0] * workload.run_requests
    if workload.rate_per_s is not None:
        window = workload.run_requests / workload.rate_per_s
        times = sorted(lead + window * source.random() for _ in range(workload.run_requests))
    found += [request(at, MAIN, workload.prompt_tokens, workload.output_tokens, shared) for at in times]
    return found


def write(path: Path, requests: Sequence[Arrival]) -> None:
    """Write a trace file."""
    lines = [
        json.dumps(
            {
                "timestamp": one.arrival_s,
                "input_length": one.prompt_tokens,
                "output_length": one.output_tokens,
                "hash_ids": one.pieces,
            }
        )
        for one in requests
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")

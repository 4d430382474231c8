"""What is read off a run: each metric with its unit, direction and formula (docs/reference/metrics.md).

A metric is defined here and nowhere else. What METRICS lists is a figure of every run, may be asked for by a
``[[gate]]`` of a lab file (unless it says ``gated=False``), and stands in report and history in this order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Literal, TypeVar

Direction = Literal["lower", "higher"]
Of = TypeVar("Of")

TIME_PER_TOKEN = "time_per_output_token"  # wall time of a run over the tokens of all its answers, s
PERCENTILE_SAMPLES = {50: 1, 90: 10, 95: 20, 99: 100}  # fewer samples than this: the percentile is not shown


@dataclass(frozen=True)
class Metric(Generic[Of]):
    """One metric. ``better``: which values are. ``formula``: gives None where there are too few samples, or
    nothing to measure.

    ``by_stream``: whether one stream of a workload has it, else all requests only. ``needs_slo``: whether it
    counts requests that met the lab's objective. ``needs_transfer``: whether only arms in which KV moves have
    it. ``share``: whether it is k of n requests. ``gated``: whether a gate may ask for it.

    ``each``: the values of single requests, where the metric is their median. ``by_length``: whether it
    depends on how many requests a run has, because it counts its beginning and end, or because a far
    percentile of few samples is another thing than that of many.
    """

    name: str
    unit: str
    better: Direction
    formula: Callable[[Of], float | None]
    by_stream: bool = True
    needs_slo: bool = False
    needs_transfer: bool = False
    share: bool = False
    gated: bool = True
    each: Callable[[Of], Sequence[float]] | None = None
    by_length: bool = True

    def comparable(self, value: float, requests: int) -> float:
        """A value as the verdict takes it. Its logarithm has to exist: of a share k / n, (k + 1/2) / (n + 1).

        Source of the correction: F. Anscombe, On estimating binomial response relations, Biometrika 43
        (1956).
        """
        return (value * requests + 0.5) / (requests + 1) if self.share else value

    def step(self, comparable: float, requests: int) -> float:
        """Relative difference that one request more makes to a value as the verdict takes it: of a share
        k / n, 1 / (k + 1/2); 0 for what is no count of requests.
        """
        return 1 / (comparable * (requests + 1)) if self.share else 0.0

    def as_times(self, values: Sequence[float]) -> tuple[str, list[float]] | None:
        """Values for a table that knows times alone (s, lower is better), and what they are called there: a
        throughput is the time per output token; None for a share or a rate of requests, which is no time.
        """
        match self.unit:
            case "s":
                return self.name, list(values)
            case "tokens/s":
                return TIME_PER_TOKEN, [1 / value for value in values]
            case _:
                return None


@dataclass(frozen=True)
class Answers:
    """The answered requests of a run, or of one of its streams. Seconds, tokens.

    ``gaps_s``: between the chunks of all answers, pooled. ``duration_s``: of the whole run. ``good``: how
    many met the objective, None without one. ``transfer_s``: mean time of a KV transfer, None where no KV
    moved.
    """

    ttft_s: Sequence[float]
    tpot_s: Sequence[float]
    gaps_s: Sequence[float]
    e2e_s: Sequence[float]
    output_tokens: Sequence[int]
    duration_s: float
    good: int | None = None
    transfer_s: float | None = None


def percentile(samples: Sequence[float], p: int) -> float | None:
    """The ``p``-th percentile (linear interpolation); None with fewer samples than it takes to know it."""
    if len(samples) < PERCENTILE_SAMPLES[p]:
        return None
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * p / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def of_stream(name: str, stream: str) -> str:
    """What files and tables call a metric of one stream; of all requests, its name."""
    return f"{name} ({stream})" if stream else name


def _attainment(run: Answers) -> float | None:
    return run.good / len(run.ttft_s) if run.good is not None and run.ttft_s else None


def _goodput(run: Answers) -> float | None:
    return run.good / run.duration_s if run.good is not None and run.duration_s > 0 else None


def _transfer_share(run: Answers) -> float | None:
    waited_s = math.fsum(run.ttft_s)
    return (
        run.transfer_s * len(run.ttft_s) / waited_s if run.transfer_s is not None and waited_s > 0 else None
    )


def _throughput(run: Answers) -> float | None:
    return sum(run.output_tokens) / run.duration_s if run.duration_s > 0 else None


_OF_A_RUN: tuple[Metric[Answers], ...] = (
    Metric(
        "ttft_p50", "s", "lower", lambda run: percentile(run.ttft_s, 50),
        each=lambda run: run.ttft_s, by_length=False,
    ),
    Metric(
        "tpot_p50", "s", "lower", lambda run: percentile(run.tpot_s, 50),
        each=lambda run: run.tpot_s, by_length=False,
    ),
    Metric("itl_p50", "s", "lower", lambda run: percentile(run.gaps_s, 50), by_length=False),
    Metric("itl_p99", "s", "lower", lambda run: percentile(run.gaps_s, 99)),
    Metric(
        "e2e_p50", "s", "lower", lambda run: percentile(run.e2e_s, 50),
        each=lambda run: run.e2e_s, by_length=False,
    ),
    Metric("output_tokens_per_s", "tokens/s", "higher", _throughput),
    Metric(
        "slo_attainment", "share of sent", "higher", _attainment,
        by_stream=False, needs_slo=True, share=True,
    ),
    Metric(
        "goodput_per_s", "requests/s", "higher", _goodput,
        by_stream=False, needs_slo=True,
        gated=False,  # between runs of equal arrivals the attainment tells the same
    ),
    Metric(
        "transfer_share_of_ttft", "share of TTFT", "lower", _transfer_share,
        by_stream=False, needs_transfer=True, by_length=False,
    ),
)  # fmt: skip
METRICS: Mapping[str, Metric[Answers]] = MappingProxyType({metric.name: metric for metric in _OF_A_RUN})
GATED = tuple(metric.name for metric in _OF_A_RUN if metric.gated)

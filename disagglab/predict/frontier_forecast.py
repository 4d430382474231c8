"""A frontier before it is measured: what each way would make of the same arrivals, at several rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disagglab.config.arrivals import arrivals
from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.predict import ways
from disagglab.predict.breakeven import Cluster
from disagglab.predict.engine import Request
from disagglab.predict.goodput import Goodput, goodput
from disagglab.predict.sharding import AllReduces
from disagglab.predict.simulation import Served
from disagglab.predict.ways import Planned
from disagglab.stats.metric import percentile

FORMAT = 1  # of the record; a reader refuses another

Runs = Mapping[tuple[str, float], Sequence[Served]]  # by arm and offered rate (1/s): a run a seed or a round


@dataclass(frozen=True)
class ForecastPoint:
    """One way at one offered rate; figures are means over the runs of the seeds.

    A percentile is None where a run has fewer samples than it takes to know it, as in measurements.
    """

    arm: str
    rate_per_s: float
    requests: int
    output_tokens_per_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    attainment: float
    goodput_per_s: float


@dataclass(frozen=True)
class FrontierForecast:
    """Every way at every rate, under one objective."""

    workload: str
    ttft_limit_s: float
    tpot_limit_s: float
    seeds: tuple[int, ...]
    points: tuple[ForecastPoint, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Ways, in the order in which they were given."""
        return tuple(dict.fromkeys(one.arm for one in self.points))

    @property
    def rates_per_s(self) -> tuple[float, ...]:
        """Offered rates, ascending."""
        return tuple(sorted({one.rate_per_s for one in self.points}))

    @property
    def goodput_per_s(self) -> dict[tuple[str, float], float]:
        """By arm and rate."""
        return {(one.arm, one.rate_per_s): one.goodput_per_s for one in self.points}

    def winner(self, rate_per_s: float) -> str | None:
        """The way with the highest goodput at a rate; None where none has a good request."""
        there = [one for one in self.points if one.rate_per_s == rate_per_s]
        best = max(there, key=lambda one: one.goodput_per_s)
        return best.arm if best.goodput_per_s > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """A plain record for JSON, winners included."""
        winners = [{"rate_per_s": rate, "arm": self.winner(rate)} for rate in self.rates_per_s]
        return {"format": FORMAT, **asdict(self), "winners": winners}


def read(record: Mapping[str, Any]) -> FrontierForecast:
    """A forecast from its record.

    Raises:
        ValueError: if the record has another format.
    """
    if record.get("format") != FORMAT:
        raise ValueError(f"a forecast of format {record.get('format')!r}; this version reads {FORMAT}")
    return FrontierForecast(
        record["workload"],
        record["ttft_limit_s"],
        record["tpot_limit_s"],
        tuple(record["seeds"]),
        tuple(ForecastPoint(**one) for one in record["points"]),
    )


def serve(
    cluster: Cluster,
    planned: Sequence[Planned],
    workloads: Sequence[Workload],
    seeds: Sequence[int],
    reduces: AllReduces | None = None,
    fixed_s: float = 0.0,
) -> dict[tuple[str, float], tuple[Served, ...]]:
    """What each way makes of the very arrivals that a measurement draws from these seeds, the same for all.

    Args:
        workloads: one for each offered rate, in open loops.
        reduces, fixed_s: see :func:`disagglab.predict.ways.cluster_of`.

    Raises:
        ValueError: if a workload has no rate, two have the same, or a sharded way comes without ``reduces``.
    """
    found: dict[tuple[str, float], tuple[Served, ...]] = {}
    for workload in workloads:
        rate = _rate(workload)
        drawn = [_requests(workload, seed) for seed in seeds]
        for way in planned:
            if (way.arm, rate) in found:
                raise ValueError(f"{way.arm} at {rate:g}/s is asked for twice")
            found[way.arm, rate] = tuple(
                ways.serve_requests(cluster, way, one, reduces, fixed_s) for one in drawn
            )
    return found


def summed(
    runs: Runs, workloads: Sequence[Workload], seeds: Sequence[int], slo: SloSection, stream: str = ""
) -> FrontierForecast:
    """The figures of runs that :func:`serve` made.

    Args:
        stream: whose requests TTFT, TPOT, ITL, attainment and goodput are of; all if empty. Tokens/s are of
            all.

    Raises:
        ValueError: if the workloads have no such stream.
    """
    by_rate = {_rate(one): one for one in workloads}
    points = []
    for (arm, rate), each in runs.items():
        requests = arrivals(by_rate[rate], seeds[0])  # streams and lengths are the same for all seeds
        chosen = [place for place, one in enumerate(requests) if not stream or one.stream == stream]
        if not chosen:
            raise ValueError(f"{by_rate[rate].name} has no stream {stream!r}")
        tokens = sum(one.output_tokens for one in requests)
        points.append(_point(arm, rate, each, chosen, tokens, slo))
    name = workloads[0].name
    return FrontierForecast(name, slo.ttft_s, slo.tpot_s, tuple(seeds), tuple(points))


def forecast(
    cluster: Cluster,
    planned: Sequence[Planned],
    workloads: Sequence[Workload],
    slo: SloSection,
    seeds: Sequence[int],
    reduces: AllReduces | None = None,
    fixed_s: float = 0.0,
    stream: str = "",
) -> FrontierForecast:
    """:func:`serve` and :func:`summed` in one."""
    return summed(serve(cluster, planned, workloads, seeds, reduces, fixed_s), workloads, seeds, slo, stream)


def _point(
    arm: str, rate_per_s: float, runs: Sequence[Served], chosen: Sequence[int], tokens: int, slo: SloSection
) -> ForecastPoint:
    def mean(figures: Sequence[float | None]) -> float | None:
        known = [one for one in figures if one is not None]
        return statistics.fmean(known) if len(known) == len(figures) else None

    def among(times: Sequence[float], p: int) -> float | None:
        return percentile([times[place] for place in chosen], p)

    places = frozenset(chosen)
    good = [_good(run, chosen, slo) for run in runs]
    return ForecastPoint(
        arm,
        rate_per_s,
        len(chosen),
        statistics.fmean(tokens / run.duration_s for run in runs),
        mean([among(run.ttft_s, 50) for run in runs]),
        mean([among(run.ttft_s, 99) for run in runs]),
        mean([among(run.tpot_s, 50) for run in runs]),
        mean([among(run.tpot_s, 99) for run in runs]),
        mean([run.itl_s(50, places) for run in runs]),
        mean([run.itl_s(99, places) for run in runs]),
        statistics.fmean(one.attainment for one in good),
        statistics.fmean(one.per_s for one in good),
    )


def _good(run: Served, chosen: Sequence[int], slo: SloSection) -> Goodput:
    """Of the chosen requests; over the time of the whole run."""
    ttft, tpot, e2e = (
        tuple(times[place] for place in chosen) for times in (run.ttft_s, run.tpot_s, run.e2e_s)
    )
    some = Served(ttft, tpot, e2e, run.duration_s)
    return goodput(some, slo)


def _rate(workload: Workload) -> float:
    if workload.rate_per_s is None:
        raise ValueError(f"{workload.name} is a closed loop, so it offers no rate")
    return workload.rate_per_s


def _requests(workload: Workload, seed: int) -> list[Request]:
    return [Request(one.arrival_s, one.prompt_tokens, one.output_tokens) for one in arrivals(workload, seed)]

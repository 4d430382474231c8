"""What settings are compared by: more good requests first, then a lower p99 gap between tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from disagglab.config.arrivals import STEADY
from disagglab.config.schema import SloSection
from disagglab.results.metrics import figures, good_requests
from disagglab.results.records import Run

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Seen:
    """What one valid run says. ``good``: of ``sent`` requests, those that met the lab's objective.

    ``itl_p99_s``: of the steady requests where the workload has some, else of all; None with fewer than 100
    gaps. ``took_s``: the run with its proof, by the wall clock.
    """

    good: int
    sent: int
    duration_s: float
    itl_p99_s: float | None
    took_s: float


@dataclass(frozen=True)
class Score:
    """What several runs of one candidate say together. ``itl_p99_s``: geometric mean of the runs that have
    it, because a run is the replicate and ratios are what is compared; None where none has.
    """

    runs: int
    good: int
    sent: int
    duration_s: float
    itl_p99_s: float | None

    @property
    def good_per_s(self) -> float:
        """Good requests per second of the runs; 0 without a duration."""
        return self.good / self.duration_s if self.duration_s > 0 else 0.0


def seen(run: Run, slo: SloSection) -> Seen:
    """The figures of a run.

    Args:
        slo: the lab's objective.

    Raises:
        ValueError: if the run is invalid; such a run is never aggregated.
    """
    if run.invalid:
        raise ValueError(f"the run is invalid: {run.invalid}")
    stream = STEADY if run.workload.steady else ""
    return Seen(
        good=good_requests(run, slo),
        sent=len(run.ttft_s),
        duration_s=run.duration_s,
        itl_p99_s=figures(run, slo, stream)["itl_p99"],
        took_s=run.duration_s if run.took_s is None else run.took_s,
    )


def score(runs: Sequence[Seen]) -> Score:
    """Runs of one candidate taken together.

    Raises:
        ValueError: if there is none.
    """
    if not runs:
        raise ValueError("no run to score")
    gaps = [run.itl_p99_s for run in runs if run.itl_p99_s]
    return Score(
        runs=len(runs),
        good=sum(run.good for run in runs),
        sent=sum(run.sent for run in runs),
        duration_s=math.fsum(run.duration_s for run in runs),
        itl_p99_s=statistics.geometric_mean(gaps) if gaps else None,
    )


def ranked(scores: Mapping[Key, Score], open_loop: bool) -> list[Key]:
    """The candidates, best first; of equals, in the order given.

    Good requests are compared with a resolution of one request. In an open loop every candidate was sent the
    same requests in the same time, so their number is compared; a run that ends a little earlier because its
    last answer does is no better. In a closed loop each is taken over the median duration of all.

    Args:
        scores: each over equally many runs.
        open_loop: whether requests arrive by themselves.
    """
    if not scores:
        return []
    common_s = statistics.median(one.duration_s for one in scores.values())

    def badness(key: Key) -> tuple[float, float]:
        one = scores[key]
        good = one.good if open_loop else round(one.good_per_s * common_s)
        return -good, math.inf if one.itl_p99_s is None else one.itl_p99_s

    return sorted(scores, key=badness)

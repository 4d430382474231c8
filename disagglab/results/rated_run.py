"""A run of one way at one offered rate, as much of it as a frontier is recomputed from."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from disagglab.errors import InvalidRun
from disagglab.results import open_loop
from disagglab.results.promise import Promise, gap_of
from disagglab.results.records import Run
from disagglab.stats.metric import METRICS, percentile

DIGITS = (
    3  # of a gap that is kept: a limit of so many digits divides the gaps as it divided the measured ones
)
MICRO = 1_000_000


@dataclass(frozen=True)
class RatedRun:
    """What is kept of a run of one arm at one offered rate. Per-request lists in the order of sending, times
    rounded to 1 us.

    ``tpot_s``, ``gap_s``: None for an answer of one token; ``gap_s`` as in :func:`.promise.gap_of`.
    ``gaps``: all gaps, s, rounded up to three digits, with how often each was seen. ``energy_j``: by node.
    """

    arm: str
    rate_per_s: float
    round: int
    seed: int
    duration_s: float
    keeps_up: str
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float | None, ...]
    gap_s: tuple[float | None, ...]
    gaps: Mapping[float, int]
    itl_p99_s: float | None
    prompt_tokens: int
    output_tokens: int
    energy_j: Mapping[str, float] | None = None

    @classmethod
    def of(cls, run: Run, stream: str = "") -> RatedRun:
        """What is kept of a measured run, or of one of its streams.

        Raises:
            InvalidRun: if it is invalid, a closed loop, or has no request of the stream.
        """
        chosen = [i for i in range(len(run.ttft_s)) if not stream or run.streams[i] == stream]
        rate = run.workload.rate_per_s
        if run.invalid is not None or rate is None or not chosen or run.duration_s <= 0:
            why = run.invalid or ("a closed loop" if rate is None else "no requests")
            raise InvalidRun(f"{run.topology}, round {run.round}: no point of a frontier: {why}")
        all_gaps = [gap for i in chosen for gap in run.itl_s[i]]
        queue = open_loop.of(run)
        return cls(
            arm=run.topology,
            rate_per_s=rate,
            round=run.round,
            seed=run.seed,
            duration_s=run.duration_s,
            keeps_up=str(queue.keeps_up) if queue else str(open_loop.KeepsUp.TOO_SHORT),
            ttft_s=tuple(round(run.ttft_s[i], 6) for i in chosen),
            tpot_s=tuple(_tpot(run, i) for i in chosen),
            gap_s=tuple(_micro(gap_of(run.itl_s[i])) for i in chosen),
            gaps=dict(sorted(Counter(map(rounded_up, all_gaps)).items())),
            itl_p99_s=percentile(all_gaps, 99),
            prompt_tokens=sum(run.prompt_tokens[i] for i in chosen),
            output_tokens=sum(run.output_tokens[i] for i in chosen),
            energy_j=run.energy_j,
        )

    @property
    def sent(self) -> int:
        """Requests."""
        return len(self.ttft_s)

    @property
    def per_user(self) -> float | None:
        """Output tokens per second of one user: 1 / median TPOT, 1/s; None where no answer has two tokens."""
        known = [tpot for tpot in self.tpot_s if tpot is not None]
        middle = statistics.median(known) if known else 0.0
        return 1 / middle if middle > 0 else None

    def good(self, promise: Promise) -> int:
        """Requests that keep a promise; counted once, and kept with the run."""
        if promise not in self._counts:
            self._counts[promise] = self._count(promise)
        return self._counts[promise]

    @cached_property
    def _counts(self) -> dict[Promise, int]:
        return {}

    def _count(self, promise: Promise) -> int:
        limits = [math.inf if one is None else one for one in (promise.ttft_s, promise.tpot_s, promise.itl_s)]
        return int((self._times <= limits).all(axis=1).sum())

    @cached_property
    def _times(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """A row a request: TTFT, TPOT, gap, s; what it does not have keeps every limit."""
        rows = zip(self.ttft_s, self.tpot_s, self.gap_s, strict=True)
        return np.array([[-math.inf if one is None else one for one in row] for row in rows])

    def good_per_s(self, promise: Promise) -> float:
        """Good requests per second of the run."""
        return self.good(promise) / self.duration_s

    def comparable_per_s(self, promise: Promise) -> float:
        """The same as a ratio takes it: positive even where no request was good (stats/metric.py)."""
        share = METRICS["slo_attainment"].comparable(self.good(promise) / self.sent, self.sent)
        return share * self.sent / self.duration_s

    def gaps_above(self, limit_s: float) -> float | None:
        """Share of gaps longer than a limit; None without gaps."""
        total = sum(self.gaps.values())
        late = sum(count for gap, count in self.gaps.items() if gap > limit_s)
        return late / total if total else None


def rounded_up(gap_s: float) -> float:
    """A gap rounded to 1 us and then up to three digits, s."""
    micro = round(gap_s * MICRO)
    step = int(10 ** max(0, len(str(micro)) - DIGITS))
    return -(-micro // step) * step / MICRO


def _micro(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _tpot(run: Run, i: int) -> float | None:
    tokens = run.output_tokens[i]
    return round((run.e2e_s[i] - run.ttft_s[i]) / (tokens - 1), 6) if tokens > 1 else None

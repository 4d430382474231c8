"""What an open-loop run says of its queue: warm-up, Little's law, and whether the topology keeps up.

Of the stream ``main`` alone: steady requests are all sent at the beginning. docs/reference/metrics.md.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from disagglab.config.arrivals import MAIN
from disagglab.results.records import Run
from disagglab.stats import steady
from disagglab.stats.metric import percentile
from disagglab.stats.steady import Balance

SATURATED_BELOW = 0.95  # of the offered rate
GROWS_BELOW = 0.01  # p; numbers of neighbouring parts depend on each other, so it is exceeded more often
UNBALANCED_BY = 0.1  # of L / (lambda W) from 1: a tenth of the requests' time crosses an edge of the window
LEAST_ANSWERS = 3  # a run in which requests arrive for less than so many usual E2E shows no steady state
FIRST_SHARE = 4  # the usual E2E is that of the first quarter of requests if it is shorter: before they queue


class KeepsUp(StrEnum):
    """Whether a topology kept up with its arrivals."""

    YES = "keeps up"
    NO = "saturated"
    TOO_SHORT = "too short to tell"


@dataclass(frozen=True)
class OpenLoop:
    """The queue of one open-loop run.

    ``left_out``: requests of the warm-up, by MSER-5 on E2E; None if the run is too short for the rule.
    ``balance``: Little's law from the first request behind it (from the first at all, if None) to the last
    arrival. ``kept_rate``: see :func:`kept_rate`. ``growth_p``: that the number in system does not grow; None
    with too few requests. ``ttft_p50_s``: median of the requests behind the warm-up; None without
    ``left_out``.
    """

    requests: int
    left_out: int | None
    balance: Balance | None
    kept_rate: float | None
    growth_p: float | None
    ttft_p50_s: float | None

    @property
    def in_steady_state(self) -> bool:
        """Whether L = lambda W holds within ``UNBALANCED_BY``."""
        return self.balance is not None and abs(1 - self.balance.ratio) <= UNBALANCED_BY

    @property
    def keeps_up(self) -> KeepsUp:
        """Saturated if completions fall behind arrivals and the number in system grows; where only one of
        these is seen, Little's law decides whether the run is long enough to say that it keeps up.
        """
        if self.kept_rate is None or self.growth_p is None:
            return KeepsUp.TOO_SHORT
        signs = (self.kept_rate < SATURATED_BELOW, self.growth_p <= GROWS_BELOW)
        if all(signs):
            return KeepsUp.NO
        return KeepsUp.TOO_SHORT if any(signs) and not self.in_steady_state else KeepsUp.YES

    def as_json(self) -> dict[str, Any]:
        """As it stands in the run's file; times in s, rates in 1/s."""
        little = self.balance
        return {
            "keeps_up": str(self.keeps_up),
            "in_steady_state": self.in_steady_state,
            "requests": self.requests,
            "left_out": self.left_out,
            "window_s": little and little.window_s,
            "in_system": little and little.in_system,
            "rate_x_e2e": little and little.rate_per_s * little.e2e_s,
            "ratio": little and little.ratio,
            "kept_rate": self.kept_rate,
            "growth_p": self.growth_p,
            "ttft_p50_behind_warm_up_s": self.ttft_p50_s,
        }

    @property
    def said(self) -> str:
        """For the note of a figure."""
        parts = [f"{self.requests} requests", str(self.keeps_up)]
        if self.kept_rate is not None:
            parts.append(f"completions / arrivals {self.kept_rate:.2f}")
        if self.growth_p is not None:
            parts.append(f"p of no growth {self.growth_p:.2g}")
        if self.balance is not None:
            ratio, rest = self.balance.ratio, "" if self.in_steady_state else ", not in steady state"
            parts.append(f"L / (lambda W) {ratio:.2f}{rest}")
        out = "too short to find a warm-up" if self.left_out is None else f"warm-up {self.left_out} requests"
        return "; ".join([*parts, out])


@dataclass(frozen=True)
class _Main:
    """The requests of the stream ``main`` in the order of their arrival, s."""

    start_s: list[float]
    e2e_s: list[float]
    ttft_s: list[float]

    @classmethod
    def of(cls, run: Run) -> _Main:
        """None are there in a run without answers."""
        chosen = [i for i, stream in enumerate(run.streams) if stream == MAIN]
        order = sorted(chosen, key=lambda i: run.start_s[i])
        return cls(*([values[i] for i in order] for values in (run.start_s, run.e2e_s, run.ttft_s)))


def of(run: Run) -> OpenLoop | None:
    """The queue of a run; None of a closed loop, and of a run without answers."""
    main = _Main.of(run)
    if run.workload.rate_per_s is None or not main.start_s:
        return None
    out = steady.left_out(main.e2e_s)
    return OpenLoop(
        requests=len(main.start_s),
        left_out=out,
        balance=steady.balance(main.start_s, main.e2e_s, out or 0),
        kept_rate=kept_rate(run),
        growth_p=steady.growth_p(steady.found_in_system(main.start_s, main.e2e_s)),
        ttft_p50_s=None if out is None else percentile(main.ttft_s[out:], 50),
    )


def kept_rate(run: Run) -> float | None:
    """Rate of completions over rate of arrivals in an open loop; None in a closed one, and in one that is
    too short to tell.

    The time in which the requests arrived over the time in which they were answered, less one answer's own
    (the median E2E). Answers that take equally long give 1; where a queue grows, the last ones come late.
    """
    main = _Main.of(run)
    if run.workload.rate_per_s is None or len(main.start_s) < 2:
        return None
    arriving = main.start_s[-1] - main.start_s[0]
    median = statistics.median(main.e2e_s)
    early = statistics.median(main.e2e_s[: max(1, len(main.e2e_s) // FIRST_SHARE)])
    if arriving < LEAST_ANSWERS * min(median, early):
        return None
    last = max(start + e2e for start, e2e in zip(main.start_s, main.e2e_s, strict=True))
    answering = last - main.start_s[0] - median
    return arriving / answering if answering > 0 else None


def saturated(run: Run) -> bool:
    """Whether the topology fell behind the arrivals of an open loop."""
    found = of(run)
    return found is not None and found.keeps_up is KeepsUp.NO

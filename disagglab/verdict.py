"""From paired runs to a verdict: better, worse, equivalent or undecided.

The replicate is the run, not the request: requests inside a run wait in the same queues and are not
independent. A pair is one round: both arms with the same prompts, back to back. The interval is Student's t
over the log-ratios of the pairs, which kept its nominal coverage at the small numbers of rounds that one can
afford.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from disagglab.errors import InvalidRun

CONFIDENCE = 0.95
POWER = 0.80

Outcome = Literal["better", "worse", "equivalent", "undecided"]
Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Verdict:
    """A comparison of candidate and baseline.

    ``effect``, ``low``, ``high``: candidate / baseline - 1 with its confidence limits.
    ``smallest_detectable``: the relative difference that this many rounds with this spread would find with 80
    % power; None below two rounds.
    """

    outcome: Outcome
    effect: float
    low: float
    high: float
    rounds: int
    margin: float
    smallest_detectable: float | None
    reason: str


def judge(pairs: Sequence[tuple[float, float]], better: Direction, margin: float) -> Verdict:
    """Judge (baseline, candidate) pairs, one a round.

    Args:
        better: whether lower or higher values are better.
        margin: relative differences below it count as equivalent.

    Raises:
        InvalidRun: if there is no pair, or a value is not a positive finite number.
    """
    if not pairs:
        raise InvalidRun("no pair of valid runs to compare")
    if not all(math.isfinite(value) and value > 0 for pair in pairs for value in pair):
        raise InvalidRun(f"values must be positive and finite: {pairs}")
    ratios = [math.log(candidate / baseline) for baseline, candidate in pairs]
    n = len(ratios)
    mean = math.fsum(ratios) / n
    if n < 2:
        return Verdict(
            "undecided",
            math.expm1(mean),
            -1.0,
            math.inf,
            n,
            margin,
            None,
            "one round has no spread; run more rounds",
        )
    error = math.sqrt(math.fsum((ratio - mean) ** 2 for ratio in ratios) / (n - 1) / n)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    low, high = mean - t * error, mean + t * error
    detectable = math.expm1((t + float(stats.t.ppf(POWER, n - 1))) * error)
    bound = math.log1p(margin)
    outcome: Outcome
    if -bound <= low and high <= bound:
        outcome, reason = "equivalent", f"the interval lies within the margin of {margin:.0%}"
    elif high < 0 or low > 0:
        outcome = "better" if (high < 0) == (better == "lower") else "worse"
        reason = "the interval excludes no difference"
    else:
        outcome = "undecided"
        reason = f"the interval holds both no difference and more than the margin; {n} rounds"
    return Verdict(
        outcome, math.expm1(mean), math.expm1(low), math.expm1(high), n, margin, detectable, reason
    )


def passes(verdict: Verdict, want: Literal["better", "not worse"], better: Direction) -> bool:
    """Whether a verdict satisfies a gate. ``not worse``: the bad end of the interval is inside the margin."""
    if want == "better":
        return verdict.outcome == "better"
    bound = math.log1p(verdict.margin)
    worst = (
        math.log1p(verdict.high)
        if better == "lower"
        else -math.log1p(verdict.low)
        if verdict.low > -1
        else math.inf
    )
    return worst <= bound

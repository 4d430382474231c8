"""From paired runs to a verdict: better, worse, equivalent or undecided.

The replicate is the run, not the request: requests inside a run wait in the same queues and are not
independent. A pair is one round: both arms with the same prompts, back to back. The interval is over the
log-ratios of the pairs. Where the number of rounds was fixed beforehand it is Student's t, which kept its
nominal coverage at the small numbers of rounds that one can afford; where each round may be the last it is
that of :mod:`disagglab.stats.sequential`, which holds at every look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from disagglab.stats.metric import Direction
from disagglab.stats.rule import FIXED, fewest_rounds, multiplier, quantile, rounds_to_decide
from disagglab.stats.rule import CONFIDENCE as CONFIDENCE  # these two are words of a verdict as well
from disagglab.stats.rule import Rule as Rule
from disagglab.stats.sample import Limits, Sample, log_ratios, ratio_of, sample_of

ALPHA = 1 - CONFIDENCE
POWER = 0.80

Outcome = Literal["better", "worse", "equivalent", "undecided"]
Want = Literal["better", "not worse"]
ONE_ROUND, NO_SPREAD, ONE_REQUEST = "one round", "every pair equal", "one request"  # of a NoiseFloor
EXACT_FLIPS = 16  # rounds up to which all 2^n sign patterns are tried


@dataclass(frozen=True)
class Verdict:
    """A comparison of candidate and baseline.

    ``effect``, ``low``, ``high``: candidate / baseline - 1 with its confidence limits; without a spread
    (one round), or where the rule decides nothing with so few rounds, the limits are -1 and infinity.
    ``smallest_detectable``: the relative difference that this many rounds with this spread would find with
    80 % power; None where a limit is not finite. ``p``: two-sided, by the rule, of no difference.
    ``p_sign_flip``: the same by turning the signs of the log-ratios in all ways; a check that assumes no
    shape, for one look. ``rule``: what interval and p hold for; ``fixed_low``, ``fixed_high``: the interval
    of Student's t, whatever the rule, which is right where the number of rounds was fixed beforehand.
    """

    outcome: Outcome
    effect: float
    low: float
    high: float
    rounds: int
    margin: float
    smallest_detectable: float | None
    p: float
    p_sign_flip: float
    reason: str
    rule: Rule
    fixed_low: float
    fixed_high: float

    @property
    def underpowered(self) -> bool:
        """Whether a difference of the size of the margin would be missed more often than one time in five."""
        return self.smallest_detectable is None or self.smallest_detectable > self.margin


def judge(
    pairs: Sequence[tuple[float, float]], better: Direction, margin: float, rule: Rule = "fixed-n"
) -> Verdict:
    """Judge (baseline, candidate) pairs, one a round, in the order of measuring.

    Args:
        better: whether lower or higher values are better.
        margin: relative differences below it count as equivalent.
        rule: "fixed-n" where the number of rounds was fixed before the first; "any time" where it depends on
            what was seen, as where one goes on until something is decided; "any time, order drawn" where in
            every round the order of the arms was drawn by lot, too.

    Raises:
        InvalidRun: if there is no pair, or a value is not a positive finite number.
    """
    ratios = log_ratios(pairs)
    sample = sample_of(ratios)
    limits, fixed = sample.limits(rule, ALPHA), sample.limits(FIXED, ALPHA)
    return concluded(sample, limits, fixed, better, margin, rule, (sample.p(rule), sign_flip_p(ratios)))


def concluded(
    sample: Sample,
    limits: Limits,
    fixed: Limits,
    better: Direction,
    margin: float,
    rule: Rule,
    p: tuple[float, float],
    alpha: float = ALPHA,
) -> Verdict:
    """The verdict that an interval gives.

    Args:
        sample: the pairs, whose mean is the effect and whose error tells what could have been detected.
        limits, fixed: the interval by the rule, and by that of a fixed number of rounds.
        p: of no difference, and by turning signs; see :class:`Verdict`.
        alpha: of the wider side of the interval, twice; it decides what can be detected.
    """
    low, high = limits
    detectable: float | None = None
    bound = math.log1p(margin)
    outcome: Outcome
    if -low == high == math.inf:
        outcome, reason = "undecided", _too_few(sample.n, rule, alpha)
    elif -bound <= low and high <= bound:
        outcome, reason = "equivalent", f"the interval lies within the margin of {margin:.3g}"
    elif high < 0 or low > 0:
        outcome = "better" if (high < 0) == (better == "lower") else "worse"
        reason = "the interval excludes no difference"
    else:
        outcome = "undecided"
        reason = f"the interval holds both no difference and more than the margin; {sample.n} rounds"
    factor = multiplier(sample.n, alpha, rule)
    if factor < math.inf:
        detectable = ratio_of((factor + quantile(POWER, sample.n - 1)) * sample.error_of(rule))
        if detectable > margin:
            found = f"the smallest detectable difference, {detectable:.3g}, exceeds the margin"
            reason += f"; underpowered: {found}"
    return Verdict(
        outcome=outcome,
        effect=ratio_of(sample.mean),
        low=ratio_of(low),
        high=ratio_of(high),
        rounds=sample.n,
        margin=margin,
        smallest_detectable=detectable,
        p=p[0],
        p_sign_flip=p[1],
        reason=reason,
        rule=rule,
        fixed_low=ratio_of(fixed[0]),
        fixed_high=ratio_of(fixed[1]),
    )


def _too_few(rounds: int, rule: Rule, alpha: float) -> str:
    if rounds < 2:
        return "one round has no spread; run more rounds"
    fewest = fewest_rounds(alpha, rule)
    return f"{rounds} rounds cannot decide yet under looks after every round; {fewest} is the fewest"


def rounds_needed(
    pairs: Sequence[tuple[float, float]], margin: float, rule: Rule, alpha: float = ALPHA
) -> int | None:
    """Rounds in all that would decide, if mean and spread stayed as they are; None where one round tells no
    spread, or where it would take too many. See :func:`disagglab.stats.rule.rounds_to_decide`.

    Raises:
        InvalidRun: see :func:`judge`.
    """
    sample = sample_of(log_ratios(pairs))
    if sample.n < 2:
        return None
    deviation = sample.error_of(rule) * math.sqrt(sample.n)
    return rounds_to_decide(sample.mean, deviation, sample.n, margin, rule, alpha)


def sign_flip_p(ratios: Sequence[float]) -> float:
    """Exact two-sided p that log-ratios whose signs are a matter of chance lie as far from 0 on average.

    Smallest possible value 2 / 2^n, so fewer than six rounds never reach 0.05. From 17 rounds on the first
    16 are taken: what the check is for, it says by then.
    """
    kept = list(ratios)[:EXACT_FLIPS]
    seen = abs(math.fsum(kept))
    slack = 1e-12 * math.fsum(map(abs, kept))  # of floating-point sums in another order
    sums = np.zeros(1)
    for ratio in kept:
        sums = np.concatenate((sums + ratio, sums - ratio))
    return float(np.count_nonzero(np.abs(sums) >= seen - slack) / sums.size)


def gate_p(
    pairs: Sequence[tuple[float, float]],
    better: Direction,
    margin: float,
    want: Want,
    rule: Rule = "fixed-n",
) -> float:
    """p of a gate's hypothesis, on the scale of a two-sided test: at 0.05 it says what the 95 % interval
    of the same rule says.

    "better": that there is no difference, or one to the worse. "not worse": that the candidate is worse by
    the margin or more.

    Raises:
        InvalidRun: see :func:`judge`.
    """
    ratios = log_ratios(pairs)
    badness = sample_of(ratios if better == "lower" else [-ratio for ratio in ratios])
    bound = 0.0 if want == "better" else math.log1p(margin)
    return badness.p_above(bound, rule)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: with all of a family at 0.05, one false alarm in 20
    families.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def passes(verdict: Verdict, want: Want, p_adjusted: float) -> bool:
    """Whether a gate is met: its hypothesis is refuted within its family; "equivalent" is not "better"."""
    refuted = p_adjusted <= ALPHA
    return refuted and (want == "not worse" or verdict.outcome == "better")


def held_back(answer: str, p: float, p_adjusted: float, family: int, noun: str = "gates") -> str:
    """What an answer says that stands alone and that Holm's correction does not let stand, with both p:
    "better at p 0.03, 0.066 after 12 gates"; empty where the correction decides nothing.
    """
    if not p <= ALPHA < p_adjusted:
        return ""
    return f"{answer} at p {p:.2g}, {p_adjusted:.2g} after {family} {noun}"


@dataclass(frozen=True)
class NoiseFloor:
    """What two identical arms leave open. ``ratio``: ratio - 1, None where it is not known; ``note``: why it
    is not known, or that it is the resolution of a count and no spread.
    """

    ratio: float | None
    note: str = ""


def noise_floor(
    pairs: Sequence[tuple[float, float]], step: float = 0.0, rounds: int | None = None
) -> NoiseFloor:
    """Half the width of the fixed-n 95 % interval that two identical arms (A/A) leave; not known below two
    rounds, and where no pair shows any spread.

    Args:
        rounds: of the verdict beside which it stands, if the identical arms were measured in fewer or more;
            their spread is taken to be the same in all.
        step: relative difference that one request more makes to a figure that counts requests, else 0. A
            floor is never below it: identical counts tell that the noise is less than a request, not that
            there is none. Source: JCGM 100:2008 (GUM), F.2.2.1: also where repeated indications are all
            identical, the uncertainty that comes of the resolution is not zero.

    Raises:
        InvalidRun: see :func:`judge`.
    """
    sample = sample_of(log_ratios(pairs))
    if sample.n < 2:
        return NoiseFloor(None, ONE_ROUND)
    error = sample.error * math.sqrt(sample.n / (rounds or sample.n))
    width = ratio_of(multiplier(sample.n, ALPHA, "fixed-n") * error)
    if width < step:
        return NoiseFloor(step, ONE_REQUEST)
    return NoiseFloor(width) if width > 0 else NoiseFloor(None, NO_SPREAD)

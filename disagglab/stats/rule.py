"""How a confidence interval is made of rounds: their number fixed beforehand, or a look after every one."""

from __future__ import annotations

import math
from typing import Literal

from scipy import special  # scipy.stats would take seconds to load, in each command that reads a verdict

from disagglab.stats import sequential

CONFIDENCE = 0.95
MOST_ROUNDS = 1000  # further ahead no number of rounds is estimated

# "any time, order drawn": the order of the arms was drawn by lot in every round, so that rounds of equal arms
# differ by a fair coin and cannot hang together
Rule = Literal["fixed-n", "any time", "any time, order drawn"]
FIXED: Rule = "fixed-n"
ANY_TIME: Rule = "any time"
ORDER_DRAWN: Rule = "any time, order drawn"


def quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t."""
    return float(special.stdtrit(freedom, share))


def multiplier(rounds: int, alpha: float, rule: Rule) -> float:
    """Half of the interval's width in standard errors; infinite where so few rounds decide nothing.

    Args:
        alpha: chance of a false alarm, two-sided: in this one look ("fixed-n"), or ever (the others).
    """
    if rounds < 2:
        return math.inf
    if rule == FIXED:
        return quantile(1 - alpha / 2, rounds - 1)
    return sequential.multiplier(rounds, alpha)


def fewest_rounds(alpha: float, rule: Rule) -> int:
    """Rounds that a decision takes at the least, however large the effect."""
    return 2 if rule == FIXED else sequential.fewest_rounds(alpha)


def p_value(t: float, rounds: int, rule: Rule) -> float:
    """Two-sided p of no difference at a t statistic, which may be infinite (no spread); 1 with one round."""
    if rounds < 2:
        return 1.0
    if rule != FIXED:
        return sequential.p_value(t, rounds)
    return 0.0 if math.isinf(t) else min(1.0, 2 * float(special.stdtr(rounds - 1, -abs(t))))


def rounds_to_decide(
    mean: float, deviation: float, rounds: int, margin: float, rule: Rule, alpha: float = 1 - CONFIDENCE
) -> int | None:
    """Rounds in all after which the interval, at the present mean and deviation, would exclude no difference
    or lie within the margin; None above ``MOST_ROUNDS``.

    It is a forecast with the present figures, which are themselves uncertain; near 0 or near the margin it
    swings from round to round.

    Args:
        mean, deviation: of the log-ratios so far; the deviation times the inflation of the standard error.
        rounds: made so far; the answer is never below.
        alpha: of the interval; 0.05 / m for the first step of Holm's correction over m gates.
    """
    bound = math.log1p(margin)

    def decides(total: int) -> bool:
        factor = multiplier(total, alpha, rule)
        half = factor * deviation / math.sqrt(total) if factor < math.inf else math.inf
        return abs(mean) > half or abs(mean) + half <= bound

    return next((total for total in range(max(2, rounds), MOST_ROUNDS + 1) if decides(total)), None)

"""How far the ratio of two counts may be expected to vary: of k good requests out of n sent, in two arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from disagglab.stats.pooled import Expected

ROUNDING = 1 / 12  # variance of a whole number about what it stands for, uniform within one


def expected(ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]) -> Expected:
    """Of the log-ratio of good requests, by (good, sent) of each round of one point.

    A share p of n has a log with a variance of (1 - p) / (n p) if requests were good independently; the two
    arms' add up. Requests are not independent, and rounds are paired: by how much that is off is what the
    rounds of all points tell together (over-dispersion; P. McCullagh and J. Nelder, Generalized Linear
    Models, 2nd edition, 1989, section 4.5). Where all requests of an arm are good in every
    round, or none is, and the same holds of the other arm, the rounds tell nothing of it. Shares are
    (k + 1/2) / (n + 1), k and n of all rounds, so that none is 0 or 1.

    Raises:
        ValueError: if there is no round, or none was sent.
    """
    sides = [_side(rounds) for rounds in (ours, theirs)]
    return Expected(
        weight=sum(weight for weight, _, _ in sides),
        resolution=sum(resolution for _, resolution, _ in sides),
        tells=any(tells for _, _, tells in sides),
    )


def _side(rounds: Sequence[tuple[int, int]]) -> tuple[float, float, bool]:
    """Weight, resolution, and whether the counts of one arm may vary at all."""
    good, sent = (math.fsum(values) for values in zip(*rounds, strict=True)) if rounds else (0.0, 0.0)
    if sent <= 0:
        raise ValueError("no request was sent")
    share = (good + 0.5) / (sent + 1)
    count = share * sent / len(rounds)
    return (1 - share) / count, ROUNDING / count**2, 0 < good < sent

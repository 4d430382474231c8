"""One way against the best of several others, the best having been picked by what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from disagglab.stats.best import over_best
from disagglab.stats.pooled import ALPHA, Band, Pooled


@dataclass(frozen=True)
class AgainstBest:
    """``best``: the name of the rival with the smallest ratio; ``band``: way / best of all rivals, log;
    ``rivals``: how many there are.
    """

    best: str
    band: Band
    rivals: int


def against_best(ratios: Mapping[str, tuple[Pooled, int]], alpha: float = ALPHA) -> AgainstBest:
    """The log-ratio of a way to the best of its rivals, where higher figures are better: the smallest of the
    true log-ratios. The limits hold it at 1 - alpha, whichever rival is picked; why, is in
    :mod:`disagglab.stats.best`.

    Args:
        ratios: by rival, the log-ratios way / rival of all points, and which point is asked for.

    Raises:
        ValueError: if there is no rival.
    """
    if not ratios:
        raise ValueError("no rival to compare with")
    count = len(ratios)
    plain = {name: pooled.band(point, alpha) for name, (pooled, point) in ratios.items()}
    wide = [pooled.band(point, alpha / count) for pooled, point in ratios.values()]
    best = min(plain, key=lambda name: plain[name].mean)
    low, high = over_best(*([(band.low, band.high) for band in bands] for bands in (plain.values(), wide)))
    return AgainstBest(best, Band(plain[best].mean, low, high), count)

"""How near a forecast of a frontier came to what was then measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from disagglab.predict.breakeven_points import concordance
from disagglab.predict.frontier_forecast import FrontierForecast
from disagglab.predict.goodput import MARGIN

SAME_RATE = 1e-6  # relative; two rates nearer than that are one, whatever a file made of their last digits

Outcome = Literal["right", "tie", "wrong", "nothing good"]


@dataclass(frozen=True)
class RateScore:
    """One offered rate. ``forecast``, ``measured``: the way with the highest goodput, None if none has.

    ``outcome``: *right*: the way that was forecast is the best, and every other is behind by more than the
    margin. *tie*: it is the best or within the margin of it, and so is another, so that the measurement does
    not tell who won. *wrong*: it is behind the best by more than the margin. *nothing good*: neither side has
    a winner. ``agreement``: Kendall's tau of the ways' goodput; None with one way.
    """

    rate_per_s: float
    forecast: str | None
    measured: str | None
    outcome: Outcome
    agreement: float | None


@dataclass(frozen=True)
class Score:
    """A whole frontier.

    ``right_share``: of the rates that have a winner on either side; ties count as not right there, and as
    right in ``right_or_tie_share``. ``median_factor``, ``worst_factor``: between forecast and measured
    goodput, in either direction, at least 1, over points where both have some; ``worst_at``: where.
    ``one_sided``: points at which one side has goodput and the other none, which have no factor.
    ``left_out``: points that only one side has. Shares and factors are None where there is nothing to count.
    """

    rates: tuple[RateScore, ...]
    right_share: float | None
    right_or_tie_share: float | None
    median_factor: float | None
    worst_factor: float | None
    worst_at: tuple[str, float] | None
    one_sided: tuple[tuple[str, float], ...]
    agreement: float | None
    left_out: tuple[tuple[str, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """A plain record for JSON."""
        return asdict(self)


def score(
    forecast: FrontierForecast,
    measured: Mapping[tuple[str, float], Sequence[float]],
    margin: float = MARGIN,
) -> Score:
    """Forecast beside measurement.

    Args:
        measured: by arm and offered rate (1/s), good requests per second of each round.
        margin: relative difference below which two ways are not told apart.
    """
    ours = forecast.goodput_per_s
    theirs: dict[tuple[str, float], float] = {}
    left_out: list[tuple[str, float]] = []
    for (arm, rate), rounds in measured.items():
        key = next(
            (one for one in ours if one[0] == arm and math.isclose(one[1], rate, rel_tol=SAME_RATE)), None
        )
        if key is None or not rounds:
            left_out.append((arm, rate))
        else:
            theirs[key] = statistics.fmean(rounds)
    left_out += [key for key in ours if key not in theirs]
    rates = []
    for rate in sorted({rate for _, rate in theirs}):
        forecast_there, measured_there = (
            {arm: side[arm, at] for arm, at in theirs if at == rate} for side in (ours, theirs)
        )
        rates.append(_rate(rate, forecast_there, measured_there, margin))
    told = [one for one in rates if one.outcome != "nothing good"]
    factors = {
        key: max(ours[key] / theirs[key], theirs[key] / ours[key])
        for key in theirs
        if ours[key] > 0 and theirs[key] > 0
    }
    taus = [one.agreement for one in told if one.agreement is not None]
    worst = max(factors, key=lambda key: factors[key], default=None)
    right = sum(one.outcome == "right" for one in told)
    tied = sum(one.outcome == "tie" for one in told)
    return Score(
        tuple(rates),
        right / len(told) if told else None,
        (right + tied) / len(told) if told else None,
        statistics.median(factors.values()) if factors else None,
        factors[worst] if worst else None,
        worst,
        tuple(key for key in theirs if (ours[key] > 0) != (theirs[key] > 0)),
        statistics.fmean(taus) if taus else None,
        tuple(left_out),
    )


def _rate(rate_per_s: float, ours: dict[str, float], theirs: dict[str, float], margin: float) -> RateScore:
    picked, best = (_winner(side) for side in (ours, theirs))
    tau = concordance([ours[arm] for arm in theirs], list(theirs.values())) if len(theirs) > 1 else None
    outcome: Outcome
    if best is None:
        outcome = "nothing good" if picked is None else "wrong"
    else:
        level = [arm for arm, value in theirs.items() if theirs[best] <= value * (1 + margin)]
        outcome = "wrong" if picked not in level else "tie" if len(level) > 1 else "right"
    return RateScore(rate_per_s, picked, best, outcome, tau)


def _winner(side: dict[str, float]) -> str | None:
    best = max(side, key=lambda arm: side[arm])
    return best if side[best] > 0 else None

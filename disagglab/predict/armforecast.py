"""What was forecast for arms before they ran, and how near it came to what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from disagglab import text
from disagglab.errors import ConfigError, Problem
from disagglab.results.records import FigureRow
from disagglab.stats.metric import METRICS

# The metric that each field of ArmFigures is held against. A forecast of a mean is held against the median of
# requests, because a run records no mean.
MEASURED = {"output_tokens_per_s": "output_tokens_per_s", "ttft_s": "ttft_p50", "tpot_s": "tpot_p50"}


@dataclass(frozen=True)
class ArmFigures:
    """Three figures of an arm under one workload, forecast or measured, of all its servers together."""

    output_tokens_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Score:
    """A forecast held against a measurement.

    ``errors``: by arm and metric, forecast / measured - 1. ``winners``: by metric, the arm that was forecast
    to be best and the one that was; empty if fewer than two arms have both.
    """

    errors: Mapping[str, Mapping[str, float]]
    winners: Mapping[str, tuple[str, str]]

    @property
    def right(self) -> int:
        """The metrics whose winner was forecast."""
        return sum(forecast == found for forecast, found in self.winners.values())

    def lines(self) -> list[str]:
        """A row an arm, and one a winner."""
        rows = [["forecast / measured - 1", *MEASURED.values()]]
        for arm, errors in self.errors.items():
            rows.append([arm, *(text.percent(errors[metric]) for metric in MEASURED.values())])
        found = text.table(rows, right=range(1, len(rows[0])))
        for metric, (forecast, best) in self.winners.items():
            said = "as forecast" if forecast == best else f"forecast was {forecast}"
            found.append(f"best {metric}: {best}, {said}")
        return found


def score(forecast: Mapping[str, ArmFigures], measured: Mapping[str, ArmFigures]) -> Score:
    """Hold a forecast against a measurement, on the arms that have both.

    Raises:
        ConfigError: if no arm has both, or a measured figure is zero.
    """
    arms = [arm for arm in forecast if arm in measured]
    if not arms:
        wrong = f"of {', '.join(forecast) or 'no arm'}; measured: {', '.join(measured) or 'none'}"
        mend = "measure an arm of the forecast on its workload"
        raise ConfigError([Problem("forecast", "arms", wrong, mend)])
    zero = [arm for arm in arms if not all(_value(measured[arm], metric) > 0 for metric in MEASURED.values())]
    if zero:
        wrong = f"{', '.join(zero)}: a measured figure is zero"
        raise ConfigError([Problem("forecast", "arms", wrong, "leave out runs that gave no answer")])
    errors = {
        arm: {
            metric: _value(forecast[arm], metric) / _value(measured[arm], metric) - 1
            for metric in MEASURED.values()
        }
        for arm in arms
    }
    pairs = {metric: (_best(forecast, arms, metric), _best(measured, arms, metric)) for metric in _BETTER}
    return Score(errors, pairs if len(arms) > 1 else {})


def measured(rows: Iterable[FigureRow], workload: str, definition: str) -> dict[str, ArmFigures]:
    """The arms of a session, each figure the median of its rounds; an arm that lacks one is left out.

    Args:
        definition: of the workload as it was scaled (:attr:`Workload.definition`); others are not comparable.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row.workload, row.definition) == (workload, definition) and row.metric in _FIELDS and row.values:
            found.setdefault(row.arm, {})[_FIELDS[row.metric]] = median(row.values)
    return {arm: ArmFigures(**fields) for arm, fields in found.items() if len(fields) == len(MEASURED)}


_FIELDS = {metric: name for name, metric in MEASURED.items()}
_BETTER = {metric: METRICS[metric].better for metric in _FIELDS}


def _value(figures: ArmFigures, metric: str) -> float:
    return float(getattr(figures, _FIELDS[metric]))


def _best(figures: Mapping[str, ArmFigures], arms: Iterable[str], metric: str) -> str:
    best = max if _BETTER[metric] == "higher" else min
    return best(arms, key=lambda arm: _value(figures[arm], metric))

"""How a forecast of a frontier is scored.

Oracle: tables whose winners and factors are seen at a glance.
"""

from __future__ import annotations

import json

import pytest

from disagglab.predict import forecast_score
from disagglab.predict.frontier_forecast import ForecastPoint, FrontierForecast


def table(cells: dict[tuple[str, float], float]) -> FrontierForecast:
    """A forecast of which only goodput counts."""
    points = (
        ForecastPoint(arm, rate, 10, 1.0, 1.0, None, 0.1, None, 0.1, None, 0.5, good)
        for (arm, rate), good in cells.items()
    )
    return FrontierForecast("x", 1.0, 0.1, (1,), tuple(points))


FORECAST = table(
    {
        ("single", 1.0): 0.5, ("replicated", 1.0): 0.9, ("disaggregated", 1.0): 0.8,
        ("single", 2.0): 0.2, ("replicated", 2.0): 1.0, ("disaggregated", 2.0): 1.6,
        ("single", 3.0): 0.0, ("replicated", 3.0): 1.2, ("disaggregated", 3.0): 1.0,
        ("single", 4.0): 0.0, ("replicated", 4.0): 0.0, ("disaggregated", 4.0): 0.0,
    }
)  # fmt: skip


def test_score_by_hand() -> None:
    """At 1/s two ways are level, at 2/s the winner is right, at 3/s wrong, at 4/s nobody has a good request.

    Factors of the eight points that both have: 1.25, 1, 1.125; 2, 1.25, 1.25; 1.25, 1.2 (single is 0 on one
    side at 3/s); their median is 1.25.
    """
    measured = {
        ("single", 1.0): [0.4], ("replicated", 1.0): [0.88, 0.92], ("disaggregated", 1.0): [0.9],
        ("single", 2.0): [0.4], ("replicated", 2.0): [0.8], ("disaggregated", 2.0): [1.2, 1.36],
        ("single", 3.0): [0.1], ("replicated", 3.0): [0.96], ("disaggregated", 3.0): [1.2],
        ("single", 4.0): [0.0], ("replicated", 4.0): [0.0], ("disaggregated", 4.0): [0.0],
        ("sharded", 1.0): [2.0],
    }  # fmt: skip
    found = forecast_score.score(FORECAST, measured)
    assert [one.outcome for one in found.rates] == ["tie", "right", "wrong", "nothing good"]
    assert [one.measured for one in found.rates][1:] == ["disaggregated", "disaggregated", None]
    assert found.right_share == pytest.approx(1 / 3)
    assert found.right_or_tie_share == pytest.approx(2 / 3)
    assert found.worst_factor == pytest.approx(2.0)
    assert found.worst_at == ("single", 2.0)
    assert found.median_factor == pytest.approx(1.25)
    assert found.one_sided == (("single", 3.0),)
    assert found.left_out == (("sharded", 1.0),)
    tau = [2 / 3, 1.0, 1 / 3]
    assert [one.agreement for one in found.rates][:3] == pytest.approx(tau)
    assert found.agreement == pytest.approx(sum(tau) / 3)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["rates"][0]["outcome"] == "tie"


def test_a_forecast_that_is_measured_as_it_says_is_right() -> None:
    """Factor 1 everywhere; the negative control is the same with the ways exchanged."""
    same = {key: [value] for key, value in FORECAST.goodput_per_s.items() if key[1] < 4}
    found = forecast_score.score(FORECAST, same)
    assert (found.right_share, found.worst_factor, found.agreement) == (1.0, 1.0, 1.0)
    names = {"single": "disaggregated", "replicated": "single", "disaggregated": "replicated"}
    turned = forecast_score.score(FORECAST, {(names[a], rate): value for (a, rate), value in same.items()})
    assert turned.right_or_tie_share == 0


def test_a_rate_in_other_digits_is_the_same_rate() -> None:
    """0.1 + 0.2 is 0.3; a rate that was not measured is left out."""
    found = forecast_score.score(
        table({("single", 0.3): 1.0, ("single", 5.0): 1.0}), {("single", 0.1 + 0.2): [2.0]}
    )
    assert found.worst_factor == 2.0
    assert found.left_out == (("single", 5.0),)
    nothing = forecast_score.score(table({("single", 0.3): 1.0}), {})
    assert (nothing.right_share, nothing.median_factor, nothing.agreement) == (None, None, None)

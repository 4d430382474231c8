"""A forecast of arms held against a measurement. Oracle: errors and winners worked out by hand."""

from __future__ import annotations

import pytest

from disagglab.errors import ConfigError
from disagglab.predict.armforecast import MEASURED, ArmFigures, measured, score
from disagglab.results.records import FigureRow

FORECAST = {
    "single": ArmFigures(100, 0.5, 0.02),
    "sharded": ArmFigures(200, 0.2, 0.03),
    "elsewhere": ArmFigures(1, 1, 1),
}
FOUND = {
    "single": ArmFigures(80, 0.4, 0.02),
    "sharded": ArmFigures(160, 0.5, 0.01),
    "not-forecast": ArmFigures(9, 9, 9),
}


def row(arm: str, metric: str, *values: float, workload: str = "chat", definition: str = "d") -> FigureRow:
    """A figure of an arm; unit and direction do not matter here."""
    return FigureRow(workload, arm, metric, "", "lower", values, definition)


def test_errors_are_of_the_arms_that_have_both() -> None:
    """100 / 80 - 1 = 0.25, 0.2 / 0.5 - 1 = -0.6, 0.03 / 0.01 - 1 = 2."""
    found = score(FORECAST, FOUND)
    assert set(found.errors) == {"single", "sharded"}
    assert found.errors["single"] == pytest.approx(
        {"output_tokens_per_s": 0.25, "ttft_p50": 0.25, "tpot_p50": 0.0}
    )
    assert found.errors["sharded"] == pytest.approx(
        {"output_tokens_per_s": 0.25, "ttft_p50": -0.6, "tpot_p50": 2.0}
    )


def test_the_winner_is_the_highest_throughput_and_the_shortest_time() -> None:
    """Throughput was forecast right; of the two times each was forecast for the other arm."""
    found = score(FORECAST, FOUND)
    assert found.winners == {
        "output_tokens_per_s": ("sharded", "sharded"),
        "ttft_p50": ("sharded", "single"),
        "tpot_p50": ("single", "sharded"),
    }
    assert found.right == 1


def test_one_arm_has_no_winner() -> None:
    """With nothing beside it an arm would always win."""
    found = score(FORECAST, {"single": FOUND["single"]})
    assert found.winners == {}
    assert found.right == 0


@pytest.mark.parametrize("found", [{}, {"other": ArmFigures(1, 1, 1)}, {"single": ArmFigures(1, 0, 1)}])
def test_nothing_to_hold_it_against_is_refused(found: dict[str, ArmFigures]) -> None:
    """No arm in common, or a measured zero, gives no relative error."""
    with pytest.raises(ConfigError, match="arms"):
        score(FORECAST, found)


def test_measured_is_the_median_of_the_rounds() -> None:
    """Of this workload and definition alone; an arm that lacks one of the three figures is left out."""
    rows = [
        row("single", "output_tokens_per_s", 90, 100, 200),
        row("single", "ttft_p50", 0.4, 0.6),
        row("single", "tpot_p50", 0.02),
        row("single", "itl_p99", 7),
        row("single", "ttft_p50", 9, workload="documents"),
        row("single", "tpot_p50", 9, definition="other"),
        row("replicated", "output_tokens_per_s", 1),
        row("replicated", "ttft_p50", 1),
        row("replicated", "tpot_p50"),
    ]
    assert measured(rows, "chat", "d") == {"single": ArmFigures(100, 0.5, 0.02)}
    assert set(MEASURED) == {"output_tokens_per_s", "ttft_s", "tpot_s"}

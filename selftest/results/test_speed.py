"""The speed probe: what it keeps, when it is steady, and what people are shown.

Oracle: rates whose best, median and range are known; and the probe of this machine, held to its own rule.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.results import archive, report, speed
from disagglab.results.run_folder import Store

STEADY = (380.0, 400.0, 500.0, 510.0, 521.0)
SWINGING = (20.0, 25.0, 300.0, 510.0, 521.0)
PROBE = speed.record({speed.COPY: (9.8, 10.0, 10.26), speed.MATRIX_PRODUCT: SWINGING})
SHOWN = "copy 10.3 GB/s, matrix not steady (20 to 521 GFLOP/s)"


@pytest.mark.parametrize(
    ("rates", "steady"),
    [
        (STEADY, True),
        (SWINGING, False),
        ((75.0, 75.0, 100.0), True),
        ((74.9, 74.9, 100.0), False),
        ((20.0, 90.0, 100.0), True),
    ],
)
def test_it_is_steady_where_half_of_the_repeats_come_near_the_best(
    rates: tuple[float, ...], steady: bool
) -> None:
    """The limit is the median at 75 % of the best; one slow repeat alone changes nothing."""
    assert speed.steady(rates) is steady


def test_a_figure_that_is_not_steady_is_not_kept_as_one() -> None:
    """In its place stands none, with the range beside it; a steady one is the best."""
    assert PROBE == {
        "copy_gb_per_s": 10.26,
        "copy_gb_per_s_range": [9.8, 10.26],
        "matrix_gflop_per_s": None,
        "matrix_gflop_per_s_range": [20.0, 521.0],
    }
    assert speed.text(PROBE) == SHOWN


@pytest.mark.parametrize(
    ("probe", "shown"),
    [
        ({"copy_gb_per_s": 10.25, "matrix_gflop_per_s": 92.4}, "copy 10.2 GB/s, matrix 92 GFLOP/s"),
        ({"copy_gb_per_s": 10.25}, "copy 10.2 GB/s, matrix not recorded"),
        (None, "copy not recorded, matrix not recorded"),
        ({"copy_gb_per_s_range": ["a", 1], "copy_gb_per_s": True}, "copy not recorded, matrix not recorded"),
    ],
)
def test_older_and_broken_records_are_read(probe: Any, shown: str) -> None:
    """A figure without a range is shown as it is; what is no figure is not recorded."""
    assert speed.text(probe) == shown


def test_this_machine_is_probed() -> None:
    """Every quantity has a range of positive rates, and a figure only as its upper end."""
    found = speed.probe()
    assert set(found) == {key for name in speed.UNITS for key in (name, f"{name}_range")}
    for name in speed.UNITS:
        both = found[f"{name}_range"]
        assert isinstance(both, list)
        assert 0 < both[0] <= statistics.mean(both) <= both[1]
        assert found[name] in (None, both[1])


def test_report_and_history_show_no_figure_that_is_not_steady(tmp_path: Path) -> None:
    """The report's head has the range in its place; so has the history's list of runs."""
    swings = speed.record({speed.COPY: (2.0, 2.5, 9.0), speed.MATRIX_PRODUCT: SWINGING})
    store = Store.create(tmp_path, "20261128-120000-abcd")
    store.write_meta(
        command="pytest", lab="embedded", model="M", fingerprint={"key": "k"}, speed={"before": swings}
    )
    (store.folder / "figures.jsonl").write_text("")
    page = report.render(load_lab("embedded"), store, [], [])
    assert "before: copy not steady (2.0 to 9.0 GB/s), matrix not steady (20 to 521 GFLOP/s)." in page
    (run,) = archive.read(tmp_path).runs
    assert run.copy_speed == "not steady (2.0 to 9.0 GB/s)"

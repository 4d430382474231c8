"""frontier.json: what is written is read, damage is refused with its file, and a long session stays small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disagglab.errors import ConfigError
from disagglab.results import frontier_file
from disagglab.results.frontier import Frontier
from disagglab.results.price import Price
from disagglab.results.rated_run import RatedRun, rounded_up
from selftest.results.rated import FOOTPRINTS, PROMISE, rated

RUN = replace(
    rated("disaggregated", energy_j={"a": 1.5, "b": 2.0}),
    ttft_s=(0.123456, 1.0, 2.0),
    tpot_s=(0.05, None, 0.051234),
    gap_s=(0.07, None, 0.071),
    gaps={0.05: 19, 0.0712: 1},
)
MADE = Frontier(
    "w", FOOTPRINTS, (RUN, rated("single", 2.5)), PROMISE, Price(2.5, "gpu", "EUR"), "main",
    ("single at 1/s, round 0: no proof",), {"lab": "embedded"},
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every field, times to 1 us."""
    path = frontier_file.write(MADE, tmp_path)
    assert path.name == "frontier.json"
    assert frontier_file.read(tmp_path) == MADE
    assert [one.name for one in tmp_path.iterdir()] == ["frontier.json"], "no unfinished file is left"


def test_it_says_its_version_and_units(tmp_path: Path) -> None:
    raw = json.loads(frontier_file.write(MADE, tmp_path).read_text())
    assert raw["version"] == frontier_file.VERSION
    assert raw["runs"][0]["ttft_us"] == [123456, 1000000, 2000000]
    assert raw["runs"][0]["gaps_us"] == {"50000": 19, "71200": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2, this suite reads 1"),
        ({"runs": None}, "no runs of a frontier"),
        ({"runs": [{}]}, "no runs of a frontier"),
        ({"footprints": {}}, "no footprint of disaggregated"),
        ({"promise": {"ttft_s": "soon"}}, "promise.ttft_s"),
        ({"price": 3}, "price"),
    ],
)
def test_damage_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = frontier_file.write(MADE, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as refused:
        frontier_file.read(tmp_path)
    assert any(said in f"{one.key} {one.wrong}" and one.file == str(path) for one in refused.value.problems)


def test_lists_of_unequal_lengths_are_refused(tmp_path: Path) -> None:
    frontier_file.write(replace(MADE, runs=(replace(RUN, gap_s=(0.07,)),)), tmp_path)
    with pytest.raises(ConfigError, match="unequal lengths"):
        frontier_file.read(tmp_path)


def test_a_session_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        frontier_file.read(tmp_path)


def test_a_long_session_stays_below_two_megabytes(tmp_path: Path) -> None:
    """Five arms at six rates in three rounds, 300 requests of 100 gaps each, whose lengths spread over two
    decades.
    """
    spread = {rounded_up(0.005 * 100 ** (i / 900)): 33 for i in range(900)}
    times = tuple(0.1 + 0.001357 * i for i in range(300))
    run = replace(RUN, ttft_s=times, tpot_s=times, gap_s=times, gaps=spread)
    runs: list[RatedRun] = [
        replace(run, rate_per_s=rate, round=number, seed=arm)
        for arm in range(5)
        for rate in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
        for number in range(3)
    ]
    assert len(spread) > 500
    assert frontier_file.write(replace(MADE, runs=tuple(runs)), tmp_path).stat().st_size < 2_000_000

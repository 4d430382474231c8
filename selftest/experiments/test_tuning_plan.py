"""The plan of a search: runs and starts, counted by hand, and settings for a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from disagglab.config import inherit
from disagglab.config.labs import parse_lab
from disagglab.config.schema import Lab
from disagglab.config.search_checks import asked
from disagglab.errors import ConfigError
from disagglab.experiments.halving import search
from disagglab.experiments.tuning_plan import RUN_S, START_S, TuningPlan, fitting, plan
from disagglab.paths import LABS
from selftest.experiments.test_halving import SLO, measuring, ordered

RAW = inherit.read(LABS / "embedded.toml").table
SPACE = {"max-num-seqs": list(range(1, 8)), "block-size": [64]}


def lab_with(**tuning: Any) -> Lab:
    """The embedded lab, with a search of three ways."""
    section = {"workload": "chat", "settings": 8, "confirm": 2, "space": SPACE, **tuning}
    return parse_lab({**copy.deepcopy(RAW), "tuning": section}, "lab.toml")


def planned(**tuning: Any) -> TuningPlan:
    lab = lab_with(**tuning)
    return plan(lab, asked(lab))


def test_ways_with_equal_servers_share_starts() -> None:
    """Eight settings, three ways, one start each. Later rungs: at most 3 x 4 and 3 x 2 settings are left,
    and there are no more than 8. A confirmation: three winners, and the lab's own setting.
    """
    found = planned()
    steps = [(step.name, step.runs, step.starts) for step in found.steps]
    assert steps == [("rung 0", 8, 8), ("rung 1", 4, 8), ("rung 2", 2, 6), ("confirm 1 to 2", 4, 8)]
    assert (found.runs, found.starts) == (3 * 18, 30)
    assert found.seconds == 30 * START_S + 54 * RUN_S


def test_a_sharded_way_and_roles_start_by_themselves() -> None:
    """sharded: 8 starts more; disaggregated with options of a role: 7 of its own, beside the lab's own."""
    every = ["single", "replicated", "disaggregated", "sharded"]
    roles = {"prefill": {"max-num-batched-tokens": [1024, 2048]}}
    assert planned(kinds=every).steps[0].starts == 16
    assert planned(disaggregated=roles).steps[0].starts == 15
    assert planned(kinds=every, disaggregated=roles).steps[0].starts == 23


def test_a_search_keeps_to_its_plan() -> None:
    """What a search does is never more, and exactly as many trials of each way."""
    lab = lab_with()
    found = plan(lab, asked(lab))
    done = search(found.settings, measuring(ordered), found.workload, SLO, 1, 2)
    assert [one.trials for one in done.efforts] == [sum(step.runs for step in found.steps[:-1])] * 3
    assert done.starts <= found.starts
    assert len(done.trials) <= found.runs


def test_an_open_loop_takes_the_time_of_its_arrivals() -> None:
    """4 requests at 1 a second, and 5 s around them."""
    found = planned(workload="long-prompts-into-steady-decode")
    assert found.run_s == pytest.approx(9)
    assert planned().run_s == RUN_S


def test_lines_tell_each_setting_once() -> None:
    lines = planned(settings=2, disaggregated={"prefill": {"max-num-seqs": [9]}}).lines()
    assert lines[0] == (
        "search on chat: 8 requests a run, 4 at once; ways: single, replicated, disaggregated"
    )
    assert lines[1] == "  1. the lab's own settings"
    assert lines[2].startswith("  2. block-size 64, max-num-seqs ")
    assert lines[2].endswith("; disaggregated also prefill: max-num-seqs 9")
    assert lines[-1].startswith("at most 18 runs and 9 starts: 10 min, if a start takes 30 s and a run 20 s")


def test_a_time_is_enough_for_so_many_settings() -> None:
    """The largest number whose plan fits; one second less gives fewer."""
    lab = lab_with()
    seconds = {n: plan(lab, asked(lab, "", n)).seconds for n in range(2, 9)}
    assert sorted(seconds.values()) == list(seconds.values())
    for count in (2, 5, 8):
        assert fitting(lab, "", seconds[count]) >= count
    assert fitting(lab, "", seconds[5] - 1) < 5
    assert fitting(lab, "", 1e9) == 8
    with pytest.raises(ConfigError, match="two settings of each way take"):
        fitting(lab, "", seconds[2] - 1)

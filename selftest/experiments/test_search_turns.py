"""Candidates take turns start by start: each start once a rung, the servers that run first, failures kept."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from disagglab.config.setting import Candidate, Setting, options
from disagglab.errors import ConfigError, Problem, StartError
from disagglab.experiments.halving import search
from disagglab.experiments.search_turns import Turns, by_start, ways_of
from disagglab.results.records import Run
from selftest.experiments.made import made_arm, made_run
from selftest.experiments.test_halving import SLO, WORKLOAD, drawn

SETTINGS = {kind: drawn(4) for kind in ("single", "replicated", "sharded")}
CANDIDATES = [Candidate(kind, one) for kind, each in SETTINGS.items() for one in each]
A, B = (Setting(options({"max-num-seqs": number})) for number in (1, 2))


class Played:
    """Plays candidates, as a session would; notes the order. ``broken``: by max-num-seqs, what is raised."""

    def __init__(self, broken: dict[int, Exception] | None = None) -> None:
        self.broken = broken or {}
        self.order: list[Candidate] = []
        self.seeds: list[int] = []

    def play(self, candidate: Candidate) -> Any:
        self.order.append(candidate)
        error = self.broken.get(int(dict(candidate.setting.args).get("max-num-seqs", 0)))
        if error is not None:
            raise error
        return made_arm(candidate.kind)

    def run(self, topology: Any, seed: int) -> Run:
        self.seeds.append(seed)
        return made_run(topology.name, WORKLOAD, 0, 0.5, seed=seed)


def changes(order: list[Candidate]) -> int:
    """How often servers had to be started, one deployment at a time."""
    keys = [(one.kind == "sharded", one.setting) for one in order]
    return 1 + sum(before != after for before, after in pairwise(keys))


def test_each_start_has_one_turn_a_rung() -> None:
    """12 candidates, 8 starts: single and replicated share theirs. The order in which they are given would
    take 12.
    """
    played = Played()
    found = Turns(played.play, played.run)(CANDIDATES, 7, "rung 0")
    assert set(found) == set(CANDIDATES)
    assert sorted(map(CANDIDATES.index, played.order)) == list(range(12))
    assert changes(played.order) == 8
    assert changes(CANDIDATES) == 12
    assert played.seeds == [7] * 12


def test_the_order_is_drawn_and_what_runs_is_first() -> None:
    orders = {
        tuple(group[0].setting.words for group in by_start(CANDIDATES[:4], None, random.Random(seed)))
        for seed in range(20)
    }
    assert len(orders) > 5
    for seed in range(20):
        groups = by_start(CANDIDATES, ("a server a node", B), random.Random(seed))
        assert [one.setting for one in groups[0]] == [B, B]
        assert [one.kind for one in groups[0]] == ["single", "replicated"]


def test_the_last_servers_of_a_rung_play_the_first_of_the_next() -> None:
    played = Played()
    turns = Turns(played.play, played.run)
    for number in range(4):
        turns(CANDIDATES, number, f"confirm {number}")
    assert changes(played.order) == 4 * 8 - 3


@pytest.mark.parametrize(
    "error", [StartError("exit status 1"), ConfigError([Problem("lab.toml", "way[0].kind", "heads", "mend")])]
)
def test_a_failed_start_puts_out_all_that_it_plays(error: Exception) -> None:
    """The servers of setting 2 are tried once for single and replicated, once for sharded."""
    played = Played({2: error})
    found = Turns(played.play, played.run)(CANDIDATES, 1, "rung 0")
    out = {one: value for one, value in found.items() if isinstance(value, str)}
    assert set(out) == {one for one in CANDIDATES if one.setting == B}
    assert all(value.startswith("did not start: ") and str(error) in value for value in out.values())
    assert sum(one.setting == B for one in played.order) == 2


def test_other_errors_end_the_search() -> None:
    """A defect of the suite is no property of a setting."""
    played = Played({1: RuntimeError("defect")})
    with pytest.raises(RuntimeError, match="defect"):
        Turns(played.play, played.run)(CANDIDATES, 1, "rung 0")


def test_a_search_goes_on_without_what_does_not_start() -> None:
    played = Played({1: StartError("out of memory")})
    found = search(SETTINGS, Turns(played.play, played.run), WORKLOAD, SLO, 1, 2)
    found.require_equal_effort()
    assert {one.kind: one.pick for one in found.outcomes} == dict.fromkeys(SETTINGS, Setting())
    assert {trial.candidate.setting for trial in found.trials if trial.seen is None} == {A}


def test_candidates_are_ways_with_a_number() -> None:
    ways = ways_of(SETTINGS)
    assert ways[Candidate("sharded", Setting())].arm == "sharded@try-0"
    assert ways[Candidate("single", B)].arm == "single@try-2"
    assert ways[Candidate("single", B)].args == {"max-num-seqs": 2}
    assert len({one.arm for one in ways.values()}) == len(ways) == 12

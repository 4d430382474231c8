"""What a search asks is measured start by start; what fails is answered with its reason, others go on.

Servers are stand-ins and runs are made; the oracle is the log of their starts and runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from disagglab.config.setting import Candidate, Setting, options
from disagglab.config.workload import Workload
from disagglab.errors import StartError
from disagglab.experiments import searching
from disagglab.results.records import Run
from selftest.experiments.standin import Scene

CLOSED = Workload(name="p", prompt_tokens=8, output_tokens=2, concurrency=4, requests=8)
OPEN = CLOSED.at_rate(2.0)
FEW, SOME, MANY = (Setting(options({"max-num-seqs": count})) for count in (4, 8, 16))
OWN = Setting()
Make = Callable[[int], Scene]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes scenes that hold so many deployments at once."""
    return lambda resident: Scene(monkeypatch, tmp_path, resident)


def of(kind: str, *settings: Setting) -> list[Candidate]:
    """Candidates of a kind."""
    return [Candidate(kind, setting) for setting in settings]


def test_every_candidate_gets_one_run_with_the_seed_of_the_rung(make: Make) -> None:
    """Three kinds of one setting share a start; each run is stored."""
    scene = make(1)
    asked = [one for kind in ("single", "replicated", "disaggregated") for one in of(kind, FEW, SOME)]
    found = searching.measurer(scene.load, CLOSED)(asked, 77, "rung 0")
    assert set(found) == set(asked)
    runs = [run for run in found.values() if isinstance(run, Run)]
    assert {(run.seed, run.workload.name) for run in runs} == {(77, "p")}
    assert all(isinstance(found[one], Run) and found[one].topology.startswith(one.kind) for one in asked)  # type: ignore[union-attr]
    assert len(scene.entries("start")) == 2
    assert len(scene.entries("run")) == 6
    assert len(list((scene.store.folder / "runs").glob("p.02.*.json"))) == 6


def test_a_sharded_way_is_a_start_of_its_own(make: Make) -> None:
    scene = make(1)
    searching.measurer(scene.load, CLOSED)([*of("single", FEW), *of("sharded", FEW)], 1, "rung 0")
    assert sorted(scene.entries("start")) == ["start @sharded-try-0-2", "start @single-try-0-1"]


def test_a_setting_keeps_its_name_from_rung_to_rung(make: Make) -> None:
    """try-N counts settings, whatever the kind; a start is told from an earlier one by its own number."""
    scene = make(1)
    measured = searching.measurer(scene.load, CLOSED)
    first = measured([*of("single", FEW, SOME), *of("replicated", FEW, SOME)], 1, "rung 0")
    second = measured(of("replicated", SOME), 2, "rung 1")
    names = {one: run.topology for one, run in first.items() if isinstance(run, Run)}
    assert names[Candidate("single", SOME)] == "single@try-1"
    assert names[Candidate("replicated", SOME)] == "replicated@try-1"
    (run,) = second.values()
    assert isinstance(run, Run)
    assert run.topology == "replicated@try-1"


def test_an_open_loop_is_warmed_up_as_a_closed_one(make: Make) -> None:
    """Half of its requests at once, and then measured as it is."""
    scene = make(1)
    (run,) = searching.measurer(scene.load, OPEN)(of("single", FEW), 1, "rung 0").values()
    assert scene.entries("warm") == ["warm single@try-0 4"]
    assert isinstance(run, Run)
    assert run.workload == OPEN


def test_a_start_that_fails_is_a_reason_and_others_go_on(make: Make) -> None:
    """All kinds of the setting have it, in one line; nothing of it runs; the others are measured."""
    scene = make(1)
    scene.fails = {"try-1-"}
    asked = [one for kind in ("single", "replicated") for one in of(kind, FEW, SOME, MANY)]
    found = searching.measurer(scene.load, CLOSED)(asked, 1, "rung 0")
    failed = [one for one, answer in found.items() if isinstance(answer, str)]
    assert sorted(failed, key=lambda one: one.kind) == [*of("replicated", SOME), *of("single", SOME)]
    assert {found[one] for one in failed} == {"likely cause: memory"}
    assert set(found) == set(asked)
    assert len(scene.entries("run")) == 4
    assert not any("try-1-" in tag for tag in scene.tags)


def test_where_the_log_tells_no_cause_the_first_line_is_the_reason(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(1)

    def fails(*_: object, **__: object) -> None:
        raise StartError("cannot be executed\nsecond line")

    monkeypatch.setattr(scene.fleet, "topology", fails)
    found = searching.measurer(scene.load, CLOSED)(of("single", FEW), 1, "rung 0")
    assert list(found.values()) == ["cannot be executed"]


def test_what_cannot_be_split_is_told_by_what_is_wrong(make: Make) -> None:
    """Not by the number of problems; other ways of the rung are measured."""
    scene = make(1)
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "num_hidden_layers": 30}
    scene.fleet.model = dataclasses.replace(scene.fleet.model, config=config)
    found = searching.measurer(scene.load, CLOSED)([*of("sharded", FEW), *of("single", FEW)], 1, "rung 0")
    wrong = "9 attention heads of models/llama-pair cannot be divided among 2 ranks"
    assert str(found[Candidate("sharded", FEW)]).endswith(wrong.partition("of ")[2].partition("/")[2])
    assert str(found[Candidate("sharded", FEW)]).startswith("9 attention heads of ")
    assert isinstance(found[Candidate("single", FEW)], Run)


def test_servers_that_die_of_their_warm_up_are_a_reason(make: Make) -> None:
    scene = make(1)
    scene.kills = {"warm single@try-0"}
    found = searching.measurer(scene.load, CLOSED)(of("single", FEW, SOME), 1, "rung 0")
    assert found[Candidate("single", FEW)] == "likely cause: memory"
    assert isinstance(found[Candidate("single", SOME)], Run)


def test_a_run_of_which_servers_die_costs_the_others_of_its_start_nothing(make: Make) -> None:
    """single kills the servers that all three kinds share: its run is invalid; they are started again, and
    the two others are measured on living ones.
    """
    scene = make(1)
    scene.kills = {"run single@try-0"}
    asked = [Candidate(kind, FEW) for kind in ("single", "replicated", "disaggregated")]
    found = searching.measurer(scene.load, CLOSED)(asked, 1, "rung 0")
    runs = {one.kind: answer.invalid for one, answer in found.items() if isinstance(answer, Run)}
    assert runs == {"single": "a server died", "replicated": None, "disaggregated": None}
    assert scene.entries("start", "stop", "run") == [
        "start @single-try-0-1",
        "run single@try-0 p 1 1",
        "stop @single-try-0-1",
        "start @replicated-try-0-2",
        "run replicated@try-0 p 1 1",
        "run disaggregated@try-0 p 1 1",
    ]


def test_all_may_die_one_after_another(make: Make) -> None:
    """Each is answered; no run is made on dead servers, and nothing is asked without end."""
    scene = make(1)
    scene.kills = {"run "}
    asked = [Candidate(kind, FEW) for kind in ("single", "replicated", "disaggregated")]
    found = searching.measurer(scene.load, CLOSED)(asked, 1, "rung 0")
    assert [answer.invalid for answer in found.values() if isinstance(answer, Run)] == ["a server died"] * 3
    assert len(scene.entries("start")) == len(scene.entries("run")) == 3


def test_an_invalid_run_on_living_servers_starts_nothing_again(make: Make) -> None:
    """Negative control of the two above."""
    scene = make(1)
    scene.wrong = {"run single"}
    asked = [Candidate(kind, FEW) for kind in ("single", "replicated")]
    found = searching.measurer(scene.load, CLOSED)(asked, 1, "rung 0")
    assert [answer.invalid for answer in found.values() if isinstance(answer, Run)] == [
        "the client was late",
        None,
    ]
    assert len(scene.entries("start")) == 1


def order_of(scene: Scene, seed: int, count: int = 8) -> list[str]:
    """The settings of a rung by the order of their starts, each on servers that did not run before."""
    scene.fleet.stop()
    scene.log.clear()
    settings = [Setting(options({"max-num-seqs": 1 + number})) for number in range(count)]
    searching.measurer(scene.load, CLOSED)(of("replicated", *settings), seed, "rung")
    return [entry.split()[1].removeprefix("replicated@try-") for entry in scene.entries("run")]


def test_the_order_of_starts_is_drawn_by_lot(make: Make) -> None:
    """By the rung's seed: the same again for the same, others for others, and no place of the draw is always
    late.
    """
    scene = make(1)
    orders = [order_of(scene, seed) for seed in range(12)]
    assert order_of(scene, 5) == orders[5]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 12
    assert len({order[-1] for order in orders}) > 3


def test_servers_that_run_are_measured_first(make: Make) -> None:
    """One start less: what the last rung measured last is this rung's first."""
    scene = make(1)
    measured = searching.measurer(scene.load, CLOSED)
    for seed in range(6):
        scene.log.clear()
        measured(of("replicated", FEW, SOME, MANY, OWN), seed, "rung")
        assert scene.log[0].startswith("start" if seed == 0 else "run")
        assert len(scene.entries("start")) == (4 if seed == 0 else 3)

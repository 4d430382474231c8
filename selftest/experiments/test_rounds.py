"""The mirrored-round loop: order, seeds, what is asked for when, and that runs are on disk one by one.

Oracle: the turns of two rounds, written down by hand.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.workload import Workload
from disagglab.experiments import rounds
from disagglab.experiments.rounds import WARM_UP_ROUND, Trial, mirrored, trials
from disagglab.results.records import Run
from disagglab.results.run_folder import Store

WORKLOADS = [
    Workload(name=name, prompt_tokens=8, output_tokens=2, concurrency=1, requests=1) for name in ("p", "q")
]


def test_every_other_round_is_mirrored() -> None:
    assert [tuple(mirrored(("a", "b", "c"), number)) for number in range(3)] == [
        ("a", "b", "c"),
        ("c", "b", "a"),
        ("a", "b", "c"),
    ]


def test_turns_of_two_rounds() -> None:
    """Subject by subject; the arms of a subject share a seed, and no two rounds or subjects do."""
    made = list(trials("ab", lambda _: "xy", 2, lambda number, position: 10 * number + position))
    assert [(turn.number, turn.subject, turn.arm, turn.seed) for turn in made] == [
        (0, "x", "a", 0), (0, "x", "b", 0), (0, "y", "a", 1), (0, "y", "b", 1),
        (1, "x", "b", 10), (1, "x", "a", 10), (1, "y", "b", 11), (1, "y", "a", 11),
    ]  # fmt: skip


def test_subjects_of_a_round_are_asked_for_when_it_begins() -> None:
    """What earlier rounds gave decides which subjects go on, up to the cap and never beyond."""
    seen: list[int] = []

    def subjects(number: int) -> list[str]:
        return ["x"] if number < 2 or len(seen) < 7 else []

    for turn in trials("ab", subjects, 2, lambda *_: 0, cap=9):
        seen.append(turn.number)
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [turn.number for turn in trials("a", lambda _: "x", 2, lambda *_: 0, cap=3)] == [0, 1, 2]
    assert [turn.number for turn in trials("a", lambda _: "x", 3, lambda *_: 0, cap=2)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("number", "planned", "line"),
    [
        (0, 3, "round 1 of 3, chat, a"),
        (4, 3, "round 5 of 5, chat, a"),
        (WARM_UP_ROUND, 3, "warm-up, chat, a"),
    ],
)
def test_progress_says_which_turn_it_is(number: int, planned: int, line: str) -> None:
    turn = Trial(number, planned, "a", "chat", 1)
    assert turn.said("chat", "a") == line
    assert turn.said("", "a") == line.replace("chat, ", "")


def test_a_run_is_stored_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A session that is killed has all runs but the one under way; progress names each beforehand."""
    store = Store.create(tmp_path, "run")
    stored: list[int] = []
    shown: list[str] = []

    def measure(engine: Any, topology: Any, workload: Workload, seed: int, number: int, shape: Any) -> Run:
        stored.append(len(list((store.folder / "runs").glob("*.json"))))
        return Run(topology.name, workload, seed, number, "", 1.0, None, (), (), (), (), ())

    monkeypatch.setattr(rounds, "measure", measure)
    none: Any = None
    arms: list[Any] = [SimpleNamespace(name=name) for name in "ab"]
    over = trials(arms, lambda _: WORKLOADS, 2, lambda number, position: 2 * number + position)
    made = list(rounds.runs(none, over, none, store, shown.append, lambda one: one.name.upper()))
    assert stored == list(range(8))
    assert [(run.round, run.workload.name, run.topology, run.seed) for run in made[3:5]] == [
        (0, "q", "b", 1),
        (1, "p", "b", 2),
    ]
    assert shown[3:5] == ["round 1 of 2, Q, b", "round 2 of 2, P, b"]

"""Ways that take turns on the same nodes: order, seeds, starts and warm-ups.

Servers are stand-ins; the oracle is the log of two rounds, written down by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from disagglab.config.workload import Workload
from disagglab.errors import StartError
from disagglab.experiments import rounds
from disagglab.experiments.turns import Contender, Turn, by_start, in_turns
from disagglab.serving.death import Died
from selftest.experiments.standin import WAYS, Scene

P, Q = (
    Workload(name=name, prompt_tokens=8, output_tokens=2, concurrency=2, requests=4) for name in ("p", "q")
)
SMALL = Contender.of(WAYS["replicated@chunk-128"])
SPLIT = Contender.of(WAYS["disaggregated@chunk-128"])  # on the servers of SMALL
SHARDED = Contender.of(WAYS["sharded"])
OWN = Contender.of("replicated")
Make = Callable[[int], Scene]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes scenes that hold so many deployments at once."""
    return lambda resident: Scene(monkeypatch, tmp_path, resident)


def seed(number: int, position: int) -> int:
    """Of round and workload: both can be told from it."""
    return 100 * number + position


def play(scene: Scene, contenders: list[Contender], workloads: list[Workload], count: int) -> list[Turn]:
    """All turns, measured."""
    turns = []

    def noted() -> object:
        for turn in in_turns(scene.load, contenders, workloads, count, seed, workloads):
            turns.append(turn)
            yield turn

    none: object = None
    list(rounds.runs(none, noted(), scene.load.shape, scene.store, scene.shown.append))  # type: ignore[arg-type]
    return turns


def test_a_contender_is_called_as_its_arm() -> None:
    """Of a way and of a kind; its twin has another name, the same kind, and servers of its own."""
    assert (SMALL.arm, SMALL.kind, SMALL.again) == ("replicated@chunk-128", "replicated", False)
    assert (OWN.arm, OWN.kind) == ("replicated", "replicated")
    assert (SMALL.twin.arm, SMALL.twin.kind, SMALL.twin.again) == (
        "replicated@chunk-128-again",
        "replicated",
        True,
    )
    assert OWN.twin == Contender("replicated-again", "replicated", again=True)


def test_contenders_of_one_start_are_a_group(make: Make) -> None:
    """In the order of their first; a twin is a group of its own."""
    scene = make(2)
    asked = [SMALL, SHARDED, OWN, SPLIT, SMALL.twin, Contender.of("single")]
    groups = by_start(scene.fleet, asked)
    assert [[one.arm for one in group] for group in groups] == [
        ["replicated@chunk-128", "disaggregated@chunk-128"],
        ["sharded"],
        ["replicated", "single"],
        ["replicated@chunk-128-again"],
    ]


def test_servers_that_run_have_the_first_turn(make: Make) -> None:
    scene = make(1)
    scene.fleet.topology(WAYS["sharded"])
    assert [group[0] for group in by_start(scene.fleet, [SMALL, OWN, SHARDED])] == [SHARDED, SMALL, OWN]


def test_two_rounds_of_two_starts(make: Make) -> None:
    """One start at a time: A p q, B p q, then mirrored B q p, A q p. B is not started again between."""
    scene = make(1)
    play(scene, [SMALL, SPLIT, SHARDED], [P, Q], 2)
    small, split = "replicated@chunk-128", "disaggregated@chunk-128"
    assert scene.entries("start", "stop", "run") == [
        "start @replicated-chunk-128-1",
        f"run {small} p 0 0", f"run {split} p 0 0", f"run {small} q 0 1", f"run {split} q 0 1",
        "stop @replicated-chunk-128-1", "start @sharded-2",
        "run sharded p 0 0", "run sharded q 0 1",
        "run sharded q 1 101", "run sharded p 1 100",
        "stop @sharded-2", "start @replicated-chunk-128-3",
        f"run {split} q 1 101", f"run {small} q 1 101", f"run {split} p 1 100", f"run {small} p 1 100",
    ]  # fmt: skip


def test_a_third_round_is_in_the_order_of_the_first(make: Make) -> None:
    scene = make(3)
    turns = play(scene, [SMALL, OWN, SHARDED], [P, Q], 3)
    orders = [[(one.arm.name, one.subject.name) for one in turns if one.number == n] for n in range(3)]
    assert orders[0] == orders[2] == orders[1][::-1]
    assert [one.planned for one in turns] == [3] * len(turns)


def test_all_ways_get_the_same_prompts(make: Make) -> None:
    """A seed for each workload of each round, whatever the place of a way in it; no two share one."""
    scene = make(1)
    turns = play(scene, [SMALL, SHARDED, OWN, OWN.twin], [P, Q], 3)
    seeds: dict[tuple[int, str], set[int]] = {}
    arms: dict[tuple[int, str], list[str]] = {}
    for one in turns:
        seeds.setdefault((one.number, one.subject.name), set()).add(one.seed)
        arms.setdefault((one.number, one.subject.name), []).append(one.arm.name)
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == 3 * 2
    assert all(sorted(found) == sorted(arms[0, "p"]) for found in arms.values())
    assert len(arms[0, "p"]) == 4


def test_servers_are_warmed_up_once_a_start(make: Make) -> None:
    """sharded is last in round 1 and first in round 2, on the same servers: one warm-up, of as many requests
    as the workloads have at once, before its first run.
    """
    scene = make(1)
    play(scene, [SMALL, SHARDED], [P, Q], 2)
    assert [entry for entry in scene.entries("start", "warm") if "sharded" in entry] == [
        "start @sharded-2",
        "warm sharded 2",
    ]
    before_first_run = scene.log.index("run sharded p 0 0") - 1
    assert scene.log[before_first_run] == "warm sharded 2"
    assert len(scene.entries("warm")) == len(scene.entries("start")) == 3


def test_where_all_run_beside_each_other_each_is_warmed_up_once(make: Make) -> None:
    scene = make(3)
    play(scene, [SMALL, SHARDED, OWN], [P], 4)
    assert len(scene.entries("warm")) == len(scene.entries("start")) == 3


def test_a_twin_is_warmed_up_as_its_way_was(make: Make) -> None:
    """It is another start of the same commands."""
    scene = make(1)
    play(scene, [OWN, OWN.twin], [P], 1)
    assert scene.entries("start", "warm") == [
        "start @own-1", "warm replicated 2", "start @own-2", "warm replicated-again 2"
    ]  # fmt: skip


def test_a_fuller_workload_and_a_new_router_are_warmed_up_for(make: Make) -> None:
    """On servers that run: three times as many requests at once; then less again, which needs nothing; then
    a way whose router nobody has used.
    """
    scene = make(1)
    fuller = P.model_copy(update={"concurrency": 6, "requests": 12})
    for contenders, workload in (([SMALL], P), ([SMALL], fuller), ([SMALL], P), ([SPLIT], P)):
        scene.load.ready(contenders, [workload])
    assert scene.entries("start", "warm") == [
        "start @replicated-chunk-128-1",
        "warm replicated@chunk-128 2",
        "warm replicated@chunk-128 6",
        "warm disaggregated@chunk-128 2",
    ]


def test_ways_of_one_start_are_warmed_up_together(make: Make) -> None:
    """Equal servers get the whole load first; the router of the other way meets them with two requests."""
    scene = make(1)
    fuller = P.model_copy(update={"concurrency": 6, "requests": 12})
    scene.load.ready([SPLIT, SMALL], [fuller])
    assert scene.entries("warm") == ["warm replicated@chunk-128 6", "warm disaggregated@chunk-128 2"]


def test_commands_of_every_start_are_kept(make: Make) -> None:
    """Of a second start under a name of its own."""
    scene = make(1)
    play(scene, [SHARDED, SHARDED.twin], [P], 1)
    assert scene.store.commands == {
        "router sharded": "route sharded@sharded-1",
        "server vllm-a@sharded-1": "serve a@sharded-1",
        "router sharded-again": "route sharded@sharded-2",
        "server vllm-a@sharded-2": "serve a@sharded-2",
    }


def test_a_start_that_fails_is_an_error_of_the_turns(make: Make) -> None:
    """What was measured before is on disk."""
    scene = make(1)
    scene.fails = {"@sharded"}
    with pytest.raises(StartError, match="@sharded-2 does not come up"):
        play(scene, [SMALL, SHARDED], [P], 1)
    assert len(list((scene.store.folder / "runs").glob("p.00.*.json"))) == 1


def test_a_server_that_dies_of_its_warm_up_is_not_taken_for_warm(make: Make) -> None:
    """Asked for again it is started again, and warmed up again."""
    scene = make(1)
    scene.kills = {"warm sharded"}
    with pytest.raises(Died):
        scene.load.ready([SHARDED], [P])
    scene.kills = set()
    scene.load.ready([SHARDED], [P])
    assert scene.log == [
        "start @sharded-1", "warm sharded 2", "stop @sharded-1", "start @sharded-2", "warm sharded 2"
    ]  # fmt: skip

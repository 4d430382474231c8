"""tuned.toml: a lab file that extends the lab, with one way a kind, and gates best against best."""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from disagglab.config import inherit, toml, way
from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.schema import GateSection
from disagglab.config.setting import Candidate, Setting, options
from disagglab.experiments.halving import search
from disagglab.results import tuned_lab
from disagglab.results.search_record import Search
from selftest.experiments.test_halving import SLO, WORKLOAD, measuring

LAB = load_lab("embedded-ways")
COMMAND = "disagglab tune --lab embedded-ways"
CHUNK = Setting(options({"max-num-batched-tokens": 128, "async-scheduling": False}))
ROLES = Setting(
    CHUNK.args,
    prefill_args=options({"max-num-batched-tokens": 2048}),
    prefill_nodes=("b",),
    decode_nodes=("a",),
)
SETTINGS = {
    "single": (Setting(), CHUNK),
    "replicated": (Setting(), CHUNK),
    "disaggregated": (Setting(), ROLES),
    "sharded": (Setting(), CHUNK),
}


def made(own_wins: tuple[str, ...] = ("single", "sharded")) -> Search:
    """A search in which the drawn setting wins, but of these kinds."""

    def speed(candidate: Candidate, _seed: int) -> float:
        return 0.5 if candidate.setting.own == (candidate.kind in own_wins) else 0.7

    return search(SETTINGS, measuring(speed), WORKLOAD, SLO, 1, 2)


def made_of(*kinds: str) -> Search:
    """A search of these kinds alone, in which the drawn setting wins."""
    settings = {kind: SETTINGS[kind] for kind in kinds}
    return search(
        settings, measuring(lambda one, _seed: 0.9 - 0.4 * (not one.setting.own)), WORKLOAD, SLO, 1, 2
    )


def written(folder: Path, found: Search) -> tuple[Path, dict[str, Any]]:
    """The file and what one file alone would say."""
    path = tuned_lab.write(folder, LAB, found, COMMAND, date(2026, 11, 28))
    return path, inherit.read(path).table


def test_every_kind_has_its_way(tmp_path: Path) -> None:
    """single has none, as the lab's own setting was picked; a sharded way is none of the lab's own arms."""
    path, table = written(tmp_path, made())
    lab = parse_lab({**table, "gate": []}, str(path))
    assert [one.arm for one in lab.ways] == ["replicated@tuned", "disaggregated@tuned", "sharded@tuned"]
    assert [one.args for one in lab.ways] == [dict(CHUNK.args), dict(CHUNK.args), {}]
    assert lab.name == "embedded-ways-tuned"
    assert lab.nodes == LAB.nodes
    served = way.changed(lab, lab.ways[1])
    assert {node.name: (node.role, node.args) for node in served.nodes} == {
        "a": ("decode", {}),
        "b": ("prefill", {"max-num-batched-tokens": 2048}),
    }
    assert "against the lab's own setting: 12 of 12 good requests" in lab.ways[0].expects
    assert lab.ways[2].expects == "not known: the lab's own setting won the search"


def test_gates_are_best_against_best(tmp_path: Path) -> None:
    """The candidate is the tuned disaggregated way; a limit stays a limit. Gates that differed in the
    baseline alone are one.
    """
    _path, table = written(tmp_path, made())
    assert len(table["gate"]) == len(LAB.gates)
    assert {gate["candidate"] for gate in table["gate"]} == {"disaggregated@tuned"}
    assert [gate.get("baseline") for gate in table["gate"]] == ["best"] * 4 + [None]
    assert table["gate"][4]["limit"] == 0.05
    assert [gate["enforce"] for gate in table["gate"]] == [False] * 5
    twice = LAB.model_copy(
        update={"gates": (*LAB.gates, LAB.gates[0].model_copy(update={"baseline": "single"}))}
    )
    path = tuned_lab.write(tmp_path, twice, made(), COMMAND, date(2026, 11, 28))
    assert len(tomllib.loads(path.read_text())["gate"]) == len(LAB.gates)


def test_gates_of_an_own_setting_name_its_arm(tmp_path: Path) -> None:
    found = made(("disaggregated",))
    _path, table = written(tmp_path, found)
    assert {gate["candidate"] for gate in table["gate"]} == {"disaggregated"}
    assert tuned_lab.arm_of("disaggregated", found) == "disaggregated"
    assert tuned_lab.arm_of("replicated", found) == "replicated@tuned"
    with pytest.raises(KeyError):
        tuned_lab.arm_of("double", found)


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    """Command, day, run and both gains, as comments; no path of this machine, but one from the folder."""
    folder = tmp_path / "20261128-170000-abcd"
    folder.mkdir()
    path, _table = written(folder, made())
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0] == f"# Made by: {COMMAND}, 2026-11-28"
    assert head[1] == "# Run: 20261128-170000-abcd"
    assert "found: " in head[3]
    assert "confirmed: " in head[3]
    assert len(head) == 2 + len(SETTINGS)
    assert not Path(tomllib.loads(path.read_text())["extends"]).is_absolute()


def test_a_file_a_way(tmp_path: Path) -> None:
    """Each with that one way, and the lab's gates between arms that are there."""
    tuned_lab.write(tmp_path, LAB, made(), COMMAND, date(2026, 11, 28))
    files = sorted(path.name for path in (tmp_path / "tuned").iterdir())
    assert files == ["disaggregated.toml", "replicated.toml", "sharded.toml"]
    for path in (tmp_path / "tuned").iterdir():
        lab = load_lab(str(path))
        assert [one.arm for one in lab.ways] == [f"{path.stem}@tuned"]
        assert lab.gates == LAB.gates
        assert tmp_path.name in path.read_text()


def test_the_file_loads_and_is_read_back(tmp_path: Path) -> None:
    """As any lab; written as one file by itself it is the same lab."""
    path, table = written(tmp_path, made())
    lab = load_lab(str(path))
    assert [(gate.candidate, gate.baseline) for gate in lab.gates] == [
        *[("disaggregated@tuned", "best")] * 4,
        ("disaggregated@tuned", None),
    ]
    again = parse_lab(tomllib.loads(toml.dumps(table)), str(path))
    assert again.model_copy(update={"origins": {}}) == lab.model_copy(update={"origins": {}})


def test_gates_keep_the_kind_of_their_candidate(tmp_path: Path) -> None:
    """Of a kind without a tuned way it is the lab's own arm; a gate on a way of the lab's that is not in the
    file, and was not tuned, is left out.
    """
    first = LAB.gates[0].model_dump()
    rows = [
        {**first, "candidate": "sharded", "baseline": "replicated"},
        {**first, "candidate": "replicated@chunk-128", "baseline": "single"},
        {**first, "candidate": "single", "baseline": "replicated"},
    ]
    lab = LAB.model_copy(update={"gates": tuple(GateSection.model_validate(row) for row in rows)})
    for found, expected in (
        (made(), ["sharded@tuned", "replicated@tuned", "single"]),
        (made_of("single"), ["replicated", "single@tuned"]),
    ):
        path = tuned_lab.write(tmp_path, lab, found, COMMAND, date(2026, 11, 28))
        gates = load_lab(str(path)).gates
        assert [gate.candidate for gate in gates] == expected
        assert {gate.baseline for gate in gates} == {"best"}
    alone = load_lab(str(tmp_path / "tuned" / "single.toml"))
    assert [gate.candidate for gate in alone.gates] == ["single"]

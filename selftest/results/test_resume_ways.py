"""A session with ways goes on where one with the same ways ended; another way of the same name is refused.

Oracle: the runs that were stored, by arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from disagglab.config import arms
from disagglab.config.labs import load_lab, resolved_text
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, Problem
from disagglab.results import fingerprint, resume
from disagglab.results.run_folder import Store
from selftest.experiments.made import made_run

LAB = load_lab("embedded-ways")
TEXT = resolved_text(LAB)
NAMES = list(dict.fromkeys(gate.workload for gate in LAB.gates))
REPLICAS, SPLIT = "replicated@chunk-128", "disaggregated@chunk-128"  # two kinds of one name
MACHINE = {"machine": "x86_64", "versions": {"torch": "2.13.0"}, "key": "aaaa"}
PRINT = fingerprint.of_lab(MACHINE, {"node a (prefill)": {"name": "n"}})
OWN = (arms.SINGLE, arms.REPLICATED, arms.DISAGGREGATED, arms.SINGLE_AGAIN)
COMMIT = "0123456789ab"


def session(reports: Path, ways: Sequence[str], rounds: int = 2, text: str = TEXT) -> Path:
    """The folder of a session that measured these ways beside the lab's own settings."""
    store = Store.create(reports, "20260101-000000-aaaa")
    about = {"run": store.folder.name, "lab_file": text, "vllm": LAB.vllm.version, "commit": COMMIT}
    store.write_meta(**about, fingerprint=PRINT, ways=list(ways), arms=[*OWN, *ways])
    for number in range(rounds):
        for name in NAMES:
            for arm in (*OWN, *ways):
                store.add_run(made_run(arm, LAB.workload(name), number, seed=100 + number))
    return store.folder


def read(folder: Path, ways: Sequence[str], lab: Lab = LAB) -> resume.Earlier:
    """What a session that measures these ways takes from it."""
    return resume.read([folder], lab, ways, MACHINE, COMMIT, [*OWN, *ways])


def refusal(folder: Path, ways: Sequence[str], lab: Lab = LAB) -> Problem:
    """The one problem for which it is not taken."""
    with pytest.raises(ConfigError) as caught:
        read(folder, ways, lab)
    (problem,) = caught.value.problems
    return problem


def changed(arm: str, **update: object) -> Lab:
    """The lab with one of its ways changed."""
    ways = [one.model_copy(update=update) if one.arm == arm else one for one in LAB.ways]
    assert ways != [*LAB.ways]
    return LAB.model_copy(update={"ways": tuple(ways)})


def test_ways_go_on(tmp_path: Path) -> None:
    """Two kinds of one name are two arms, and each has its own runs."""
    earlier = read(session(tmp_path, [REPLICAS, SPLIT]), [REPLICAS, SPLIT])
    wanted = [*OWN, REPLICAS, SPLIT]
    taken, notes = resume.complete(earlier, lambda _: wanted)
    assert notes == []
    for arm in wanted:
        assert len([one for one in taken if one.run.topology == arm]) == 2 * len(NAMES)


@pytest.mark.parametrize(("there", "here"), [(REPLICAS, SPLIT), (SPLIT, REPLICAS)])
def test_one_kind_is_not_taken_for_the_other(tmp_path: Path, there: str, here: str) -> None:
    """The session measured the other kind of that name: its rounds lack an arm, and are left out."""
    earlier = read(session(tmp_path, [there]), [here])
    taken, notes = resume.complete(earlier, lambda _: [*OWN, here])
    assert taken == []
    assert len(notes) == len(NAMES)
    assert all(note.endswith(f"left out, no run of {here}") for note in notes)


@pytest.mark.parametrize("arm", [REPLICAS, SPLIT])
def test_a_way_that_was_changed_since_is_refused(tmp_path: Path, arm: str) -> None:
    """With its arm, its key and both values; the other kind of the same name is as it was."""
    other = changed(arm, args={"max-num-batched-tokens": 256})
    problem = refusal(session(tmp_path, [REPLICAS, SPLIT]), [REPLICAS, SPLIT], other)
    assert problem.key == f"lab_file: way {arm}.args.max-num-batched-tokens"
    assert problem.wrong.startswith("128 there, 256 in ")


def test_options_of_a_role_are_part_of_a_way(tmp_path: Path) -> None:
    arm = "disaggregated@by-role"
    (role,) = (one.decode for one in LAB.ways if one.arm == arm)
    other = changed(arm, decode=role.model_copy(update={"args": {"max-num-seqs": 16}}))
    problem = refusal(session(tmp_path, [arm]), [arm], other)
    assert problem.key == f"lab_file: way {arm}.decode.args.max-num-seqs"
    assert problem.wrong.startswith("8 there, 16 in ")


def test_nodes_of_a_role_are_part_of_a_way(tmp_path: Path) -> None:
    arm = "disaggregated@turned"
    (one,) = (one for one in LAB.ways if one.arm == arm)
    other = changed(arm, prefill=one.decode, decode=one.prefill)
    with pytest.raises(
        ConfigError, match=r"way disaggregated@turned\.prefill\.nodes: \['b'\] there, \['a'\]"
    ):
        read(session(tmp_path, [arm]), [arm], other)


def test_a_way_that_this_session_does_not_measure_may_have_been_changed(tmp_path: Path) -> None:
    """Its runs are not taken."""
    folder = session(tmp_path, [REPLICAS, SPLIT])
    earlier = read(folder, [SPLIT], changed(REPLICAS, args={"max-num-batched-tokens": 256}))
    taken, _ = resume.complete(earlier, lambda _: [*OWN, SPLIT])
    assert REPLICAS not in {one.run.topology for one in taken}
    assert len(taken) == 2 * len(NAMES) * len([*OWN, SPLIT])


def test_words_of_a_way_may_differ(tmp_path: Path) -> None:
    """What is expected of it is no part of what was measured."""
    other = changed(REPLICAS, what="other words", expects="something else")
    assert read(session(tmp_path, [REPLICAS]), [REPLICAS], other).runs


def test_ways_that_nobody_measured_may_come_and_go(tmp_path: Path) -> None:
    """A lab file to which a way was added since, or from which one was taken."""
    fewer = LAB.model_copy(update={"ways": tuple(one for one in LAB.ways if one.arm == "sharded")})
    assert read(session(tmp_path, ["sharded"]), ["sharded"], fewer).runs


def test_a_way_without_a_name_goes_on(tmp_path: Path) -> None:
    """Its arm is its kind; runs of its twin are not asked for, and not taken."""
    folder = session(tmp_path, ["sharded"])
    store = Store(folder)
    for name in NAMES:
        store.add_run(made_run("sharded-again", LAB.workload(name), 0, seed=100))
    taken, notes = resume.complete(read(folder, ["sharded"]), lambda _: [*OWN, "sharded"])
    assert {one.run.topology for one in taken} == {*OWN, "sharded"}
    assert notes == []

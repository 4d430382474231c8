"""A comparison that goes on where an earlier session ended: what is read back, numbered, refused.

Oracle: the runs that were stored, and the figures and verdicts made from them before they went to disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disagglab.config import arms
from disagglab.config.arrivals import arrivals
from disagglab.config.labs import load_lab, resolved_text
from disagglab.config.workload import Workload
from disagglab.errors import ConfigError
from disagglab.experiments import rounds
from disagglab.experiments.comparison import (
    Comparison,
    figure_rows,
    run_rounds,
)
from disagglab.experiments.rounds import WARM_UP_ROUND
from disagglab.experiments.verdicts import verdict_rows
from disagglab.experiments.warming import warm_up_of
from disagglab.paths import ROOT
from disagglab.results import fingerprint, resume
from disagglab.results.records import ClientLoad, Ledger, Reading, Run, Snapshot
from disagglab.results.run_folder import Store
from disagglab.serving.topology import DISAGGREGATED, SINGLE_AGAIN, TOPOLOGIES
from selftest.experiments.made import made_arm

LAB = load_lab("embedded")
NAMES = list(dict.fromkeys(gate.workload for gate in LAB.gates))
ARMS = (*TOPOLOGIES, SINGLE_AGAIN)
MACHINE = {"machine": "x86_64", "versions": {"torch": "2.13.0"}, "key": "aaaa"}
H100, H200 = (
    {"node a (prefill)": {"GPU 0 of the node, name": f"NVIDIA {name}"}} for name in ("H100", "H200")
)
PRINT = fingerprint.of_lab(MACHINE, H100)
COMMIT = "0123456789ab"
LIMIT_S = 90
BASE_S = {name: 1.0 + place / 3 for place, name in enumerate(ARMS)}


def run(topology: str, workload: Workload, number: int, seed: int = 7) -> Run:
    """A run with a value in every field, none of which is a round number."""
    requests = arrivals(workload, seed)
    seconds = tuple(BASE_S[topology] * (1 + 0.01 * number) + 0.1 / (3 + i) for i in range(len(requests)))
    split = topology == DISAGGREGATED
    book = Ledger(
        {"a": 3}, {"a": 30}, {"b": 9}, 4096 if split else 0, len(requests) if split else 0,
        0.3, 0, 0, 1, 2, 3, 4,
    )  # fmt: skip
    return Run(
        topology, workload, seed, number, "vllm bench serve", 10.0 / 3, ClientLoad(0.1, 0.002, 0.003),
        ttft_s=seconds,
        e2e_s=tuple(2 * each for each in seconds),
        itl_s=tuple((each / 7,) * 60 for each in seconds),
        prompt_tokens=tuple(one.prompt_tokens for one in requests),
        output_tokens=tuple(one.output_tokens for one in requests),
        start_s=tuple(one.arrival_s for one in requests),
        streams=tuple(one.stream for one in requests),
        ledger=book,
    )  # fmt: skip


def seed_of(session: str, number: int) -> int:
    """Another seed for every round of every session."""
    return int(session[:8]) * 10 + number


def session(reports: Path, name: str, rounds: int, arms: Sequence[str] = ARMS, **meta: Any) -> Path:
    """The folder of a session that was cut off: run.json as it is written first, and runs."""
    store = Store.create(reports, name)
    about = {"run": name, "lab_file": Path(LAB.file).read_text(), "vllm": LAB.vllm.version, "commit": COMMIT}
    store.write_meta(**{**about, "fingerprint": PRINT, **meta})
    for number in range(rounds):
        for workload in NAMES:
            for arm in arms:
                store.add_run(run(arm, LAB.workload(workload), number, seed=seed_of(name, number)))
    return store.folder


def read(*folders: Path) -> resume.Earlier:
    """What a session of the embedded lab takes from these folders."""
    return resume.read(folders, LAB, (), MACHINE, COMMIT)


def refusal(*folders: Path) -> ConfigError:
    """Why it does not."""
    with pytest.raises(ConfigError) as caught:
        read(*folders)
    return caught.value


def test_a_run_read_back_is_the_run_that_was_stored(tmp_path: Path) -> None:
    """Ledger, client, streams, workload and counters come back from disk as they were, to the last digit."""
    sample = ("vllm:nixl_bytes_transferred_sum", frozenset({("engine", "0"), ("model", "a,b")}), 1 / 3)
    readings = tuple(
        Reading({"a": Snapshot("a", "", (sample, ("process_start_time_seconds", frozenset(), at)))}, {})
        for at in (1.0, 2.0)
    )
    before = replace(
        run(DISAGGREGATED, LAB.workload(NAMES[0]), 2), readings=(readings[0], readings[1]), invalid="why"
    )
    before = replace(before, energy_j={"a": 1 / 3})
    store = Store.create(tmp_path, "run")
    store.add_run(before)
    (path,) = (store.folder / "runs").glob("*.json")
    assert resume.read_run(path) == before


def test_a_run_of_an_earlier_version_has_no_energy(tmp_path: Path) -> None:
    """Its file lacks the key; all else is read."""
    before = run(DISAGGREGATED, LAB.workload(NAMES[0]), 2)
    store = Store.create(tmp_path, "run")
    store.add_run(before)
    (path,) = (store.folder / "runs").glob("*.json")
    raw = json.loads(path.read_text())
    assert raw.pop("energy_j") is None
    path.write_text(json.dumps(raw))
    assert resume.read_run(path) == before


def test_a_run_that_never_began_is_read_back(tmp_path: Path) -> None:
    """A run that failed before its first request has no times, no client and no ledger; it comes back so."""
    failed = Run("single", LAB.workload(NAMES[0]), 1, 0, "", 0.0, None, (), (), (), (), (), invalid="died")
    store = Store.create(tmp_path, "run")
    store.add_run(failed)
    (path,) = (store.folder / "runs").glob("*.json")
    assert resume.read_run(path) == failed


def test_figures_and_verdicts_of_runs_read_back_are_the_same(tmp_path: Path) -> None:
    """Figures and verdicts of two sessions' runs equal those of the same runs that were never on disk."""
    earlier = read(session(tmp_path, "20260101-000000-aaaa", 2), session(tmp_path, "20260102-000000-bbbb", 1))
    taken, notes = resume.complete(earlier, lambda _: ARMS)
    direct = [
        replace(run(arm, LAB.workload(name), place, seed=seed_of(folder, place)), round=number)
        for number, (folder, place) in enumerate(
            [("20260101-000000-aaaa", 0), ("20260101-000000-aaaa", 1), ("20260102-000000-bbbb", 0)]
        )
        for name in NAMES
        for arm in ARMS
    ]
    found, wanted = Comparison([one.run for one in taken], LAB.slo), Comparison(direct, LAB.slo)
    assert notes == []
    assert sorted(map(repr, figure_rows(found))) == sorted(map(repr, figure_rows(wanted)))
    assert verdict_rows(found, LAB) == verdict_rows(wanted, LAB)


def test_a_round_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """A round without a run of every arm does not count, and the note says which arms it lacks."""
    folder = session(tmp_path, "20260101-000000-aaaa", 2)
    last = sorted(folder.glob(f"runs/{NAMES[0]}.01.*.json"), key=lambda path: path.name.split(".")[-2])[-1]
    last.unlink()
    taken, notes = resume.complete(read(folder), lambda _: ARMS)
    rounds = {name: {one.run.round for one in taken if one.run.workload.name == name} for name in NAMES}
    assert rounds == {name: {0} if name == NAMES[0] else {0, 1} for name in NAMES}
    assert notes == [f"20260101-000000-aaaa: 1 round of {NAMES[0]} left out, no run of {SINGLE_AGAIN}"]


def test_the_arms_of_this_session_decide(tmp_path: Path) -> None:
    """Runs of an arm that this session lacks are not taken; rounds that lack an arm of its are left out."""
    earlier = read(session(tmp_path, "20260101-000000-aaaa", 1))
    fewer, none = resume.complete(earlier, lambda _: TOPOLOGIES)
    more, notes = resume.complete(earlier, lambda _: (*ARMS, "disaggregated@tcp"))
    assert {one.run.topology for one in fewer} == set(TOPOLOGIES)
    assert none == []
    assert more == []
    assert len(notes) == len(NAMES)
    assert all(note.endswith("no run of disaggregated@tcp") for note in notes)


def test_what_is_no_round_is_passed_over(tmp_path: Path) -> None:
    """Warm-ups, other workloads, and the same workload at another rate are not rounds of the comparison."""
    folder = session(tmp_path, "20260101-000000-aaaa", 1)
    store, own = Store(folder), LAB.workload(NAMES[0])
    store.add_run(run("single", warm_up_of([own]), WARM_UP_ROUND))
    store.add_run(run("single", own.at_rate(3.0).model_copy(update={"steady": None}), 0, seed=3))
    store.add_run(run("single", LAB.workload("shared-prefix"), 0))
    assert len(read(folder).runs) == len(NAMES) * len(ARMS)


def test_missing_rounds_are_measured_and_numbered_after_the_earlier_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``--rounds 3`` after two rounds of one workload and one of the others: one more, and two more."""
    folder = session(tmp_path, "20260101-000000-aaaa", 2)
    for path in folder.glob("runs/*.01.*.json"):
        if not path.name.startswith(NAMES[0]):
            path.unlink()
    measured: list[tuple[str, int]] = []

    def measure(engine: Any, topology: Any, workload: Workload, seed: int, number: int, *rest: Any) -> Run:
        if number != WARM_UP_ROUND:
            measured.append((workload.name, number))
        return run(topology.name, workload, number, seed)

    monkeypatch.setattr(rounds, "measure", measure)
    arms: list[Any] = [made_arm(name) for name in ARMS]
    store = Store.create(tmp_path, "20260102-000000-bbbb")
    store.write_meta(**json.loads((folder / "run.json").read_text()) | {"run": store.folder.name})
    first = resume.begin(read(folder), lambda _: ARMS, store, lambda _: None)
    none: Any = None
    workloads = [LAB.workload(name) for name in NAMES]
    found = run_rounds(none, arms, workloads, 3, store, none, lambda _: None, earlier=first)
    assert {(name, measured.count((name, number)), number) for name, number in measured} == {
        (NAMES[0], 4, 2), *((name, 4, number) for name in NAMES[1:] for number in (1, 2))
    }  # fmt: skip
    assert all(len(found.valid(name, arm)) == 3 for name in NAMES for arm in ARMS)
    meta = json.loads((store.folder / "run.json").read_text())
    assert meta["resumed"] == ["20260101-000000-aaaa"]
    again = read(store.folder, folder)
    taken, notes = resume.complete(again, lambda _: ARMS)
    assert again.sessions == ("20260101-000000-aaaa", "20260102-000000-bbbb")
    assert len(taken) == 3 * len(NAMES) * len(ARMS), "a run in both folders counts once"
    assert notes == []


def test_rounds_that_are_there_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the earlier sessions have as many rounds as are asked for, only the warm-up is made."""
    seen: list[int] = []

    def measure(engine: Any, topology: Any, workload: Workload, seed: int, number: int, *rest: Any) -> Run:
        seen.append(number)
        return run(topology.name, workload, number, seed)

    monkeypatch.setattr(rounds, "measure", measure)
    taken, _ = resume.complete(read(session(tmp_path, "20260101-000000-aaaa", 2)), lambda _: ARMS)
    arms: list[Any] = [made_arm(name) for name in ARMS]
    none: Any = None
    run_rounds(
        none, arms, [LAB.workload(name) for name in NAMES], 2, Store.create(tmp_path, "new"), none,
        lambda _: None, earlier=[one.run for one in taken],
    )  # fmt: skip
    assert seen == [WARM_UP_ROUND] * len(TOPOLOGIES), "the twin is single's own router"


@pytest.mark.parametrize(
    ("changes", "key", "wrong"),
    [
        ({"vllm": "0.30.0"}, "vllm", "0.30.0 there"),
        (
            {"fingerprint": {**PRINT, "versions": {"torch": "2.11.0"}, "key": "bbbb"}},
            "fingerprint",
            "versions.torch 2.11.0 there, 2.13.0 here",
        ),
        (
            {"lab_file": Path(LAB.file).read_text().replace("max_model_len = 4096", "max_model_len = 2048")},
            "lab_file: model.max_model_len",
            "2048 there, 4096",
        ),
        (
            {"fingerprint": MACHINE},
            "fingerprint",
            "aaaa (incomplete): it tells of the machine that ran pytest alone",
        ),
        ({"lab_file": "name = "}, "lab_file", "does not take it"),
        ({"lab_file": None}, "lab_file", "missing"),
    ],
)
def test_another_measurement_is_refused(
    tmp_path: Path, changes: dict[str, Any], key: str, wrong: str
) -> None:
    """Another vLLM, machine, package or lab is refused with the file, the key and both values."""
    folder = session(tmp_path, "20260101-000000-aaaa", 1, **changes)
    (problem,) = refusal(folder).problems
    assert (problem.file, problem.key) == (str(folder / "run.json"), key)
    assert wrong in problem.wrong
    assert problem.mend


def test_other_gpus_behind_equal_machines_are_refused(tmp_path: Path) -> None:
    """What only the hosts tell is held against the earlier sessions once they are surveyed."""
    folder = session(tmp_path, "20260101-000000-aaaa", 1)
    earlier = read(folder)
    resume.require_same_lab(earlier, fingerprint.of_lab(MACHINE, H100))
    with pytest.raises(ConfigError) as caught:
        resume.require_same_lab(earlier, fingerprint.of_lab(MACHINE, H200))
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (str(folder / "run.json"), "fingerprint")
    named = "lab.node a (prefill).GPU 0 of the node, name"
    assert problem.wrong == f"another lab: {named} NVIDIA H100 there, NVIDIA H200 here"
    assert "resume on the same hardware" in problem.mend


def test_label_and_gates_may_differ(tmp_path: Path) -> None:
    """What is judged is computed anew from the runs; a changed gate or label is no hindrance."""
    text = Path(LAB.file).read_text()
    changed = text.replace(LAB.label, "another label").replace("margin = 0.1", "margin = 0.2")
    assert changed != text
    assert read(session(tmp_path, "20260101-000000-aaaa", 1, lab_file=changed)).runs


def test_a_lab_that_extends_another_is_read_from_run_json_alone(tmp_path: Path) -> None:
    """A session keeps the resolved lab, and may be resumed by the same lab written out in full."""
    path = tmp_path / "mine.toml"
    path.write_text('name = "embedded"\nextends = "embedded"\n[model]\nmax_model_len = 2048\n')
    mine = load_lab(str(path))
    kept = session(tmp_path, "20260101-000000-aaaa", 1, lab_file=resolved_text(mine))
    path.unlink()
    assert resume.read([kept], mine, (), MACHINE, COMMIT).runs
    (problem,) = refusal(kept).problems
    assert problem.key == "lab_file: model.max_model_len"


def test_another_commit_is_noted(tmp_path: Path) -> None:
    """Runs of other code are taken, and the note names both commits."""
    (note,) = read(session(tmp_path, "20260101-000000-aaaa", 1, commit="ffff")).notes
    assert note == f"20260101-000000-aaaa: code ffff; this session's is {COMMIT}"


def test_another_workload_is_refused(tmp_path: Path) -> None:
    """A workload file that was changed since is refused with the setting that differs."""
    folder = session(tmp_path, "20260101-000000-aaaa", 1)
    for path in folder.glob("runs/chat.*.json"):
        raw = json.loads(path.read_text())
        raw["workload"]["prompt_tokens"] += 1
        path.write_text(json.dumps(raw))
    (problem,) = refusal(folder).problems
    own = LAB.workload("chat").prompt_tokens
    assert f"prompt_tokens {own + 1} there, {own} here" in problem.wrong
    assert "workloads/chat.toml" in problem.mend


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    """A file that was cut off and one with a value missing are refused together, each with its mend."""
    folder = session(tmp_path, "20260101-000000-aaaa", 1)
    cut, odd = sorted(folder.glob("runs/*.json"))[:2]
    cut.write_text(cut.read_text()[:200])
    raw = json.loads(odd.read_text())
    del raw["ttft_s"]
    odd.write_text(json.dumps(raw))
    first, second = refusal(folder).problems
    assert (first.file, second.file, second.key) == (str(cut), str(odd), "ttft_s")
    assert "cut off" in first.wrong
    assert "delete it" in first.mend


@pytest.mark.parametrize("file", ["run.json", "runs", "folder"])
def test_a_folder_without_runs_is_refused(tmp_path: Path, file: str) -> None:
    """A missing folder, one without run.json and one without runs are refused, not taken as empty."""
    folder = session(tmp_path, "20260101-000000-aaaa", 0 if file == "runs" else 1)
    if file == "run.json":
        (folder / file).unlink()
    (problem,) = refusal(tmp_path / "nowhere" if file == "folder" else folder).problems
    assert "earlier session" in problem.mend or "measured something" in problem.mend


def test_pytest_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    """``pytest --resume`` of a folder that is not there ends with status 4, and makes no run folder."""
    argv = ["-m", "pytest", "tests/disagg/test_comparison.py", "--resume", str(tmp_path / "nowhere")]
    answer = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
    )
    assert answer.returncode == 4, answer.stdout
    assert "--resume: no such folder" in answer.stderr
    assert "nothing was started" in answer.stderr


EARLY = "20260101-000000-aaaa"
WITHOUT_SINGLE = ("replicated", "disaggregated")


def note_arms(folder: Path, names: Sequence[str]) -> None:
    """Say in run.json which arms the session had."""
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, "arms": list(names)}))


@pytest.mark.parametrize(
    ("there", "here", "mend"),
    [
        (None, WITHOUT_SINGLE, "pass neither --arm nor --without"),
        (["single", "replicated", "disaggregated", "single-again"], WITHOUT_SINGLE, "neither --arm"),
        (list(WITHOUT_SINGLE), arms.OWN, "pass --arm replicated --arm disaggregated"),
    ],
)
def test_a_session_with_other_arms_is_refused(
    tmp_path: Path, there: list[str] | None, here: Sequence[str], mend: str
) -> None:
    """With the options that give this session the same; one that does not say had all of them."""
    folder = session(tmp_path, EARLY, 1)
    if there:
        note_arms(folder, there)
    with pytest.raises(ConfigError, match="arms") as caught:
        resume.read([folder], LAB, (), PRINT, COMMIT, here)
    assert mend in str(caught.value)


def test_a_session_with_the_same_arms_goes_on(tmp_path: Path) -> None:
    """Its rounds are whole without the arms that both leave out; arms of ways may differ."""
    measured = [*WITHOUT_SINGLE, "disaggregated@push"]
    folder = session(tmp_path, EARLY, 2, arms=WITHOUT_SINGLE)
    note_arms(folder, measured)
    earlier = resume.read([folder], LAB, (), PRINT, COMMIT, WITHOUT_SINGLE)
    taken, left_out = resume.complete(earlier, lambda _: WITHOUT_SINGLE)
    assert {one.run.topology for one in taken} == set(WITHOUT_SINGLE)
    assert len(taken) == 2 * len(NAMES) * len(WITHOUT_SINGLE)
    assert not left_out

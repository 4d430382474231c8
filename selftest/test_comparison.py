"""Interleaving, pairing and gates of a comparison, on made-up runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab import comparison
from disagglab.comparison import Comparison, run_rounds, verdict_rows
from disagglab.errors import InvalidRun
from disagglab.lab import load_lab
from disagglab.load import Run
from disagglab.section import Lab
from disagglab.store import Store
from disagglab.topology import DISAGGREGATED, REPLICATED, SINGLE, SINGLE_AGAIN, TOPOLOGIES
from disagglab.workload import Workload, load_workload

BASE_S = {SINGLE_AGAIN: 1.0, SINGLE: 1.0, REPLICATED: 1.0, DISAGGREGATED: 0.5}


def run(topology: str, workload: Workload, number: int, scale: float = 1.0) -> Run:
    """A run whose every time is the topology's base, a little different from round to round."""
    seconds = BASE_S[topology] * scale * (1 + 0.01 * number)
    count = workload.requests
    return Run(
        topology, workload, 1, number, "vllm bench serve", 10.0, 0.1,
        ttft_s=(seconds,) * count,
        e2e_s=(2 * seconds,) * count,
        itl_s=((seconds / 10,) * 60,) * count,
        prompt_tokens=(workload.prompt_tokens,) * count,
        output_tokens=(workload.output_tokens,) * count,
    )  # fmt: skip


@pytest.fixture
def lab() -> Lab:
    """The embedded lab."""
    return load_lab("embedded")


def test_rounds_are_interleaved_and_mirrored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every round holds every arm with one seed; the order turns round; warm-ups do not count."""
    seen: list[tuple[int, str, int]] = []

    def measure(engine: Any, topology: Any, workload: Workload, seed: int, number: int, *rest: Any) -> Run:
        seen.append((number, topology.name, seed))
        return run(topology.name, workload, number)

    monkeypatch.setattr(comparison, "measure", measure)
    arms: list[Any] = [SimpleNamespace(name=name) for name in TOPOLOGIES]
    store = Store.create(tmp_path, "run")
    none: Any = None
    found = run_rounds(none, arms, [load_workload("chat")], 2, store, none, "0.31.0", lambda _: None)
    names = [(number, name) for number, name, _ in seen]
    assert names == [
        *((comparison.WARM_UP_ROUND, name) for name in TOPOLOGIES),
        *((0, name) for name in TOPOLOGIES),
        *((1, name) for name in reversed(TOPOLOGIES)),
    ]
    assert len({seed for number, _, seed in seen if number == 0}) == 1
    assert {seed for number, _, seed in seen if number == 0} != {
        seed for number, _, seed in seen if number == 1
    }
    assert len(found.runs) == 6
    assert len(list((tmp_path / "run" / "runs").glob("*.json"))) == 9


def test_gates_become_verdicts(lab: Lab) -> None:
    """A disaggregated p99 ITL at half of the replicated one, in three rounds, meets the gate."""
    runs = [
        run(name, load_workload(gate.workload), number)
        for gate in lab.gates
        for name in TOPOLOGIES
        for number in range(3)
    ]
    rows = verdict_rows(Comparison(runs), lab)
    assert [row.metric for row in rows] == [gate.metric for gate in lab.gates]
    assert rows[0].outcome == "better"
    assert rows[0].effect == pytest.approx(-0.5)
    assert rows[0].gate.startswith("met")
    assert rows[0].noise_floor is None, "no A/A pair was measured"


def test_identical_arms_come_after_the_gates(lab: Lab) -> None:
    """The A/A pair of every gated figure has a row of its own and a floor beside the gate's."""
    runs = [
        run(name, load_workload(workload), number, scale)
        for workload in dict.fromkeys(gate.workload for gate in lab.gates)
        for name in (*TOPOLOGIES, SINGLE_AGAIN)
        for number, scale in enumerate((1.0, 1.02, 0.99) if name == SINGLE_AGAIN else (1.0,) * 3)
    ]
    rows = verdict_rows(Comparison(runs), lab)
    gated, identical = rows[: len(lab.gates)], rows[len(lab.gates) :]
    assert [(row.workload, row.metric) for row in identical] == [(g.workload, g.metric) for g in lab.gates]
    assert {(row.candidate, row.baseline) for row in identical} == {(SINGLE_AGAIN, SINGLE)}
    assert all(row.p_adjusted is None and row.gate.startswith("A/A") for row in identical)
    floors = {row.metric: row.noise_floor for row in gated}
    assert floors["itl_p99"] == pytest.approx(floors["ttft_p50"])
    assert floors["ttft_p50"] is not None
    assert 0 < floors["ttft_p50"] < 0.05
    assert floors["output_tokens_per_s"] == 0, "all made-up runs last as long"
    assert all(row.p_adjusted is not None for row in gated)


def test_a_family_of_gates_is_corrected(lab: Lab) -> None:
    """A gate that alone would be met with p just below 0.05 is not met among three."""
    runs = []
    for gate in lab.gates:
        for name in TOPOLOGIES:
            for number in range(3):
                noise = (1.0, 1.72, 1.0)[number] if name == DISAGGREGATED else 1.0
                runs.append(run(name, load_workload(gate.workload), number, noise))
    alone = lab.model_copy(update={"gates": lab.gates[:1]})
    (row,) = verdict_rows(Comparison(runs), alone)
    assert row.p_adjusted is not None
    assert 0.05 / 3 < row.p_adjusted <= 0.2
    first = verdict_rows(Comparison(runs), lab)[0]
    assert first.p_adjusted is not None
    assert first.p_adjusted > row.p_adjusted


def test_rounds_go_on_while_a_gate_is_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to the cap, and of the open workloads only; without a cap never."""
    monkeypatch.setattr(comparison, "measure", lambda e, t, w, s, n, *_: run(t.name, w, n))
    arms: list[Any] = [SimpleNamespace(name=SINGLE)]
    workloads = [load_workload("chat"), load_workload("one-user")]
    none: Any = None

    def counts(cap: int, name: str) -> dict[str, int]:
        store = Store.create(tmp_path, name)
        options = {"cap": cap, "open_workloads": lambda found: {"chat"} if len(found.runs) < 7 else set()}
        found = run_rounds(none, arms, workloads, 2, store, none, "0.31.0", lambda _: None, **options)
        return {w.name: len(found.valid(w.name, SINGLE)) for w in workloads}

    assert counts(0, "none") == {"chat": 2, "one-user": 2}
    assert counts(4, "capped") == {"chat": 4, "one-user": 2}
    assert counts(9, "decided") == {"chat": 5, "one-user": 2}


def test_invalid_runs_are_kept_and_never_aggregated(lab: Lab) -> None:
    """An invalid run takes its whole round out of the pairs, and is still listed with its reason."""
    workload = load_workload("chat")
    runs = [run(name, workload, number) for name in (REPLICATED, DISAGGREGATED) for number in range(3)]
    runs[1] = replace(run(REPLICATED, workload, 1, scale=1000), invalid="no proof")
    found = Comparison(runs)
    assert len(found.pairs("chat", REPLICATED, DISAGGREGATED, "ttft_p50")) == 2
    assert max(found.values("chat", REPLICATED, "ttft_p50")) < 2
    assert [bad.invalid for bad in found.invalid()] == ["no proof"]


def test_no_valid_pair_is_an_error(lab: Lab) -> None:
    """A gate without a single pair of valid runs cannot be answered, and says so."""
    with pytest.raises(InvalidRun, match="no valid pair"):
        verdict_rows(Comparison([]), lab)


def test_a_run_without_proof_comes_back_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed proof marks the run; the figures that it measured stay with it."""
    workload = load_workload("chat")
    whole = run(SINGLE, workload, 0)

    def refuse(*_: Any) -> None:
        raise InvalidRun("counters do not add up")

    monkeypatch.setattr(comparison.ledger, "read", lambda _: None)
    monkeypatch.setattr(comparison.ledger, "settle", lambda *_: None)
    monkeypatch.setattr(comparison.ledger, "prove", refuse)
    engine: Any = SimpleNamespace(run=lambda *_: whole)
    topology: Any = SimpleNamespace(name=SINGLE)
    none: Any = None
    measured = comparison.measure(engine, topology, workload, 1, 0, none, "0.31.0")
    assert measured.invalid == "counters do not add up"
    assert measured.ttft_s == whole.ttft_s

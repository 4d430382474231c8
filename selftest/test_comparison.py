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
from disagglab.topology import DISAGGREGATED, REPLICATED, SINGLE, TOPOLOGIES
from disagglab.workload import Workload, load_workload

BASE_S = {SINGLE: 1.0, REPLICATED: 1.0, DISAGGREGATED: 0.5}


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

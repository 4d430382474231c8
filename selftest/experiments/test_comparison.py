"""Interleaving, pairing and gates of a comparison, on made-up runs."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.arrivals import arrivals
from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import comparison, rounds, warming
from disagglab.experiments.comparison import (
    Comparison,
    figure_rows,
    run_rounds,
)
from disagglab.experiments.rounds import WARM_UP_ROUND
from disagglab.experiments.verdicts import (
    undecided_workloads,
    verdict_rows,
    version_rows,
    way_rows,
)
from disagglab.hosts import energy
from disagglab.measure import ledger
from disagglab.measure import run as one_run
from disagglab.results import metrics
from disagglab.results.gate import State
from disagglab.results.records import Ledger, Reading, Run, Snapshot, VerdictRow
from disagglab.results.report import verdict_cells
from disagglab.results.run_folder import Store
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, SINGLE_AGAIN, TOPOLOGIES
from disagglab.stats.verdict import NO_SPREAD
from selftest.experiments.made import made_arm

LAB = load_lab("embedded")
BASE_S = {SINGLE_AGAIN: 1.0, SINGLE: 1.0, REPLICATED: 1.0, DISAGGREGATED: 0.5}


def run(topology: str, workload: Workload, number: int, scale: float = 1.0) -> Run:
    """A run whose every time is the topology's base, a little different from round to round."""
    seconds = BASE_S[topology] * scale * (1 + 0.01 * number)
    requests = arrivals(workload, 1)
    count = len(requests)
    moved = 0.1 * seconds * count if topology == DISAGGREGATED else 0.0
    return Run(
        topology, workload, 1, number, "vllm bench serve", 10.0, None,
        ttft_s=(seconds,) * count,
        e2e_s=(2 * seconds,) * count,
        itl_s=((seconds / 10,) * 60,) * count,
        prompt_tokens=tuple(one.prompt_tokens for one in requests),
        output_tokens=tuple(one.output_tokens for one in requests),
        start_s=tuple(one.arrival_s for one in requests),
        streams=tuple(one.stream for one in requests),
        ledger=book(transfers=count if moved else 0, transfer_s=moved),
    )  # fmt: skip


def book(transfers: int, transfer_s: float) -> Ledger:
    """A ledger of which only the transfers matter."""
    return Ledger({}, {}, {}, 0, transfers, transfer_s, 0, 0, 0, 0, 0, 0)


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

    monkeypatch.setattr(rounds, "measure", measure)
    arms: list[Any] = [made_arm(name) for name in TOPOLOGIES]
    store = Store.create(tmp_path, "run")
    none: Any = None
    found = run_rounds(none, arms, [LAB.workload("chat")], 2, store, none, lambda _: None)
    names = [(number, name) for number, name, _ in seen]
    assert names == [
        *((WARM_UP_ROUND, name) for name in TOPOLOGIES),
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
        run(name, workload, number)
        for workload in lab.gated_workloads
        for name in TOPOLOGIES
        for number in range(3)
    ]
    rows = verdict_rows(Comparison(runs, LAB.slo), lab)
    assert [row.metric for row in rows] == [gate.figure for gate in lab.gates]
    assert rows[0].outcome == "better"
    assert rows[0].effect == pytest.approx(-0.5)
    assert rows[0].gate.state is State.MET
    assert rows[0].noise_floor is None, "no A/A pair was measured"


def test_identical_arms_come_after_the_gates(lab: Lab) -> None:
    """The A/A pair of every gated figure has a row of its own and a floor beside the gate's."""
    runs = [
        run(name, workload, number, scale)
        for workload in lab.gated_workloads
        for name in (*TOPOLOGIES, SINGLE_AGAIN)
        for number, scale in enumerate((1.0, 1.02, 0.99) if name == SINGLE_AGAIN else (1.0,) * 3)
    ]
    rows = verdict_rows(Comparison(runs, LAB.slo), lab)
    gated, identical = rows[: len(lab.gates)], rows[len(lab.gates) :]
    compared = [(gate.workload, gate.figure) for gate in lab.gates if gate.limit is None]
    assert [(row.workload, row.metric) for row in identical] == compared
    assert {(row.candidate, row.baseline) for row in identical} == {(SINGLE_AGAIN, SINGLE)}
    assert all(row.p_adjusted is None and row.gate.state is State.IDENTICAL for row in identical)
    floors = {row.metric: row.noise_floor for row in gated}
    assert floors["itl_p99 (steady)"] == pytest.approx(floors["ttft_p50"])
    assert floors["ttft_p50"] is not None
    assert 0 < floors["ttft_p50"] < 0.05
    (flat,) = {(row.noise_floor, row.floor_note) for row in gated if row.metric == "output_tokens_per_s"}
    assert flat == (None, "every pair equal"), "all made-up runs last as long"
    assert all(row.p_adjusted is not None for row in gated)


def test_a_family_of_gates_is_corrected(lab: Lab) -> None:
    """A gate that alone would be met with p just below 0.05 is not met among three."""
    runs = []
    for workload in lab.gated_workloads:
        for name in TOPOLOGIES:
            for number in range(3):
                noise = (1.0, 1.72, 1.0)[number] if name == DISAGGREGATED else 1.0
                runs.append(run(name, workload, number, noise))
    alone = lab.model_copy(update={"gates": lab.gates[:1]})
    (row,) = verdict_rows(Comparison(runs, LAB.slo), alone)
    assert row.p_adjusted is not None
    assert 0.05 / 3 < row.p_adjusted <= 0.2
    first = verdict_rows(Comparison(runs, LAB.slo), lab)[0]
    assert first.p_adjusted is not None
    assert first.p_adjusted > row.p_adjusted


def test_a_gate_that_the_correction_fails_says_so(lab: Lab) -> None:
    """Met alone, and not as one of twelve: with both p and the size of the family. The same words stand in
    terminal and report, from any file that has them; a file of an earlier version lacks them.
    """
    noise = (1.0, 1.5, 1.0, 1.5)
    workload = lab.workload(lab.gates[0].workload)
    runs = [
        run(name, workload, number, noise[number] if name == DISAGGREGATED else 1.0)
        for name in TOPOLOGIES
        for number in range(4)
    ]
    comparison = Comparison(runs, LAB.slo)
    gate = lab.gates[0].model_copy(update={"enforce": True})
    (row,) = verdict_rows(comparison, lab.model_copy(update={"gates": (gate,)}))
    assert (row.gate.state, row.outcome, row.family) == (State.MET, "better", 1)
    assert row.p is not None
    assert row.p == row.p_adjusted
    assert row.standing == "met: wants better"
    family = (gate, *(gate.model_copy(update={"margin": 0.01 + n / 1000}) for n in range(11)))
    row = verdict_rows(comparison, lab.model_copy(update={"gates": family}))[0]
    assert row.p_adjusted is not None
    assert (row.gate.state, row.outcome) == (State.NOT_MET, "better")
    said = f"not met: wants better; better at p {row.p:.2g}, {row.p_adjusted:.2g} after 12 gates"
    assert row.standing == said == verdict_cells(row)["gate"]
    written = row.as_json()
    assert written["gate"] == "not met: wants better", "as earlier versions wrote and read it"
    assert VerdictRow.from_json(written).standing == said
    old = {key: value for key, value in written.items() if key not in ("p", "family", "floor_note")}
    assert VerdictRow.from_json(old).standing == "not met: wants better"


def test_the_floor_of_a_count_is_a_request_at_least(lab: Lab) -> None:
    """One miss of all requests in each A/A run is no floor of 0; the table says what the figure is."""
    slo = lab.slo
    assert slo is not None
    (gate,) = [one for one in lab.gates if one.metric == "slo_attainment"][:1] or [
        lab.gates[0].model_copy(update={"metric": "slo_attainment", "stream": ""})
    ]
    gate = gate.model_copy(update={"baseline": REPLICATED, "limit": None})
    workload = lab.workload(gate.workload)

    def missed(name: str, number: int) -> Run:
        one = run(name, workload, number)
        count = len(one.ttft_s)
        times = (slo.ttft_s * 2, *(slo.ttft_s / 2,) * (count - 1))
        return replace(one, ttft_s=times, e2e_s=times)

    runs = [missed(name, n) for name in (*TOPOLOGIES, SINGLE_AGAIN) for n in range(3)]
    row = verdict_rows(Comparison(runs, slo), lab.model_copy(update={"gates": (gate,)}))[0]
    count = len(runs[0].ttft_s)
    assert row.noise_floor == pytest.approx(1 / (count - 0.5))
    assert verdict_cells(row)["noise floor"] == f"±{100 / (count - 0.5):.1f} % (one request)"
    assert verdict_cells(replace(row, noise_floor=None, floor_note=NO_SPREAD))["noise floor"] == (
        "none: every pair equal"
    )
    assert verdict_cells(replace(row, noise_floor=0.0, floor_note=""))["noise floor"] == (
        "none: every pair equal"
    ), "a file of an earlier version"


def test_the_figures_of_a_run_are_computed_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many metrics, gates and arms ask: once for each stream. A run that was changed starts anew."""
    asked: list[tuple[str, int, str]] = []
    answers = metrics.answers

    def counted(run: Run, slo: Any = None, stream: str = "") -> Any:
        asked.append((run.topology, id(run), stream))
        return answers(run, slo, stream)

    monkeypatch.setattr(metrics, "answers", counted)
    runs = [
        run(name, workload, number)
        for workload in lab.gated_workloads
        for name in (*TOPOLOGIES, SINGLE_AGAIN)
        for number in range(3)
    ]
    comparison = Comparison(runs, LAB.slo)
    figure_rows(comparison)
    verdict_rows(comparison, lab)
    undecided_workloads(comparison, lab)
    assert len(asked) == len(set(asked)) > len(runs)
    before = len(asked)
    verdict_rows(Comparison(runs, LAB.slo), lab)
    assert len(asked) == before, "also by another comparison of the same runs"
    slower = replace(runs[0], ttft_s=tuple(2 * value for value in runs[0].ttft_s))
    assert metrics.figures(slower, LAB.slo)["ttft_p50"] == pytest.approx(
        2 * (metrics.figures(runs[0], LAB.slo)["ttft_p50"] or 0)
    )
    assert slower != runs[0]
    assert replace(slower, ttft_s=runs[0].ttft_s) == runs[0], "what is kept is no part of a run"
    with pytest.raises(TypeError):
        metrics.figures(slower)["ttft_p50"] = 0.0  # type: ignore[index]


def test_rounds_go_on_while_a_gate_is_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to the cap, and of the open workloads only; without a cap never."""
    monkeypatch.setattr(rounds, "measure", lambda e, t, w, s, n, *_: run(t.name, w, n))
    arms: list[Any] = [made_arm(SINGLE)]
    workloads = [LAB.workload("chat"), LAB.workload("one-user")]
    none: Any = None

    def counts(cap: int, name: str) -> dict[str, int]:
        store = Store.create(tmp_path, name)

        def still_open(found: Comparison) -> set[str]:
            return {"chat"} if len(found.runs) < 7 else set()

        found = run_rounds(
            none, arms, workloads, 2, store, none, lambda _: None, cap=cap, open_workloads=still_open
        )
        return {w.name: len(found.valid(w.name, SINGLE)) for w in workloads}

    assert counts(0, "none") == {"chat": 2, "one-user": 2}
    assert counts(4, "capped") == {"chat": 4, "one-user": 2}
    assert counts(9, "decided") == {"chat": 5, "one-user": 2}


def test_invalid_runs_are_kept_and_never_aggregated(lab: Lab) -> None:
    """An invalid run takes its whole round out of the pairs, and is still listed with its reason."""
    workload = LAB.workload("chat")
    runs = [run(name, workload, number) for name in (REPLICATED, DISAGGREGATED) for number in range(3)]
    runs[1] = replace(run(REPLICATED, workload, 1, scale=1000), invalid="no proof")
    found = Comparison(runs, LAB.slo)
    assert len(found.pairs("chat", REPLICATED, DISAGGREGATED, "ttft_p50")) == 2
    assert max(found.values("chat", REPLICATED, "ttft_p50")) < 2
    assert [bad.invalid for bad in found.invalid()] == ["no proof"]


def test_no_valid_pair_is_an_error(lab: Lab) -> None:
    """A gate without a single pair of valid runs cannot be answered, and says so."""
    with pytest.raises(InvalidRun, match="no valid pair"):
        verdict_rows(Comparison([], LAB.slo), lab)


def test_a_run_without_proof_comes_back_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed proof marks the run; the figures that it measured stay with it."""
    workload = LAB.workload("chat")
    whole = run(SINGLE, workload, 0)

    def refuse(*_: Any) -> None:
        raise InvalidRun("counters do not add up")

    monkeypatch.setattr(ledger, "read", lambda _: None)
    monkeypatch.setattr(ledger, "settle", lambda *_: None)
    monkeypatch.setattr(ledger, "prove", refuse)
    engine: Any = SimpleNamespace(run=lambda *_: whole)
    topology: Any = SimpleNamespace(
        name=SINGLE, version="0.31.0", servers=(), followers=(), require_alive=lambda: None
    )
    none: Any = None
    measured = one_run.measure(engine, topology, workload, 1, 0, none)
    assert measured.invalid == "counters do not add up"
    assert measured.ttft_s == whole.ttft_s


def test_a_run_has_the_energy_of_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the counters of the nodes with GPUs rose by while the engine ran."""
    whole = run(SINGLE, LAB.workload("chat"), 0)
    counters = iter([{"a": 100.0, "b": 50.0}, {"a": 130.0, "b": 55.5}])
    monkeypatch.setattr(energy, "of_nodes", lambda _: next(counters))
    monkeypatch.setattr(ledger, "read", lambda _: Reading({}, {}))
    monkeypatch.setattr(ledger, "settle", lambda *_: Reading({}, {}))
    book = replace(Ledger({}, {}, {}, 0, 0, 0.0, 0, 0, 0, 0, 0, 0), served_s=sum(whole.e2e_s))
    monkeypatch.setattr(ledger, "prove", lambda *_: book)
    engine: Any = SimpleNamespace(run=lambda *_: whole)
    topology: Any = SimpleNamespace(
        name=SINGLE, version="0.31.0", servers=(), followers=(), require_alive=lambda: None
    )
    none: Any = None
    measured = one_run.measure(engine, topology, whole.workload, 1, 0, none)
    assert measured.invalid is None
    assert measured.energy_j == {"a": 30.0, "b": 5.5}
    monkeypatch.setattr(energy, "of_nodes", lambda _: {})
    assert one_run.measure(engine, topology, whole.workload, 1, 0, none).energy_j is None


def test_a_run_that_the_servers_did_not_see_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger proves it, yet the requests took half of their time where no server counted it."""
    workload = LAB.workload("one-user")
    whole = run(SINGLE, workload, 0)
    spent = sum(whole.e2e_s)
    readings = (Reading({}, {}), Reading({}, {}))
    monkeypatch.setattr(ledger, "read", lambda _: readings[0])
    monkeypatch.setattr(ledger, "settle", lambda *_: readings[1])
    engine: Any = SimpleNamespace(run=lambda *_: whole)
    topology: Any = SimpleNamespace(
        name=SINGLE, version="0.31.0", servers=(), followers=(), require_alive=lambda: None
    )
    none: Any = None
    for served_s, valid in ((spent, True), (spent / 2, False)):
        book = replace(Ledger({}, {}, {}, 0, 0, 0.0, 0, 0, 0, 0, 0, 0), served_s=served_s)
        monkeypatch.setattr(ledger, "prove", lambda *_, book=book: book)
        measured = one_run.measure(engine, topology, workload, 1, 0, none)
        assert (measured.invalid is None) == valid, measured.invalid
        assert (measured.ledger == book) == valid


def versions(scale: float) -> Comparison:
    """Two releases on three workloads in four rounds; the lab's takes ``scale`` times as long."""
    runs = []
    for workload in LAB.gated_workloads:
        for kind in (SINGLE, DISAGGREGATED):
            for number in range(4):
                noise = 1 + 0.004 * (number % 3)
                runs.append(run(kind, workload, number, scale * noise))
                runs.append(replace(run(kind, workload, number), topology=f"{kind}@0.30.0"))
    return Comparison(runs, LAB.slo)


def test_a_slower_release_is_found_worse() -> None:
    """+20 % on every time is found on every time, for both topologies, and not on what did not change."""
    rows = verdict_rows_by_figure(versions(1.2))
    assert {state for (_, metric), (_, state) in rows.items() if metric == "ttft_p50"} == {
        "found worse (not enforced)"
    }
    assert {outcome for (_, metric), (outcome, _) in rows.items() if "itl" in metric} == {"worse"}


def test_an_equal_release_is_no_regression() -> None:
    """Half a percent of noise is inside every margin."""
    rows = verdict_rows_by_figure(versions(1.0))
    assert {state for _, state in rows.values()} == {"no regression"}
    assert len(rows) == 2 * len([gate for gate in LAB.gates if gate.limit is None])


def verdict_rows_by_figure(found: Comparison) -> dict[tuple[str, str], tuple[str, str]]:
    """(outcome, gate) by candidate and figure."""
    rows = version_rows(found, LAB, "0.30.0")
    assert all(row.baseline == f"{row.candidate}@0.30.0" for row in rows)
    return {(row.candidate, row.metric): (row.outcome, str(row.gate)) for row in rows}


def test_a_way_is_judged_against_the_labs_own_settings(lab: Lab) -> None:
    """A row a gated figure, the limit's too; no gate hangs on it; p is raised by the number of rows."""
    arm = f"{DISAGGREGATED}@slow"
    runs = [
        replace(run(DISAGGREGATED, workload, number, scale), topology=name)
        for workload in lab.gated_workloads
        for name, scales in ((DISAGGREGATED, (1.0, 1.0, 1.0)), (arm, (2.0, 2.1, 1.9)))
        for number, scale in enumerate(scales)
    ]
    rows = way_rows(Comparison(runs, lab.slo), lab, [arm])
    assert {(row.workload, row.metric) for row in rows} == {(g.workload, g.figure) for g in lab.gates}
    assert {(row.candidate, row.baseline, row.gate.state) for row in rows} == {
        (arm, DISAGGREGATED, State.WAY)
    }
    (slower,) = [row for row in rows if row.metric == "ttft_p50"]
    assert (slower.outcome, slower.rounds) == ("worse", 3)
    assert slower.effect == pytest.approx((2.0 * 2.1 * 1.9) ** (1 / 3) - 1)
    (same,) = [row for row in rows if row.metric == "output_tokens_per_s"]
    assert same.outcome == "equivalent"
    alone = way_rows(Comparison(runs, lab.slo), lab.model_copy(update={"gates": (lab.gates[1],)}), [arm])
    assert alone[0].metric == "ttft_p50"
    assert slower.p_adjusted is not None
    assert alone[0].p_adjusted is not None
    assert slower.p_adjusted > alone[0].p_adjusted


def test_every_figure_is_kept_for_trends() -> None:
    """A row a workload, arm and figure, with one value a round; those of a stream under its name."""
    rows = comparison.figure_rows(versions(1.0))
    assert {len(row.values) for row in rows} == {4}
    names = {row.metric for row in rows if row.workload == "long-prompts-into-steady-decode"}
    assert {"itl_p99", "itl_p99 (steady)", "ttft_p50 (main)", "slo_attainment"} <= names
    assert not {"slo_attainment (steady)", "goodput_per_s (main)"} & names
    shares = {row.arm for row in rows if row.metric == "transfer_share_of_ttft"}
    assert shares == {DISAGGREGATED, f"{DISAGGREGATED}@0.30.0"}


def test_a_warm_up_loads_every_server_once() -> None:
    """The whole load where servers have had none; two requests through each other router; a twin has none of
    its own. Servers of another deployment (a way, a release) get their own load.
    """
    a, b, other = object(), object(), object()

    def arm(name: str, *servers: object, decode: bool = False) -> Any:
        made = made_arm(name)
        return replace(made, servers=servers, decode=servers[-1:] if decode else ())

    arms = [
        arm(SINGLE, a),
        arm(REPLICATED, a, b),
        arm(DISAGGREGATED, a, b, decode=True),
        arm(SINGLE_AGAIN, a),
        arm("disaggregated@tcp", a, other, decode=True),
    ]
    turns = warming.warm_up_turns(arms, LAB.gated_workloads)
    assert [(turn.arm.name, turn.subject.requests) for turn in turns] == [
        (REPLICATED, 6),
        (SINGLE, 2),
        (DISAGGREGATED, 2),
        ("disaggregated@tcp", 6),
    ]
    assert {turn.number for turn in turns} == {WARM_UP_ROUND}
    assert len({turn.seed for turn in turns}) == len(turns)


def test_the_warm_up_fills_every_place() -> None:
    """As many requests at once as the fullest workload has, in a closed loop, with prompts of its own."""
    warm = warming.warm_up_of([LAB.workload("one-user"), LAB.workload("long-prompts-into-steady-decode")])
    assert warm.concurrency == warm.requests == 6
    assert warm.rate_per_s is None
    assert warm.steady is None


def test_counters_of_a_run_are_kept(tmp_path: Path) -> None:
    """Each server's samples before and after, beside the requests, named as Prometheus names them."""
    samples: tuple[tuple[str, frozenset[tuple[str, str]], float], ...] = (
        ("vllm:x_total", frozenset({("source", "a")}), 3.0),
        ("up", frozenset(), 1.0),
    )
    reading = Reading({"a": Snapshot("a", "http://a/metrics", samples)}, {})
    store = Store.create(tmp_path, "run")
    store.add_run(replace(run(SINGLE, LAB.workload("chat"), 0), readings=(reading, reading)))
    (kept,) = (store.folder / "runs").glob("*.metrics.json.gz")
    content = json.loads(gzip.decompress(kept.read_bytes()))
    assert content["after"]["a"] == {'vllm:x_total{source="a"}': 3.0, "up": 1.0}
    (raw,) = (store.folder / "runs").glob("*.single.*[0-9].json")
    assert len(json.loads(raw.read_text())["ttft_s"]) == LAB.workload("chat").requests


def test_a_limit_on_a_share_that_is_zero(lab: Lab) -> None:
    """No good request at all is a poor result, not an error: the share is corrected before its logarithm."""
    limit = lab.gates[3].model_copy(update={"baseline": None, "limit": 0.5})
    slow = [run(DISAGGREGATED, LAB.workload(limit.workload), number, 100.0) for number in range(3)]
    (row,) = verdict_rows(Comparison(slow, LAB.slo), lab.model_copy(update={"gates": (limit,)}))
    assert row.candidate_value == 0
    assert row.outcome == "worse"
    assert row.baseline == "limit"


def test_an_invalid_run_keeps_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose steady requests were over too early is refused, and shown with all that it measured."""
    workload = LAB.workload("long-prompts-into-steady-decode")
    whole = run(SINGLE, workload, 0)
    over = replace(whole, e2e_s=(0.1,) * len(whole.e2e_s), ttft_s=(0.05,) * len(whole.ttft_s))
    monkeypatch.setattr(ledger, "read", lambda _: None)
    monkeypatch.setattr(ledger, "settle", lambda *_: None)
    engine: Any = SimpleNamespace(run=lambda *_: over)
    topology: Any = SimpleNamespace(
        name=SINGLE, version="0.31.0", servers=(), followers=(), require_alive=lambda: None
    )
    none: Any = None
    measured = one_run.measure(engine, topology, workload, 1, 0, none)
    assert measured.invalid is not None
    assert "while a steady request decoded" in measured.invalid
    assert measured.e2e_s == over.e2e_s

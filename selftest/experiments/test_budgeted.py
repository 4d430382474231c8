"""A comparison in the time given, with made-up runs and a clock that they turn on."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.workload import Workload
from disagglab.experiments import budgeted, rounds
from disagglab.experiments.budgeted import Budget, Entrants, entrants, run_in_time
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.trials import PILOT_ROUNDS, TrialPlan
from disagglab.experiments.verdicts import verdict_rows
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.death import Died
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, SINGLE_AGAIN, TOPOLOGIES
from selftest.experiments.made import made_arm, made_run

WHOLE = load_lab("embedded")
# without attainment, which is all or nothing in made runs, and so never decided
LAB = WHOLE.model_copy(update={"gates": tuple(one for one in WHOLE.gates if one.metric != "slo_attainment")})
WORKLOADS = LAB.gated_workloads
BASE_S = {SINGLE: 0.1, REPLICATED: 0.1, DISAGGREGATED: 0.13}
FIXED_S = 0.5  # of a run, beside its requests
REPLICATED_AGAIN = "replicated-again"


class Made:
    """Takes the place of a lab: runs with a little noise, each of which turns the clock on."""

    def __init__(self, noise: float = 0.01, base_s: dict[str, float] | None = None) -> None:
        self.now_s = 1000.0
        self.noise = noise
        self.base_s = base_s or BASE_S
        self.source = random.Random(3)
        self.turns: list[tuple[str, int, str, int, int]] = []  # workload, round, arm, seed, requests
        self.broken: Callable[[str, int], bool] = lambda arm, number: False

    def measure(
        self, engine: Any, topology: Any, workload: Workload, seed: int, number: int, *rest: Any
    ) -> Run:
        base = self.base_s[topology.name.removesuffix("-again")]
        seconds = base * math.exp(self.source.gauss(0, self.noise))
        self.turns.append((workload.name, number, topology.name, seed, workload.run_requests))
        broken = "broken" if self.broken(topology.name, number) else None
        run = made_run(topology.name, workload, number, seconds, FIXED_S, seed, broken)
        assert run.took_s is not None
        self.now_s += run.took_s
        return run

    def arms(self, workload: str, number: int) -> list[str]:
        """Of a round, in their order."""
        return [arm for name, turn, arm, *_ in self.turns if (name, turn) == (workload, number)]


@pytest.fixture
def compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Comparison, TrialPlan | None, list[str]]]:
    """Runs a comparison in so many seconds on a made lab."""

    def run(
        lab: Made,
        budget_s: float,
        kept: Sequence[str] = (*TOPOLOGIES, SINGLE_AGAIN),
        earlier: Sequence[Run] = (),
    ) -> tuple[Comparison, TrialPlan | None, list[str]]:
        monkeypatch.setattr(rounds, "measure", lab.measure)
        monkeypatch.setattr(budgeted, "replace", lambda arm, name: made_arm(name))
        said: list[str] = []
        who = entrants([made_arm(name) for name in kept], LAB)
        none: Any = None
        store = Store.create(tmp_path, f"run-{len(list(tmp_path.iterdir()))}")
        comparison, plan = run_in_time(
            none,
            who,
            WORKLOADS,
            budget_s,
            store,
            none,
            lambda _: None,
            said.extend,
            earlier,
            now=lambda: lab.now_s,
        )
        if plan is not None:
            written = json.loads((store.folder / "run.json").read_text())["trials"]
            assert written["budget_s"] == budget_s
            assert {one["workload"] for one in written["workloads"]} == {one.name for one in WORKLOADS}
        return comparison, plan, said

    return run


def test_a_round_has_the_arms_of_its_gates_and_now_and_then_the_baselines_twin() -> None:
    """What no gate compares is not measured; the noise is, in every third round from the second on."""
    who = entrants([made_arm(name) for name in (*TOPOLOGIES, SINGLE_AGAIN)], LAB)
    rounds_of_chat = [set(who.of_round("chat", number)) for number in range(5)]
    pair = {REPLICATED, DISAGGREGATED}
    assert rounds_of_chat == [pair, {*pair, REPLICATED_AGAIN}, pair, pair, {*pair, REPLICATED_AGAIN}]
    assert set(who.of_round("one-user", 1)) == {SINGLE, DISAGGREGATED, SINGLE_AGAIN}


def test_a_gate_against_the_best_measures_all_other_ways() -> None:
    """The replicas have the twin; an arm of the candidate's kind takes part as a way alone."""
    gate = LAB.gates[0].model_copy(update={"baseline": "best"})
    lab = LAB.model_copy(update={"gates": (gate,)})
    names = (*TOPOLOGIES, SINGLE_AGAIN, "sharded", "replicated@tuned")
    who = entrants([made_arm(name) for name in names], lab)
    assert set(who.needed(gate.workload)) == {*TOPOLOGIES, "sharded", "replicated@tuned"}
    assert set(who.arms) == {*who.needed(gate.workload), REPLICATED_AGAIN}
    assert set(who.of_round(gate.workload, 1)) == set(who.arms)
    own = gate.model_copy(update={"candidate": REPLICATED})
    who = entrants([made_arm(name) for name in TOPOLOGIES], LAB.model_copy(update={"gates": (own,)}))
    assert set(who.needed(gate.workload)) == set(TOPOLOGIES)


def test_one_round_shows_the_spread_within_runs_and_the_others_are_short(compare: Any) -> None:
    """The first round has the workload's own length; open loops and figures of whole runs keep theirs."""
    lab = Made(noise=0.3)
    compare(lab, 60.0)
    lengths = {(name, min(number, 1)): requests for name, number, _, _, requests in lab.turns if number >= 0}
    by_name = {one.name: one.requests for one in WORKLOADS}
    assert lengths[("one-user", 0)] == by_name["one-user"] > lengths[("one-user", 1)] == 1
    for name in set(by_name) - {"one-user"}:
        assert lengths[(name, 0)] == lengths[(name, 1)] == by_name[name]


def test_arms_that_are_left_out_stay_out() -> None:
    """Without the twin no twin of any baseline; without single none of its runs."""
    lab = LAB.model_copy(update={"gates": tuple(gate for gate in LAB.gates if gate.baseline != SINGLE)})
    who: Entrants = entrants([made_arm(name) for name in (REPLICATED, DISAGGREGATED)], lab)
    assert set(who.of_round("chat", 1)) == {REPLICATED, DISAGGREGATED}


def test_time_is_spent_and_not_overspent(compare: Any) -> None:
    """Rounds of gates that stay open go on until the next round would no longer fit."""
    lab = Made(noise=0.6, base_s=dict.fromkeys(TOPOLOGIES, 0.1))
    begun = lab.now_s
    comparison, plan, said = compare(lab, 400.0)
    warm_up = sum(run_s for run_s in [lab.now_s - begun]) - 400.0
    assert plan is not None
    assert any(share.open for share in plan.shares)
    dearest = max(share.round_s for share in plan.shares)
    assert -2.5 * dearest < warm_up < dearest + 60
    assert said[0].startswith("plan of trials:")
    assert len(comparison.runs) > PILOT_ROUNDS * len(WORKLOADS) * 3


def test_what_is_decided_gets_no_more_rounds(compare: Any) -> None:
    """With little noise all gates are decided long before the time is over, and nothing more is measured."""
    lab = Made(noise=0.002, base_s={SINGLE: 0.1, REPLICATED: 0.2, DISAGGREGATED: 0.05})
    comparison, plan, _ = compare(lab, 1_500.0)
    rows = [row for row in verdict_rows(comparison, LAB, "any time, order drawn") if row.gate.of_a_gate]
    slo = [row for row in rows if row.metric == "slo_attainment"]
    assert not [row for row in rows if row.open and row not in slo], (
        "attainment of made runs is all or nothing"
    )
    most = Counter(name for name, number, *_ in lab.turns if number >= 0)
    assert most["one-user"] < 40
    assert lab.now_s < 1000.0 + 1_500.0
    assert plan is not None


def test_without_time_the_pilot_is_all(compare: Any) -> None:
    """``--short``: two rounds of each workload, whatever the budget, and what they leave open is told."""
    lab = Made(noise=0.3)
    comparison, plan, said = compare(lab, 0.0)
    numbers = {(name, number) for name, number, *_ in lab.turns if number >= 0}
    assert numbers == {(one.name, number) for one in WORKLOADS for number in range(PILOT_ROUNDS)}
    assert "0 s are planned" in said[0]
    assert plan is not None
    assert all(share.planned == 0 for share in plan.shares)
    assert comparison.died is None


def test_arms_of_a_round_share_a_seed_and_their_order_is_drawn(compare: Any) -> None:
    """Pairs of one round have the same prompts, no two rounds have; either arm is first in some of the
    rounds that a mirrored order would make alike.
    """
    random.seed(4)
    lab = Made(noise=0.3)
    compare(lab, 200.0)
    by_round: dict[tuple[str, int], set[int]] = {}
    for name, number, _, seed, _ in lab.turns:
        if number >= 0:
            by_round.setdefault((name, number), set()).add(seed)
    assert all(len(seeds) == 1 for seeds in by_round.values())
    assert len(set.union(*by_round.values())) == len(by_round)
    even = {
        tuple(lab.arms(name, number)) for name, number in by_round if name == "one-user" and not number % 2
    }
    assert len({arms for arms in even if len(arms) == 2}) == 2, "mirrored: every second round would be alike"


def test_rounds_of_earlier_sessions_come_first(compare: Any) -> None:
    """Numbers go on where they ended; a pilot that is there already is not measured again."""
    lab = Made(noise=0.3)
    first, _, _ = compare(lab, 0.0)
    lab.turns.clear()
    second, _, _ = compare(lab, 120.0, earlier=[run for run in first.runs if run.round >= 0])
    assert min(number for _, number, *_ in lab.turns if number >= 0) == PILOT_ROUNDS
    assert len(second.runs) > len(first.runs)


def test_a_death_ends_the_rounds_and_keeps_what_was_measured(compare: Any, monkeypatch: Any) -> None:
    lab = Made()
    lab.broken = lambda arm, number: number == 1
    death = Died.__new__(Died)

    def ended(_: Any) -> None:
        raise death

    monkeypatch.setattr("selftest.experiments.made.Arm.require_alive", ended)
    comparison, plan, said = compare(lab, 500.0)
    assert comparison.died is death
    assert plan is None
    assert not said
    assert [run.round for run in comparison.runs].count(0) > 0
    assert len(comparison.invalid()) == 1


def test_a_budget_never_goes_below_nothing() -> None:
    clock = iter([10.0, 12.0, 12.0, 30.0, 30.0])
    budget = Budget(5.0, lambda: next(clock))
    assert budget.spent_s == 2.0
    assert budget.left_s == 3.0
    assert budget.left_s == 0.0

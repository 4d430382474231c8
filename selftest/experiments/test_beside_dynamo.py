"""Dynamo's arms beside the others: which workloads, which pairs, figures of dialogues, and expectations.

Oracles: dialogues of two turns whose figures can be worked out by hand, in rounds of known ratios.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.arrivals import arrivals
from disagglab.config.labs import load_lab
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import routing
from disagglab.experiments.beside_dynamo import (
    DYNAMO_KV,
    DYNAMO_ROUND_ROBIN,
    PAIRS,
    TAG,
    compared,
    one_wave,
    rows_of,
    tagged,
    untagged,
)
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.conversations import (
    CONVERSATIONS,
    E2E,
    FIGURES,
    HIT_RATE,
    THROUGHPUT,
    TTFT,
    hold,
    said,
    shared_out,
    talk_figures,
    talk_rounds,
    talk_rows,
    value,
)
from disagglab.experiments.routing import Held, Size
from disagglab.measure.talk import Spoken, Talk
from disagglab.results.gate import State
from disagglab.results.records import ClientLoad, Ledger, Run
from disagglab.serving.topology import (
    DISAGGREGATED,
    REPLICATED,
    ROUTED,
    SINGLE,
    SINGLE_AGAIN,
    TOPOLOGIES,
    Topology,
)
from disagglab.stats.verdict import judge
from tests.dynamo.expectation import (
    CONFIRMED,
    HITS,
    OPEN,
    REFUTED,
    Expectation,
    expectation_rows,
    hits_and_misses,
    standing,
)

LAB = load_lab("embedded")
SIZE = Size(conversations=3, turns=2, output_tokens=4, blocks=65)
NOISE = (1.0, 1.02, 0.99)
NONE: Any = None


def spoken(
    turn: int, prompt: int = 96, cached: int = 0, time_s: float = 1.0, conversation: int = 0
) -> Spoken:
    """An answer of four tokens whose E2E is twice its TTFT."""
    return Spoken(
        text="", token_ids=(), top2_gap=(), prompt_tokens=prompt, output_tokens=4, ttft_s=time_s,
        e2e_s=2 * time_s, gaps_s=(), cached_tokens=cached, conversation=conversation, turn=turn, start_s=0.0,
    )  # fmt: skip


def arm(name: str, *turns: Spoken, client: ClientLoad | None = None) -> Held:
    """Turns that together lasted as long as their E2E, all answered by server a."""
    talk = Talk(turns, (), sum(turn.e2e_s for turn in turns), client)
    cached = sum(turn.cached_tokens or 0 for turn in turns)
    asked = sum(turn.prompt_tokens for turn in turns)
    return Held(name, talk, {"a": len(turns), "b": 0}, {"a": cached}, {"a": asked})


def rounds(name: str, time_s: float, cached: int = 32) -> list[Held]:
    """Three rounds of a dialogue of two turns, a little different from each other."""
    return [arm(name, spoken(0, time_s=time_s * n), spoken(1, 192, cached, time_s * n)) for n in NOISE]


def moved(transfers: int) -> Ledger:
    """A ledger of which only the transfers matter."""
    return Ledger({}, {}, {}, 0, transfers, 0.01 * transfers, 0, 0, 0, 0, 0, 0)


def run(name: str, workload: Workload, number: int, seconds: float) -> Run:
    """A run in which every request took as long."""
    requests = arrivals(workload, 1)
    count = len(requests)
    return Run(
        name, workload, 1, number, "vllm bench serve", count * seconds, None,
        ttft_s=(seconds,) * count, e2e_s=(2 * seconds,) * count, itl_s=((seconds / 10,) * 60,) * count,
        prompt_tokens=tuple(one.prompt_tokens for one in requests),
        output_tokens=tuple(one.output_tokens for one in requests),
        start_s=tuple(one.arrival_s for one in requests), streams=tuple(one.stream for one in requests),
        ledger=moved(count) if name.startswith(DISAGGREGATED) else None,
    )  # fmt: skip


def test_workloads_that_do_not_fit_the_engines_are_left_out() -> None:
    small = LAB.model_copy(update={"model": LAB.model.model_copy(update={"max_model_len": 600})})
    kept = {gate.workload for gate in compared(LAB, small, short=False).gates}
    assert kept == {"one-user", "chat"}, "the others have prompts of 1024 tokens"
    assert compared(LAB, LAB, short=False).gates == LAB.gates


def test_gates_of_ways_are_not_for_these_engines() -> None:
    """Neither against the best of all ways nor of a candidate with other options."""
    best = LAB.gates[0].model_copy(update={"baseline": "best"})
    tuned = LAB.gates[0].model_copy(update={"candidate": "disaggregated@tuned"})
    lab = LAB.model_copy(update={"gates": (best, tuned, *LAB.gates[1:])})
    assert compared(lab, lab, short=False).gates == LAB.gates[1:]


def test_the_short_form_keeps_one_workload_of_several_users() -> None:
    assert {gate.workload for gate in compared(LAB, LAB, short=True).gates} == {"chat"}
    chat = LAB.workload("chat")
    assert one_wave(chat).requests == chat.concurrency
    assert one_wave(chat).definition != chat.definition, "its figures are not compared with the full form's"


def test_names_tell_these_arms_from_those_of_the_lab() -> None:
    assert [tagged(name) for name in (*TOPOLOGIES, SINGLE_AGAIN)] == [
        name + TAG for name in (*TOPOLOGIES, SINGLE_AGAIN)
    ]
    assert [tagged(name) for name in (DYNAMO_KV, HITS, "limit")] == [DYNAMO_KV, HITS, "limit"]
    names = (*TOPOLOGIES, SINGLE_AGAIN, DYNAMO_KV)
    assert [untagged(tagged(name)) for name in names] == list(names)
    assert untagged("single@0.30.0") == "single@0.30.0", "of another release, not beside Dynamo"


def test_every_pair_of_arms_has_one_row() -> None:
    lab = compared(LAB, LAB, short=True)
    speed = {REPLICATED: 1.0, DYNAMO_ROUND_ROBIN: 1.25, DYNAMO_KV: 1.0}
    names = (*TOPOLOGIES, SINGLE_AGAIN, DYNAMO_ROUND_ROBIN, DYNAMO_KV)
    runs = [
        run(tagged(name), LAB.workload("chat"), number, speed.get(name, 1.0))
        for name in names
        for number in range(3)
    ]
    rows = rows_of(Comparison(runs, LAB.slo), lab)
    assert [(row.baseline, row.candidate) for row in rows] == [
        (tagged(REPLICATED), tagged(DISAGGREGATED)),
        (tagged(SINGLE), tagged(SINGLE_AGAIN)),
        *((tagged(left), tagged(right)) for left, right in PAIRS[:3]),
    ], "the gate of chat has the fourth pair"
    loss, _, win = rows[2:]
    assert loss.outcome == "worse", "a loss is a verdict too"
    assert loss.effect == pytest.approx(1 / 1.25 - 1)
    assert win.outcome == "better"
    assert win.effect == pytest.approx(0.25)
    assert all(row.gate.state is State.BESIDE for row in rows[2:])


def test_figures_of_a_dialogue() -> None:
    one = arm("x", spoken(0, 99, 0, 1.0), spoken(1, 200, 64, 3.0))
    assert value(one, HIT_RATE) == pytest.approx(64.5 / 300)
    assert value(one, TTFT) == 2.0
    assert value(one, E2E) == 4.0
    assert value(one, THROUGHPUT) == 8 / 8.0
    with pytest.raises(InvalidRun, match="no turn was answered"):
        value(arm("x"), TTFT)


def test_dialogues_are_judged_by_pairs_of_rounds() -> None:
    told = {
        tagged(REPLICATED): rounds(tagged(REPLICATED), 1.0),
        DYNAMO_ROUND_ROBIN: rounds(DYNAMO_ROUND_ROBIN, 1.0),
        DYNAMO_KV: rounds(DYNAMO_KV, 0.5, cached=96),
    }
    rows = talk_rows(told)
    assert len(rows) == 3 * len(FIGURES), "disaggregated was not measured"
    assert {row.workload for row in rows} == {CONVERSATIONS}
    found = {(row.metric, row.baseline): row for row in rows if row.candidate == DYNAMO_KV}
    assert found[TTFT, DYNAMO_ROUND_ROBIN].effect == pytest.approx(-0.5)
    assert found[TTFT, DYNAMO_ROUND_ROBIN].outcome == "better"
    assert found[HIT_RATE, tagged(REPLICATED)].effect == pytest.approx(96.5 / 32.5 - 1)
    assert all(row.p_adjusted is not None and row.noise_floor is None for row in rows)
    again = {tagged(SINGLE): rounds("s", 1.0), tagged(SINGLE_AGAIN): rounds("t", 1.0)}
    identical = [row for row in talk_rows({**told, **again}) if row.gate.state is State.IDENTICAL]
    assert [(row.baseline, row.candidate) for row in identical] == [
        (tagged(SINGLE), tagged(SINGLE_AGAIN))
    ] * len(FIGURES)
    assert all((row.noise_floor, row.floor_note) == (None, "every pair equal") for row in identical)


def test_figures_of_dialogues_for_the_history() -> None:
    rows = talk_figures({DYNAMO_KV: rounds(DYNAMO_KV, 1.0), "unmeasured": []}, SIZE)
    assert [(row.arm, row.metric) for row in rows] == [(DYNAMO_KV, figure) for figure in FIGURES]
    assert all(len(row.values) == 3 and row.definition == "3-2-4-65" for row in rows)


def test_rounds_of_dialogues_are_mirrored_and_never_share_a_beginning() -> None:
    arms: list[Any] = [SimpleNamespace(name=name, cycle=2) for name in ("x", "y", "z")]
    heard = []

    def told(topology: Any, dialogue: Any) -> Held:
        heard.append((topology.name, dialogue))
        return arm(topology.name, spoken(0))

    found = talk_rounds(arms, 2, SIZE, told, lambda _: None)
    assert [name for name, _ in heard] == [*"xyz", *"xyz", *"zyx"]
    assert {name: len(made) for name, made in found.items()} == {"x": 2, "y": 2, "z": 2}
    first, second = heard[3:6], heard[6:]
    assert len({dialogue.order for _, dialogue in first}) == 1
    assert len({dialogue.order for _, dialogue in second}) == 1
    beginnings = [dialogue.systems[0][:12] for _, dialogue in heard]
    assert len(set(beginnings)) == len(beginnings)
    assert len({len(said(SIZE, 1).systems[0]) for _ in range(5)}) == 1, "prompts are equally long"


def test_a_failed_request_leaves_no_figure_of_any_arm() -> None:
    arms: list[Any] = [SimpleNamespace(name=name, cycle=1) for name in ("x", "y")]

    def told(topology: Any, dialogue: Any) -> Held:
        if topology.name == "y":
            raise InvalidRun("y: failed requests: expected 0 of 6, got 1")
        return arm(topology.name, spoken(0))

    with pytest.raises(InvalidRun, match="failed requests"):
        talk_rounds(arms, 1, SIZE, told, lambda _: None)


@pytest.mark.parametrize(
    ("kind", "shares", "busy", "wrong"),
    [
        (REPLICATED, (3, 2), 0.1, ""),
        (REPLICATED, (4, 2), 0.1, "round robin did not alternate"),
        (ROUTED, (6, 0), 0.1, ""),
        (ROUTED, (3, 3), 0.95, "the client was busy 95%"),
    ],
)
def test_a_dialogue_that_was_not_as_it_claims_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, shares: tuple[int, int], busy: float, wrong: str
) -> None:
    servers: Any = (SimpleNamespace(name="a"), SimpleNamespace(name="b"))
    topology = Topology("x", kind, "0.31.0", NONE, servers)
    made = arm("x", spoken(0), client=ClientLoad(busy, 0.0, 0.0))
    made = dataclasses.replace(made, requests=dict(zip("ab", shares, strict=True)))
    monkeypatch.setattr(routing, "run_arm", lambda *args, **kwargs: made)
    if not wrong:
        assert hold(topology, said(SIZE, 1), NONE, 2) is made
        return
    with pytest.raises(InvalidRun, match=wrong):
        hold(topology, said(SIZE, 1), NONE, 2)


def book(cached: int, prefill_computed: int) -> Ledger:
    """What disaggregated servers counted of it."""
    return Ledger({}, {}, {}, 0, 0, 0.0, 0, 0, 0, 0, cached, prefill_computed)


def test_what_caches_held_is_shared_out_in_whole_blocks() -> None:
    turns = [spoken(0, 96), spoken(1, 100)]
    sent = shared_out(turns, book(cached=96, prefill_computed=196 - 64), 32)
    assert [one.held_by_decode for one in sent] == [64, 32], "the last token is always computed"
    assert [one.held_by_prefill for one in sent] == [64, 0]
    with pytest.raises(InvalidRun, match="not whole blocks of 32"):
        shared_out(turns, book(cached=50, prefill_computed=196), 32)
    with pytest.raises(InvalidRun, match="not whole blocks of 32"):
        shared_out(turns, book(cached=192, prefill_computed=196), 32)


@pytest.mark.parametrize(
    ("ratios", "low", "high", "found"),
    [
        ((1.49, 1.50, 1.51), 0.40, 0.60, CONFIRMED),
        ((1.00, 1.01, 0.99), 0.40, 0.60, REFUTED),
        ((1.30, 1.50, 1.45), 0.40, 0.60, OPEN),
        ((0.66, 0.67, 0.665), -1 / 3, -1 / 3, CONFIRMED),
        ((0.60, 0.74, 0.66), -1 / 3, -1 / 3, OPEN),
        ((0.80, 0.81, 0.805), -1 / 3, -1 / 3, REFUTED),
        ((0.70, 0.71, 0.69), -0.4, -0.3, OPEN),
        ((1.50,), 0.40, 0.60, OPEN),
    ],
)
def test_an_expectation_stands_by_the_interval(
    ratios: tuple[float, ...], low: float, high: float, found: str
) -> None:
    one = Expectation("it", E2E, "x", "y", low, high)
    assert standing(one, judge([(1.0, ratio) for ratio in ratios], "lower", 0.05)) == found


def test_every_expectation_that_was_measured_has_a_row() -> None:
    told = {
        tagged(SINGLE): rounds("s", 1.0),
        DYNAMO_ROUND_ROBIN: rounds(DYNAMO_ROUND_ROBIN, 1.0),
        DYNAMO_KV: rounds(DYNAMO_KV, 0.7, cached=216),
    }
    rows = expectation_rows(told)
    found = {(row.metric, row.candidate, row.baseline): row for row in rows}
    assert set(found) == {
        (THROUGHPUT, DYNAMO_KV, DYNAMO_ROUND_ROBIN),
        (E2E, DYNAMO_KV, DYNAMO_ROUND_ROBIN),
        (E2E, DYNAMO_KV, tagged(SINGLE)),
        (HIT_RATE, DYNAMO_KV, "limit"),
        (E2E, HITS, "turns that did not"),
    }
    assert str(found[THROUGHPUT, DYNAMO_KV, DYNAMO_ROUND_ROBIN].gate) == "expected +40% to +60%: confirmed"
    assert str(found[E2E, DYNAMO_KV, tagged(SINGLE)].gate) == "expected -28% to -18%: refuted"
    assert str(found[HIT_RATE, DYNAMO_KV, "limit"].gate) == "expected -7% to +13%: confirmed"
    assert "150 ms of one node" in found[E2E, DYNAMO_KV, tagged(SINGLE)].reason


def test_hits_and_misses_are_compared_at_equal_turn() -> None:
    def one(name: str, cached: int, time_s: float) -> Held:
        return arm(name, spoken(0, time_s=9.0), spoken(1, 192, cached, time_s), spoken(2, 288, 192, 7.0))

    told = {DYNAMO_ROUND_ROBIN: [one("r", 64, 3.0)], DYNAMO_KV: [one("k", 96, 2.0)]}
    (pair,) = hits_and_misses(told, TTFT)
    assert pair == pytest.approx((3.0, 2.0)), "turn 2 has no miss"
    (pair,) = hits_and_misses(told, E2E)
    assert pair == pytest.approx((6.0, 4.0))
    both_hit = {DYNAMO_ROUND_ROBIN: [one("r", 96, 3.0)], DYNAMO_KV: [one("k", 96, 2.0)]}
    assert hits_and_misses(both_hit) == []

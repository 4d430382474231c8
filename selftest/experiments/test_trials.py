"""The plan of trials on made-up runs: arms, lengths, rounds, and what it says beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import GateSection
from disagglab.config.workload import Workload
from disagglab.experiments import trials
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.match import match_of
from disagglab.experiments.pair_spread import PairSpread, pair_spread
from disagglab.experiments.run_length import lengths
from disagglab.experiments.trials import (
    Outlook,
    Share,
    TrialPlan,
    arms_needed,
    outlook,
    plan,
    rounds_to_decide,
    twin_needed,
    with_outlook,
)
from disagglab.experiments.verdicts import verdict_rows
from disagglab.results.gate import State
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE
from disagglab.stats.rule import multiplier
from selftest.experiments.made import made_run

LAB = load_lab("embedded")
CHAT, ONE_USER = LAB.workload("chat"), LAB.workload("one-user")
TTFT = next(gate for gate in LAB.gates if gate.metric == "ttft_p50")
TOKENS = next(gate for gate in LAB.gates if gate.metric == "output_tokens_per_s")
ONLY_TTFT = LAB.model_copy(update={"gates": (TTFT,)})


def compared(
    workload: Workload, baseline: Sequence[float], candidate: Sequence[float], left: str = SINGLE
) -> Comparison:
    """Rounds in which the two arms took these times."""
    runs = []
    for number, (a, b) in enumerate(zip(baseline, candidate, strict=True)):
        runs += [made_run(left, workload, number, a), made_run(DISAGGREGATED, workload, number, b)]
    return Comparison(runs, LAB.slo)


def test_a_round_holds_the_arms_that_its_gates_compare() -> None:
    """Baselines, candidate, ways; a limit needs the candidate alone, and has no twin."""
    limit = next(gate for gate in LAB.gates if gate.limit is not None)
    assert arms_needed([TTFT, limit]) == (SINGLE, DISAGGREGATED)
    assert arms_needed([limit]) == (DISAGGREGATED,)
    assert arms_needed([TOKENS], ["disaggregated@tcp"]) == (REPLICATED, DISAGGREGATED, "disaggregated@tcp")
    assert twin_needed([limit]) is None
    assert twin_needed([limit, TOKENS]) == "replicated-again"


def test_a_round_against_the_best_holds_all_other_ways() -> None:
    """Of the session's arms those of other kinds, and the candidate, which need not be the lab's own."""
    best = TTFT.model_copy(update={"baseline": "best", "candidate": "disaggregated@tuned"})
    session = (SINGLE, REPLICATED, DISAGGREGATED, "sharded", "disaggregated@tuned", "replicated-again")
    others = (SINGLE, REPLICATED, "sharded")
    assert arms_needed([best], (), session) == (*others, "disaggregated@tuned")
    assert arms_needed([TTFT, best], (), session) == (*others, DISAGGREGATED, "disaggregated@tuned")
    assert twin_needed([best], session) == "replicated-again"
    assert twin_needed([best], [SINGLE, DISAGGREGATED]) == "single-again"


def test_the_needed_rounds_against_the_best() -> None:
    """To be better takes what the closest baseline takes alone, the others being far; to be worse than one
    takes more than alone, because any of three could have shown it.
    """
    gate = TTFT.model_copy(update={"want": "better"})
    far = (-3.0, 0.05)
    alone, best = (
        rounds_to_decide(gate, known, 2, "any time") for known in ([(-0.1, 0.05)], [far, (-0.1, 0.05), far])
    )
    assert alone == best
    lost, lost_to_one = (
        rounds_to_decide(gate, known, 2, "any time") for known in ([(0.1, 0.05)], [far, (0.1, 0.05), far])
    )
    assert lost is not None
    assert lost_to_one is not None
    assert lost_to_one > lost
    close = rounds_to_decide(gate, [(-0.1, 0.05), (0.0, 0.02)], 2, "any time")
    equal = rounds_to_decide(gate, [(0.0, 0.02)], 2, "any time")
    assert close is not None
    assert equal is not None
    assert close > equal, "equivalent to the best, with both limits wider"


def test_runs_keep_what_they_measure() -> None:
    """Only a closed loop whose gates are medians over requests has other lengths; concurrency stays held."""
    assert lengths(ONE_USER, [TTFT]) == [1, 2, 3, 4, 8]
    assert lengths(CHAT, [TOKENS]) == [CHAT.requests], "tokens/s holds beginning and end of a run"
    of_chat = TTFT.model_copy(update={"workload": "chat"})
    assert CHAT.concurrency is not None
    assert min(lengths(CHAT, [of_chat])) == 2 * CHAT.concurrency
    loop = LAB.workload("long-prompts-into-steady-decode")
    assert lengths(loop, [TTFT]) == [loop.requests], "an open loop is what it is by how long it lasts"
    tail = TTFT.model_copy(update={"metric": "itl_p99"})
    assert lengths(ONE_USER, [tail]) == [ONE_USER.requests]


@pytest.mark.parametrize(
    ("mean", "sd", "want"), [(0.5, 0.05, "better"), (0.0, 0.01, "better"), (-0.3, 0.2, "not worse")]
)
def test_the_needed_rounds_are_the_first_that_decide(mean: float, sd: float, want: str) -> None:
    """At that many the interval excludes no difference or lies within the margin, at one less it does not."""
    gate = TTFT.model_copy(update={"want": want})
    needed = rounds_to_decide(gate, [(mean, sd)], 2, "any time")
    assert needed is not None

    def half(rounds: int) -> float:
        return multiplier(rounds, 0.05, "any time") * sd / math.sqrt(rounds)

    def decides(rounds: int) -> bool:
        bound = math.log1p(gate.margin)
        met = want == "not worse" and mean + half(rounds) <= bound
        return met or half(rounds) < abs(mean) or abs(mean) + half(rounds) <= bound

    assert decides(needed)
    assert not decides(needed - 1)


def test_an_effect_at_the_margin_is_not_foreseen() -> None:
    """Neither excluded nor within it, whatever the rounds; the direction does not matter."""
    gate = TTFT.model_copy(update={"want": "better"})
    for mean in (0.0001, -0.0001):
        assert rounds_to_decide(gate, [(mean, 5.0)], 3, "any time") is None


def test_time_goes_first_to_what_is_decided_soonest() -> None:
    """The workload that needs 30 s is served before the one that needs 300, which gets what is left."""

    def share(
        workload: Workload, gate: GateSection, round_s: float, needed: int | None, is_open: bool = True
    ) -> Share:
        return Share(
            workload, (SINGLE,), round_s, 2, 0, (Outlook(gate, "any time", 2, 0.1, is_open, needed),)
        )

    soon, late = share(ONE_USER, TTFT, 5.0, 8), share(CHAT, TOKENS, 10.0, 32)
    assert [one.planned for one in trials.divided([late, soon], 100.0)] == [7, 6]
    assert [one.planned for one in trials.divided([late, soon], 20.0)] == [0, 4]
    assert [one.planned for one in trials.divided([late, soon], 0.0)] == [0, 0]
    decided = share(ONE_USER, TTFT, 5.0, 2, is_open=False)
    assert [one.planned for one in trials.divided([decided, late], 100.0)] == [0, 10]
    unforeseen = share(CHAT, TOKENS, 10.0, None)
    assert [one.planned for one in trials.divided([decided, unforeseen], 100.0)] == [0, 10]
    assert [one.planned for one in trials.divided([decided], 100.0)] == [0], (
        "time that nothing needs is not spent"
    )


def test_workloads_take_turns() -> None:
    """The one that has made the smaller part of its rounds is next, so all are spread over the session."""

    def share(workload: Workload, done: int, planned: int) -> Share:
        return Share(workload, (SINGLE,), 1.0, done, planned, ())

    following = TrialPlan(100, 50, (share(CHAT, 2, 8), share(ONE_USER, 3, 3))).following()
    assert following is not None
    assert following.workload == CHAT
    assert TrialPlan(100, 50, (share(CHAT, 2, 0),)).following() is None


def test_the_plan_says_beforehand_what_it_will_decide() -> None:
    """Arms, requests, rounds and seconds of each workload; interval and smallest difference of each gate."""
    found = compared(ONE_USER, [1.0, 1.1, 1.05], [1.2, 1.25, 1.3])
    made = plan(found, ONLY_TTFT, [ONE_USER], {ONE_USER.name: (SINGLE, DISAGGREGATED)}, 120.0, 60.0)
    (share,) = made.shares
    (one,) = share.outlooks
    assert one.open
    assert share.done == 3
    assert 0 < share.planned * share.round_s <= 60.0
    rounds = share.done + share.planned
    wide, least = one.half_width(rounds), one.detectable(rounds)
    assert wide is not None
    assert least is not None
    assert wide < least
    lines = made.lines()
    assert lines[0].startswith("plan of trials: 60 of 120 s are left")
    assert f"{share.done} + {share.planned}" in "\n".join(lines)
    assert made.as_json()["workloads"][0]["gates"][0]["half_width"] == wide  # type: ignore[index]


def test_a_workload_that_broke_gets_no_rounds() -> None:
    """An arm without one valid run: whatever broke it would break its next run, too."""
    found = compared(ONE_USER, [1.0, 1.0], [1.2, 1.3])
    assert not plan(found, ONLY_TTFT, [ONE_USER], {ONE_USER.name: (REPLICATED, DISAGGREGATED)}, 60, 60).shares


def test_the_planner_does_not_see_who_is_ahead() -> None:
    """Turning all ratios round changes nothing of the plan of a gate that wants a difference."""
    gate = TTFT.model_copy(update={"want": "better"})
    lab = LAB.model_copy(update={"gates": (gate,)})
    arms = {ONE_USER.name: (SINGLE, DISAGGREGATED)}
    times = ([1.0, 1.1, 1.05, 1.0], [1.02, 1.15, 1.06, 1.03])
    there, back = (
        plan(compared(ONE_USER, *each), lab, [ONE_USER], arms, 90, 90) for each in (times, times[::-1])
    )
    ours, theirs = (one.shares[0] for one in (there, back))
    assert ours.outlooks[0].needed == theirs.outlooks[0].needed
    assert ours.planned == pytest.approx(theirs.planned, abs=1)


def test_few_pairs_take_the_spread_of_all_arms() -> None:
    """Two pairs that happen to agree do not make a lab without noise."""
    runs = []
    for arm, times in ((SINGLE, (1.0, 1.2)), (DISAGGREGATED, (1.1, 1.32)), ("single-again", (1.2, 1.0))):
        runs += [made_run(arm, ONE_USER, number, seconds) for number, seconds in enumerate(times)]
    comparison = Comparison(runs, LAB.slo)
    arms = [SINGLE, DISAGGREGATED, "single-again"]
    found = pair_spread(comparison, match_of(comparison, TTFT), SINGLE, arms)
    assert found is not None
    assert found.sd > 0.1
    assert found.freedom == 2
    assert found.careful("fixed-n") > 1.5 * found.sd, "two degrees of freedom may be far off"
    assert PairSpread(0.1, 9, 1.4).careful("any time") == pytest.approx(
        1.4 * PairSpread(0.1, 9, 1.4).careful("any time, order drawn")
    )


def test_an_open_gate_says_how_long_it_would_take() -> None:
    """In place of "underpowered"; a gate that is met says nothing."""
    found = compared(ONE_USER, [1.0, 1.1, 1.05, 0.95], [1.2, 1.0, 1.3, 1.05])
    arms = {ONE_USER.name: (SINGLE, DISAGGREGATED)}
    rows = verdict_rows(found, ONLY_TTFT, "any time")
    made = plan(found, ONLY_TTFT, [ONE_USER], arms, 0, 0)
    (row,) = with_outlook(rows, made)
    assert row.open
    assert row.gate.state is State.NOT_MET
    assert row.gate.minutes is not None
    assert f"needs about {row.gate.minutes} min more" in row.standing
    clear = compared(ONE_USER, [2.0, 2.1, 2.05, 2.0, 2.1], [1.0, 1.05, 1.02, 1.0, 1.05])
    (met,) = with_outlook(
        verdict_rows(clear, ONLY_TTFT, "any time"), plan(clear, ONLY_TTFT, [ONE_USER], arms, 0, 0)
    )
    assert (met.gate.state, met.gate.minutes) == (State.MET, None)


def test_an_outlook_without_a_spread_knows_nothing() -> None:
    """One round: no interval is expected, no number of rounds foreseen."""
    found = outlook(compared(ONE_USER, [1.0], [1.1]), TTFT, [SINGLE, DISAGGREGATED], is_open=True)
    assert (found.pair_sd, found.needed, found.half_width(9), found.detectable(9)) == (None, None, None, None)

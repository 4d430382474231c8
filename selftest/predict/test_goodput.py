"""Goodput under an objective: each request of a replay, limits, and which points are chosen.

Oracles: requests worked out by hand from round speeds; the means that the same replay gives; the definition
in disagglab/stats/metric.py; and a made cluster in which one arm must win.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest

from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.predict import breakeven, goodput, simulation
from disagglab.predict.breakeven import Cluster, Point, Prefill, Speeds, Step, at_load
from disagglab.predict.breakeven_points import Budget
from disagglab.predict.goodput import Arms, GoodputForecast
from disagglab.predict.simulation import Served
from disagglab.results import metrics
from disagglab.results.records import Run

LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)  # 1,000 B a token
VERSION = "0.31.0"
ROUND = Speeds(  # 400 tokens: 0.1 + 0.4 s; 400,000 B: 0.2 s; a step: 0.1 s and 0.01 s a sequence
    Prefill(0.1, 0.001), Step(0.1, 0.01), link_bytes_per_s=2e6, request_s=0.03, handoff_s=0.02
)
CLUSTER = Cluster(ROUND, LAYOUT, VERSION, step_tokens=0)
# Of the size of one large GPU: 0.1 s for 4,096 tokens, a step of 5 ms that hardly notices its batch.
FAST = Cluster(
    Speeds(Prefill(0.001, 2.4e-5), Step(0.005, 1e-5), 1e10, 0.002, 0.01, 0.01), LAYOUT, VERSION, 8192
)
BOTH = SloSection(ttft_s=0.5, tpot_s=0.01)
SEEDS = range(4)


def served(ttft: tuple[float, ...], tpot: tuple[float, ...], duration_s: float = 10.0) -> Served:
    """A run of requests of 11 tokens."""
    e2e = tuple(first + 10 * each for first, each in zip(ttft, tpot, strict=True))
    return Served(ttft, tpot, e2e, duration_s)


def forecast(prompt: int, output: int, load: float, slo: SloSection = BOTH) -> GoodputForecast:
    """A point of the fast cluster."""
    point = at_load(FAST, prompt, output, load).point
    return goodput.forecast(FAST, point, load, slo, 6.0, SEEDS)


def test_each_request_of_a_replica_by_hand() -> None:
    """A second prompt stops the first request's decode: its TPOT is 0.31 s, that of the other 0.11 s.

    Worked out in test_breakeven.py: three tokens each; the first has its token at 0.5 s, a step
    until 0.61 s, and its last at 1.12 s with the second prompt. That one came at 0.55 s and ends at 1.34 s.
    The request of the other replica is alone.
    """
    found = simulation.by_replicas(CLUSTER, Point(400, 3, 0.0), [0.0, 0.01, 0.55])
    assert found.ttft_s == pytest.approx((0.53, 0.53, 0.60))
    assert found.tpot_s == pytest.approx((0.31, 0.11, 0.11))
    assert found.e2e_s == pytest.approx((1.15, 0.75, 0.82))
    assert found.duration_s == pytest.approx(0.03 + 1.34)


def test_each_request_of_prefill_and_decode_by_hand() -> None:
    """The second prompt queues 0.4 s and stops nobody: no TPOT above that of two sequences.

    Prefill ends at 0.5 and 1.0 s; hand-over takes 0.02 s, a transfer 0.2 s. The first has its tokens at 0.83,
    0.94 and 1.05 s. In that last step the second is handed over, so its transfer begins at 1.05 s.
    """
    found = simulation.by_prefill_and_decode(CLUSTER, Point(400, 3, 0.0), [0.0, 0.1])
    assert found.ttft_s == pytest.approx((0.86, 0.03 + 1.36 - 0.1))
    assert found.tpot_s == pytest.approx((0.11, 0.11))
    assert found.duration_s == pytest.approx(0.03 + 1.58)


@pytest.mark.parametrize(("prompt", "output"), [(1024, 2), (4096, 64), (512, 256)])
def test_requests_have_the_means_of_the_run(prompt: int, output: int) -> None:
    """Means are over the requests, in the order of arrivals whatever that is; E2E is TTFT and the tokens."""
    point = at_load(FAST, prompt, output, 0.4).point
    times = [0.9, 0.0, 0.3, 0.31, 0.32, 1.4]
    for requests, means in (
        (simulation.by_replicas, simulation.replicated),
        (simulation.by_prefill_and_decode, simulation.disaggregated),
    ):
        each, mean = requests(FAST, point, times), means(FAST, point, times)
        assert statistics.fmean(each.ttft_s) == pytest.approx(mean.ttft_s)
        assert statistics.fmean(each.tpot_s) == pytest.approx(mean.tpot_s)
        assert statistics.fmean(each.e2e_s) == pytest.approx(mean.e2e_s)
        for ttft, tpot, e2e in zip(each.ttft_s, each.tpot_s, each.e2e_s, strict=True):
            assert ttft + (output - 1) * tpot == pytest.approx(e2e)
        ends = [at + e2e for at, e2e in zip(times, each.e2e_s, strict=True)]
        assert each.duration_s == pytest.approx(max(ends))


def test_steps_taken_at_once_are_steps() -> None:
    """Many steps in one go are cut where a request comes: it is taken up at the end of the step under way."""
    point = Point(400, 8, 0.0)
    alone = simulation.by_replicas(CLUSTER, point, [0.0])
    assert alone.e2e_s == pytest.approx((0.03 + 0.5 + 7 * 0.11,))
    cut = simulation.by_replicas(
        CLUSTER, point, [0.0, 0.0, 0.75]
    )  # steps end at 0.61, 0.72, 0.83: taken up there
    assert cut.ttft_s[2] == pytest.approx(0.03 + 0.83 + 0.51 - 0.75)
    assert cut.tpot_s[0] == pytest.approx((0.83 + 0.51 - 0.5 + 3 * 0.12) / 7)


def test_good_requests_by_hand() -> None:
    """Both limits hold, at the limit too; per second of the run; of none good a comparable figure remains."""
    run = served((0.5, 0.4, 0.6, 0.1), (0.01, 0.02, 0.001, 0.002), duration_s=4.0)
    found = goodput.goodput(run, BOTH)
    assert (found.good, found.sent, found.attainment, found.per_s) == (2, 4, 0.5, 0.5)
    assert found.comparable_per_s == pytest.approx(2.5 / 5 * 4 / 4.0)
    assert goodput.goodput(run, BOTH, slack=1.1).good == 1
    assert goodput.goodput(run, BOTH, slack=0.5).good == 4
    none = goodput.goodput(run, SloSection(ttft_s=0.01, tpot_s=0.01))
    assert none.per_s == 0.0
    assert none.comparable_per_s == pytest.approx(0.5 / 5)


def test_a_measured_run_is_counted_as_its_figures_say() -> None:
    """The requests of a run have the attainment and the goodput that figures() gives it."""
    asked = Workload(name="x", prompt_tokens=64, output_tokens=6, requests=3, rate_per_s=1.0)
    run = Run(
        "replicated", asked, 0, 0, "", 2.0, None,
        ttft_s=(0.3, 0.6, 0.2), e2e_s=(0.34, 0.62, 0.4), itl_s=((0.008,) * 5, (0.004,) * 5, (0.04,) * 5),
        prompt_tokens=(64,) * 3, output_tokens=(6,) * 3, start_s=(0.0, 0.4, 0.8), streams=("main",) * 3,
    )  # fmt: skip
    found, known = goodput.goodput(goodput.seen(run), BOTH), metrics.figures(run, BOTH)
    assert found.good == 1
    assert (found.attainment, found.per_s) == (known["slo_attainment"], known["goodput_per_s"])


def test_arms_are_judged_by_good_requests() -> None:
    """Twice the good requests in every round is better by the interval; the loser may have none at all."""
    good, half, bad = (served((0.1,) * 10, (0.001,) * k + (0.1,) * (10 - k)) for k in (10, 5, 0))
    twice = Arms((half, half, half), (good, good, good)).verdict(BOTH)
    assert twice.outcome == "better"
    assert twice.effect == pytest.approx(10.5 / 5.5 - 1)
    assert Arms((good, good), (bad, bad)).verdict(BOTH).outcome == "worse"
    assert Arms((good, good), (good, good)).verdict(BOTH).outcome == "equivalent"
    assert Arms((half, half), (good, good)).attainment(BOTH) == (0.5, 1.0)
    assert Arms((half, half), (good, good)).per_s(BOTH) == (0.5, 1.0)


def test_slack_turns_both_arms_against_each_other() -> None:
    """At 10 % from the limit a lead is lost with a slack of 1.15, and doubled by its inverse."""
    near = served((0.1,) * 10, (0.009,) * 10)
    arms = Arms((near, near), (near, near))
    assert arms.verdict(BOTH).outcome == "equivalent"
    assert arms.verdict(BOTH, 1.15).outcome == "worse"
    assert arms.verdict(BOTH, 1 / 1.15).outcome == "better"


def test_a_tpot_limit_between_the_two_decides() -> None:
    """Long prompts stop a replica's decode: there is a limit that only the decode node keeps.

    Above all TPOT both keep it, below all neither: the ratio is that of the times they take.
    """
    found = forecast(4096, 64, 0.35)
    low, *_, high = found.arms.tpot_limits()
    ratios = found.arms.ratios([SloSection(ttft_s=5.0, tpot_s=limit) for limit in (low, 0.0065, high)])
    assert ratios[1] > 1.5
    assert ratios[0] == pytest.approx(ratios[2])
    assert 0.8 < ratios[2] < 1.1
    slos = [SloSection(ttft_s=5.0, tpot_s=limit) for limit in found.arms.tpot_limits()]
    for arm in (0, 1):
        shares = [found.arms.attainment(slo)[arm] for slo in slos]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_the_same_seeds_give_the_same_forecast() -> None:
    """Arrivals are those that the load would draw; other seeds give others."""
    point = at_load(FAST, 4096, 64, 0.4).point
    one, same, other = (goodput.forecast(FAST, point, 0.4, BOTH, 6.0, s) for s in ([1, 2], [1, 2], [3, 4]))
    assert one.arms == same.arms != other.arms
    assert len(one.arms.replicated[0].ttft_s) == one.workload.requests == math.ceil(6.0 * point.rate_per_s)


def searched(cluster: Cluster, slo: SloSection, budget: Budget, least: int = 20) -> list[GoodputForecast]:
    """A small search."""
    found = goodput.forecasts(
        cluster, slo, [1024, 2048, 4096], [16, 64], [0.3, 0.4, 0.6], budget, least, SEEDS
    )
    return list(found)


BUDGET = Budget(6.0, 4.0, 16_384)


def test_search_finds_the_win_and_the_loss() -> None:
    """Where a TPOT limit lies between the two it is a win; where prefill falls behind, a loss."""
    found = searched(FAST, BOTH, BUDGET)
    win = goodput.clearest_win(found)
    loss = goodput.clearest_loss(searched(FAST, SloSection(ttft_s=0.5, tpot_s=0.05), BUDGET))
    assert win is not None
    assert loss is not None
    assert win.verdict.low > 0
    assert win.arms.attainment(win.slo)[1] >= 0.9 > win.arms.attainment(win.slo)[0]
    assert loss.verdict.high < 0
    assert loss.arms.attainment(loss.slo)[0] >= 0.9 > loss.arms.attainment(loss.slo)[1]
    assert loss.load == 0.6
    assert win.surely_more == max(one.surely_more for one in found if one.wins)
    for one, slack in ((win, goodput.SLACK), (loss, 1 / goodput.SLACK)):  # its ratio nears 1, limits need not
        assert abs(math.log1p(one.arms.verdict(one.slo, slack).effect)) < abs(math.log1p(one.verdict.effect))
    assert win.surely_more <= math.log1p(win.verdict.low)
    assert win.use[1] <= 0.85


def test_search_keeps_to_its_budget() -> None:
    """Every run has enough requests, none too long, none longer than the model takes."""
    found = searched(FAST, BOTH, BUDGET, least=40)
    assert found
    for one in found:
        assert one.workload.requests >= 40
        assert one.arms.longest_s <= 4.0
    hasty = searched(FAST, BOTH, dataclasses.replace(BUDGET, most_e2e_s=1.0), least=40)
    assert 0 < len(hasty) < len(found)
    short = searched(FAST, BOTH, dataclasses.replace(BUDGET, most_tokens=2112))
    assert {one.point.prompt_tokens for one in short} == {1024, 2048}
    assert {one.point.output_tokens for one in short if one.point.prompt_tokens == 2048} == {16, 64}


def test_nothing_is_called_a_win_where_nobody_keeps_the_objective() -> None:
    """With limits that no request meets there is neither win nor loss; nor with a link that takes seconds a
    win.
    """
    hopeless = searched(FAST, SloSection(ttft_s=0.001, tpot_s=0.001), BUDGET)
    assert hopeless
    assert goodput.clearest_win(hopeless) is None
    assert goodput.clearest_loss(hopeless) is None
    slow = dataclasses.replace(FAST, speeds=dataclasses.replace(FAST.speeds, link_bytes_per_s=5e6))
    found = searched(slow, BOTH, dataclasses.replace(BUDGET, most_e2e_s=60.0))
    assert found
    assert goodput.clearest_win(found) is None


def test_counts_are_those_of_the_search_that_named_the_point() -> None:
    """A win of the first search keeps its counts when the loss needs a second one; a third is not made."""
    tight = searched(FAST, BOTH, BUDGET)
    win = goodput.clearest_win(tight)
    loss = goodput.clearest_loss(searched(FAST, SloSection(ttft_s=0.5, tpot_s=0.05), BUDGET))
    neutral = next(one for one in tight if not one.wins and not one.loses)
    assert win is not None
    assert loss is not None
    made = iter([[win, neutral], [win, win, loss, neutral], [loss]])
    found = goodput.named(made)
    assert (found["win"].looked_at, found["win"].called, found["win"].clearest) == (2, 1, win)
    assert (found["loss"].looked_at, found["loss"].called, found["loss"].clearest) == (4, 1, loss)
    assert list(made) == [[loss]]


def test_a_kind_that_no_search_finds_has_the_counts_of_the_last() -> None:
    """It is called at no point, and none is the clearest."""
    win = goodput.clearest_win(searched(FAST, BOTH, BUDGET))
    assert win is not None
    found = goodput.named([[], [win, win], [win]])
    assert (found["win"].looked_at, found["win"].called) == (2, 2)
    assert (found["loss"].looked_at, found["loss"].called, found["loss"].clearest) == (1, 0, None)


def test_limits_around_an_objective() -> None:
    """A row for each TTFT limit, in it every TPOT limit."""
    rows = goodput.limits(BOTH, (1.0, 2.0), (0.5, 1.0, 3.0))
    assert [[(one.ttft_s, one.tpot_s) for one in row] for row in rows] == [
        [(0.5, 0.005), (0.5, 0.01), (0.5, 0.03)],
        [(1.0, 0.005), (1.0, 0.01), (1.0, 0.03)],
    ]


def test_names_tell_points_apart() -> None:
    """Runs of two points are never pooled; a workload has the rate of its point."""
    one, other = forecast(4096, 64, 0.3), forecast(4096, 64, 0.4)
    assert one.name == one.workload.name == "goodput-4096-64-0.30" != other.name
    assert one.said == "4096 prompt, 64 output tokens, load 0.30"
    assert one.workload.rate_per_s == one.point.rate_per_s
    assert breakeven.capacity_per_s(FAST, 4096, 64) * 0.3 == pytest.approx(one.point.rate_per_s)

"""The break-even model: its limits, its formulas beside the steps that they sum up, and what is fitted to it.

Oracles: values worked out by hand from round speeds; laws that hold for any speeds (parts add up, a slower
link never helps, capacity is never gained); and predict/simulation.py, which knows no queueing theory.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagglab.config.workload import Workload
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.predict import breakeven, breakeven_points, simulation, speedfit
from disagglab.predict.breakeven import Cluster, Point, Prefill, Speeds, Step, at_load, outcome
from disagglab.predict.breakeven_points import Budget
from disagglab.predict.speedfit import HandedTime, PrefillTime, StepTime
from disagglab.results.records import Run
from disagglab.stats.linefit import LineFit
from disagglab.stats.verdict import judge

LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)  # 1,000 B a token
VERSION = "0.31.0"
ROUND = Speeds(  # 400 tokens: 0.1 + 0.4 s; 400,000 B: 0.2 s; a step: 0.1 s and 0.01 s a sequence
    Prefill(0.1, 0.001), Step(0.1, 0.01), link_bytes_per_s=2e6, request_s=0.03, handoff_s=0.02
)
CLUSTER = Cluster(ROUND, LAYOUT, VERSION, step_tokens=0)
POINT = Point(prompt_tokens=400, output_tokens=11, rate_per_s=1.0)
# Of the size of the embedded lab: a step of 46 ms, a prompt token of 0.4 to 0.8 ms, a link of 0.1 GB/s.
SMALL = dataclasses.replace(
    CLUSTER,
    speeds=Speeds(Prefill(0.04, 4.5e-4, 1.8e-7), Step(0.046, 1.5e-3, 3e-6), 1e8, 0.002, 0.01, 0.01),
    step_tokens=2048,
)


def speeds() -> st.SearchStrategy[Speeds]:
    """Any speeds from those of a large GPU to those of one core; the base of a prefill is a step's."""

    def made(step: float, token: float, own: float, link: float) -> Speeds:
        return Speeds(Prefill(step, token), Step(step, own), link)

    return st.builds(
        made, st.floats(1e-3, 0.2), st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.floats(1e4, 1e12)
    )


NODES = st.integers(1, 3)
CLUSTERS = st.builds(Cluster, speeds(), st.just(LAYOUT), st.just(VERSION), st.integers(0, 8192), NODES, NODES)
LENGTHS = st.integers(2, 4096)
LOAD = st.floats(0.01, 0.95)


def test_at_rest_only_the_handover_differs() -> None:
    """Without load a disaggregated request takes transfer, hand-over and a step longer, and nothing else."""
    idle = outcome(CLUSTER, dataclasses.replace(POINT, rate_per_s=1e-12))
    assert idle.replicated.ttft_s == pytest.approx(0.03 + 0.5)
    assert idle.disaggregated.ttft_s == pytest.approx(0.03 + 0.5 + 0.2 + 0.02 + 0.11)
    assert idle.replicated.tpot_s == pytest.approx(0.11)
    assert idle.disaggregated.tpot_s == pytest.approx(0.11)
    assert idle.ratio() == pytest.approx((0.53 + 0.33 + 1.1) / (0.53 + 1.1))
    assert not idle.wins
    assert idle.decided_by == "transfer"


def test_time_per_token_by_hand() -> None:
    """One request a second takes 0.5 x (0.4 + 10 x 0.01) of a replica, and 11 x 0.01 of the decode node."""
    found = outcome(CLUSTER, POINT)
    assert found.replicated.use["replica"] == pytest.approx(0.25)
    assert found.replicated.tpot_s == pytest.approx(0.11 / 0.75)
    assert found.disaggregated.use["prefill"] == pytest.approx(0.5)
    assert found.disaggregated.use["decode"] == pytest.approx(0.11)
    assert found.disaggregated.tpot_s == pytest.approx(0.11 / 0.89)
    assert found.disaggregated.queue_s == pytest.approx(0.5 * 0.5 / (2 * 0.5))
    assert found.load == pytest.approx(0.25)
    assert breakeven.capacity_per_s(CLUSTER, 400, 11) == pytest.approx(2 / 0.5)
    assert breakeven.disaggregated_capacity_per_s(CLUSTER, 400, 11) == pytest.approx(1 / 0.5)


def test_queue_by_hand() -> None:
    """M/D/1 at half use waits half a service; in turns half of that; served together longer."""
    assert breakeven.queue_s(0.5, 1.0) == pytest.approx(0.5)
    assert breakeven.queue_s(0.5, 1.0, arrivals_scv=0.5) == pytest.approx(0.25)
    assert breakeven.queue_s(0.5, 1.0, shared_s=1e-9) == pytest.approx(0.5 * (1 + 0.5 / 1.5))
    assert breakeven.queue_s(1.0, 1.0) == math.inf
    assert breakeven.queue_s(0.0, 1.0, shared_s=1.0) == 0.0


def test_share_of_time_in_which_a_node_decodes() -> None:
    """Without a cost of its own each sequence is alone (M/G/infinity); without a shared cost work is
    conserved.
    """
    assert breakeven.decoding_share(2.0, 10, 0.1, 0.0) == pytest.approx(1 - math.exp(-2))
    assert breakeven.decoding_share(2.0, 10, 0.0, 0.03) == pytest.approx(0.6)
    assert breakeven.decoding_share(2.0, 10, 0.1, 0.05) == 1.0
    nearly = breakeven.decoding_share(2.0, 10, 0.1, 1e-9)
    assert nearly == pytest.approx(1 - math.exp(-2), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "point", "named"),
    [
        ({}, Point(1000, 11, 1.0), "prefill"),
        ({}, Point(16, 1200, 0.1), "decode"),
        ({"link_bytes_per_s": 1e4}, Point(400, 11, 0.1), "link"),
    ],
)
def test_a_station_that_falls_behind_is_an_outcome(change: dict[str, Any], point: Point, named: str) -> None:
    """A queue that grows without end: an infinite ratio, and the name of the station."""
    cluster = dataclasses.replace(CLUSTER, speeds=dataclasses.replace(ROUND, **change))
    found = outcome(cluster, point)
    assert found.replicated.stable
    assert not found.disaggregated.stable
    assert found.ratio() == math.inf
    assert found.decided_by == f"{named} falls behind"
    assert not found.wins


def test_where_both_fall_behind_there_is_no_ratio() -> None:
    """Neither wins an overload that neither bears."""
    found = outcome(CLUSTER, dataclasses.replace(POINT, rate_per_s=100))
    assert math.isnan(found.ratio())
    assert not found.wins


@given(CLUSTERS, LENGTHS, LENGTHS, LOAD)
def test_parts_add_up_to_the_difference(cluster: Cluster, prompt: int, output: int, load: float) -> None:
    """What the outcome is put down to is all that the two topologies differ in."""
    found = at_load(cluster, prompt, output, load)
    if found.parts_s:
        difference = found.disaggregated.e2e_s - found.replicated.e2e_s
        scale = max(found.disaggregated.e2e_s, found.replicated.e2e_s)
        assert sum(found.parts_s.values()) == pytest.approx(difference, abs=1e-9 * scale)
        assert found.parts_s["interference"] <= 1e-9 * scale
        assert found.parts_s["transfer"] > 0


@given(CLUSTERS, LENGTHS, LENGTHS, LOAD, st.floats(1, 1000))
def test_a_slower_link_never_helps(
    cluster: Cluster, prompt: int, output: int, load: float, factor: float
) -> None:
    """E2E of disaggregated serving does not fall when the link does; the replicas do not notice."""
    rate = cluster.speeds.link_bytes_per_s
    slower = dataclasses.replace(
        cluster, speeds=dataclasses.replace(cluster.speeds, link_bytes_per_s=rate / factor)
    )
    before, after = (at_load(one, prompt, output, load) for one in (cluster, slower))
    assert after.disaggregated.e2e_s >= before.disaggregated.e2e_s * (1 - 1e-12)
    assert after.replicated == before.replicated


@given(CLUSTERS, LENGTHS, LENGTHS)
def test_capacity_is_never_gained(cluster: Cluster, prompt: int, output: int) -> None:
    """Prefill and decode nodes can be idle one at a time; what they bear is at most what replicas bear."""
    ours = breakeven.disaggregated_capacity_per_s(cluster, prompt, output)
    assert ours <= breakeven.capacity_per_s(cluster, prompt, output) * (1 + 1e-9)


@given(speeds(), LENGTHS, LENGTHS, LOAD)
def test_twice_the_nodes_bear_twice_the_rate(found: Speeds, prompt: int, output: int, load: float) -> None:
    """A decode node and a replica see the same share of twice the load; only queues are shorter, because
    round robin makes the gaps between arrivals more even.
    """
    small = Cluster(found, LAYOUT, VERSION, 2048)
    large = dataclasses.replace(small, prefill_nodes=2, decode_nodes=2)
    few, many = at_load(small, prompt, output, load), at_load(large, prompt, output, load)
    assert many.point.rate_per_s == pytest.approx(2 * few.point.rate_per_s)
    for one, two in ((few.replicated, many.replicated), (few.disaggregated, many.disaggregated)):
        assert two.tpot_s == pytest.approx(one.tpot_s)
        assert two.queue_s <= one.queue_s * (1 + 1e-9)


def poisson(rate_per_s: float, requests: int, seed: int) -> list[float]:
    """Arrival times."""
    source, now, times = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += source.expovariate(rate_per_s)
        times.append(now)
    return times


def test_one_request_step_by_step() -> None:
    """A single request takes what the formulas say at rest, to the last digit."""
    idle = outcome(CLUSTER, dataclasses.replace(POINT, rate_per_s=1e-12))
    for side, run in (
        (idle.replicated, simulation.replicated),
        (idle.disaggregated, simulation.disaggregated),
    ):
        found = run(CLUSTER, POINT, [5.0])
        assert found.ttft_s == pytest.approx(side.ttft_s)
        assert found.tpot_s == pytest.approx(side.tpot_s)
        assert found.e2e_s == pytest.approx(side.e2e_s)


def test_two_requests_step_by_step() -> None:
    """Worked out by hand: the second prompt comes to a replica that decodes, and stops it.

    Both on one replica (three arrivals, dealt in turn: the first and the third). The first has its token at
    0.5 s and wants another in steps of 0.11 s; at 0.61 s the prompt of 0.55 s is taken up, in a step of
    0.5 + 0.01 s that gives the first its last token.
    """
    point = Point(400, 3, 0.0)
    found = simulation.replicated(CLUSTER, point, [0.0, 0.01, 0.55])
    first, second = (0.5, 1.12), (1.12 - 0.55, 1.34 - 0.55)
    assert found.ttft_s == pytest.approx(0.03 + (first[0] + 0.5 + second[0]) / 3)
    assert found.e2e_s == pytest.approx(0.03 + (first[1] + 0.72 + second[1]) / 3)


@pytest.mark.parametrize("load", [0.2, 0.45])
@pytest.mark.parametrize(("prompt", "output"), [(64, 64), (256, 8), (512, 32), (1024, 64)])
def test_formulas_sum_up_the_steps(prompt: int, output: int, load: float) -> None:
    """Over a long run the steps give what the formulas say: TPOT and E2E within 10 %, TTFT within 15 %.

    The steps know neither Little's law nor a queue formula, so what is left between the two is what the
    formulas approximate: Kingman's term, prompts taken together, residual steps.
    """
    found = at_load(SMALL, prompt, output, load)
    times = poisson(found.point.rate_per_s, 3000, seed=7)
    for side, run in (
        (found.replicated, simulation.replicated),
        (found.disaggregated, simulation.disaggregated),
    ):
        steps = run(SMALL, found.point, times)
        assert side.e2e_s == pytest.approx(steps.e2e_s, rel=0.1)
        assert side.tpot_s == pytest.approx(steps.tpot_s, rel=0.1)
        assert side.ttft_s == pytest.approx(steps.ttft_s, rel=0.15)


def test_a_prompt_beyond_the_chunk_budget_by_hand() -> None:
    """400 tokens at 128 a step are four pieces, each with a base of 0.1 s: 0.8 s alone. A replica's decode
    loses nothing by it, because each piece replaces a step; a prefill node bears fewer requests.
    """
    cut = dataclasses.replace(CLUSTER, step_tokens=128)
    assert [cut.pieces(tokens) for tokens in (1, 128, 129, 400)] == [1, 1, 2, 4]
    assert CLUSTER.pieces(400) == 1
    assert CLUSTER.prefill_s(400) == pytest.approx(0.5)
    assert cut.prefill_s(400) == pytest.approx(0.8)
    assert cut.stop_s(400) == pytest.approx(CLUSTER.stop_s(400)) == pytest.approx(0.4)
    assert breakeven.capacity_per_s(cut, 400, 11) == pytest.approx(2 / 0.5)
    assert breakeven.disaggregated_capacity_per_s(cut, 400, 11) == pytest.approx(1 / 0.8)
    costly = dataclasses.replace(cut, speeds=dataclasses.replace(ROUND, step=Step(0.04, 0.01)))
    assert costly.stop_s(400) == pytest.approx(4 * 0.06 + 0.4)


@pytest.mark.parametrize(
    ("budget", "prompt", "output", "load"),
    [(128, 512, 32, 0.2), (128, 1024, 64, 0.45), (256, 512, 32, 0.45), (256, 1024, 64, 0.2)],
)
def test_formulas_sum_up_the_pieces(budget: int, prompt: int, output: int, load: float) -> None:
    """Where prompts are cut, TPOT and E2E are within 10 % of the steps, TTFT within 20 %: the formulas do not
    know that two prompts may share a step, nor that sequences take tokens of the budget.
    """
    cut = dataclasses.replace(SMALL, step_tokens=budget)
    found = at_load(cut, prompt, output, load)
    times = poisson(found.point.rate_per_s, 3000, seed=7)
    for side, run in (
        (found.replicated, simulation.replicated),
        (found.disaggregated, simulation.disaggregated),
    ):
        steps = run(cut, found.point, times)
        assert side.e2e_s == pytest.approx(steps.e2e_s, rel=0.1)
        assert side.tpot_s == pytest.approx(steps.tpot_s, rel=0.1)
        assert side.ttft_s == pytest.approx(steps.ttft_s, rel=0.2)


def test_a_short_run_is_not_in_equilibrium() -> None:
    """The same load for a few seconds: batches have not built up, so tokens come faster than the map says."""
    found = at_load(SMALL, 1024, 64, 0.45)
    short = simulation.replicated(SMALL, found.point, poisson(found.point.rate_per_s, 7, seed=3))
    assert short.tpot_s < 0.9 * found.replicated.tpot_s


def test_boundary_encloses_the_wins() -> None:
    """The curve is closed; points on it are won, points beside it are not."""
    xs, ys = breakeven.boundary(SMALL, [512, 1024], (2, 512), 0.4)
    assert (xs[0], ys[0]) == (xs[-1], ys[-1])
    low, high = ys[0], ys[3]
    assert xs == (512, 1024, 1024, 512, 512)
    for output, won in ((low, True), (high, True), (low * 0.8, False), (high * 1.2, False)):
        assert at_load(SMALL, 512, round(output), 0.4).wins is won
    assert breakeven.boundary(SMALL, [2], (2, 512), 0.4) == ((), ())


def test_lengths_double() -> None:
    """Both ends where they are a power apart."""
    assert breakeven.lengths(128, 2048) == [128, 256, 512, 1024, 2048]
    assert breakeven.lengths(128, 2000) == [128, 256, 512, 1024]
    assert breakeven.lengths(128, 128) == [128]


def points(count: int = 6) -> list[breakeven.Outcome]:
    """What a lab of the size of the embedded one would measure."""
    budget = Budget(7.0, 3.5, 4096)
    found = breakeven_points.candidates(
        SMALL,
        breakeven.lengths(128, 2048),
        breakeven.lengths(8, 512),
        (0.2, 0.4, 0.6),
        budget,
    )
    return breakeven_points.choose(found, count)


def test_chosen_points_are_wins_losses_and_between() -> None:
    """Six different points: the clearest of each kind, and each within what a run can show."""
    chosen = points()
    assert len({(one.point.prompt_tokens, one.point.output_tokens, one.load) for one in chosen}) == 6
    ratios = [one.ratio() for one in chosen]
    assert ratios[0] == min(ratios) < 1 < ratios[1] == max(ratios)
    assert abs(math.log(ratios[2])) < 0.1
    assert chosen[1].decided_by != chosen[4].decided_by
    for one in chosen:
        asked = breakeven_points.workload(one, 7.0)
        assert asked.requests >= 6
        assert asked.rate_per_s == one.point.rate_per_s
        assert one.disaggregated.e2e_s <= 3.5
    assert len(points(1000)) < 1000


def test_workloads_of_points_have_names_of_their_own() -> None:
    """A name says the point; runs of two points are never pooled."""
    names = [breakeven_points.workload(one, 7.0).name for one in points()]
    assert len(set(names)) == 6
    assert all(name.startswith("break-even-") for name in names)


SLOWER, FASTER, EQUAL, OPEN = (
    [(1.0, 1.3), (1.0, 1.31), (1.0, 1.29)],
    [(1.3, 1.0), (1.31, 1.0), (1.29, 1.0)],
    [(1.0, 1.01), (1.0, 1.0), (1.0, 1.005)],
    [(1.0, 2.0), (1.0, 0.5), (1.0, 1.0)],
)


@pytest.mark.parametrize(
    ("predicted", "pairs", "told"),
    [
        (1.2, SLOWER, "agrees"),
        (0.9, SLOWER, "disagrees"),
        (0.9, FASTER, "agrees"),
        (math.inf, SLOWER, "agrees"),
        (1.01, FASTER, "disagrees"),
        (1.04, EQUAL, "agrees"),
        (1.2, EQUAL, "disagrees"),
        (0.5, OPEN, "undecided"),
    ],
)
def test_agreement(predicted: float, pairs: list[tuple[float, float]], told: str) -> None:
    """A verdict bears a ratio out, or refutes it, or says nothing."""
    assert breakeven_points.agreement(predicted, judge(pairs, "lower", 0.05)) == told


def test_concordance() -> None:
    """1 in the same order, -1 in the opposite one, 0 where as many pairs agree as do not."""
    assert breakeven_points.concordance([1, 2, 3], [10, 20, 30]) == 1
    assert breakeven_points.concordance([1, 2, 3], [3, 2, 1]) == -1
    assert breakeven_points.concordance([1, 2, 3], [2, 2, 2]) == 0
    assert breakeven_points.concordance([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.2), st.floats(1e-6, 1e-2), st.floats(0, 1e-6))
def test_fit_finds_the_constants_of_prefill(base: float, token: float, square: float) -> None:
    """Times without noise give their constants back."""
    true = Prefill(base, token, square)
    lengths = (128, 512, 1024, 2048)
    found = speedfit.fit_prefill(lengths, [true.time_s(n) for n in lengths])
    for tokens in (64, 300, 4096):
        assert found.time_s(tokens) == pytest.approx(true.time_s(tokens), rel=1e-6)


def test_fit_finds_all_speeds_and_no_negative_one() -> None:
    """Times made from known speeds give them back; a step that got shorter with its batch costs nothing."""
    true = SMALL.speeds
    lengths = (128, 512, 1024, 2048)
    prefills = [PrefillTime(n, 0.01 + true.prefill.time_s(n), 0.01) for n in lengths]
    steps = [
        StepTime(batch, n, true.step.time_s(batch, n)) for batch, n in ((1, 128), (1, 2048), (2, 76), (8, 76))
    ]
    sizes = {n: LAYOUT.bytes_to_move(n, VERSION) for n in lengths}
    beside = [0.01 + 0.002 + sizes[n] / 1e8 + 0.01 + true.step.time_s(1, n) for n in lengths]
    handed = [
        HandedTime(n, true.prefill.time_s(n) + rest, sizes[n], 0.0)
        for n, rest in zip(lengths, beside, strict=True)
    ]
    link = LineFit(0.002, (0, 0), 1e8, (1e8, 1e8), 1.0, 4)
    found = speedfit.fit_speeds(prefills, steps, handed, link)
    assert found.prefill.per_token_s == pytest.approx(true.prefill.per_token_s)
    assert found.step.per_context_token_s == pytest.approx(true.step.per_context_token_s)
    assert found.step.base_s == pytest.approx(true.step.base_s)
    assert [found.request_s, found.handoff_s] == pytest.approx([0.01, 0.01])
    assert (found.link_bytes_per_s, found.link_latency_s) == (1e8, 0.002)
    falling = speedfit.fit_step([StepTime(1, 64, 0.05), StepTime(2, 64, 0.04), StepTime(4, 64, 0.03)])
    assert min(dataclasses.astuple(falling)) >= 0


def test_worst_factor_looks_both_ways() -> None:
    """Half as much is as far off as twice as much."""
    assert speedfit.worst_factor([1.0, 2.0], [1.0, 1.0]) == 2
    assert speedfit.worst_factor([1.0, 0.25], [1.0, 1.0]) == 4


def test_full_gaps_are_those_while_all_decode() -> None:
    """Two requests: the second has its first token at 3 s, the first its last at 6 s; gaps between count."""
    workload = Workload(name="x", prompt_tokens=64, output_tokens=6, requests=2, concurrency=2)
    run = Run(
        "replicated", workload, 0, 0, "", 9.0, None,
        ttft_s=(1.0, 2.0), e2e_s=(6.0, 7.0), itl_s=((1.0,) * 5, (1.5, 1.5, 1.0, 0.5, 0.5)),
        prompt_tokens=(64, 64), output_tokens=(6, 6), start_s=(0.0, 1.0), streams=("main", "main"),
    )  # fmt: skip
    assert speedfit.full_gaps(run) == [1.0, 1.0, 1.0, 1.5, 1.5]

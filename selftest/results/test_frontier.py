"""Points of a frontier by hand: per GPU in both definitions, cost, energy, Pareto set; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.results.footprint import Footprint
from disagglab.results.frontier import Frontier, Point, collect, pareto
from disagglab.results.price import Price
from disagglab.results.promise import Promise
from disagglab.results.records import Run
from selftest.experiments.made import made_run
from selftest.results.rated import FOOTPRINTS, PROMISE, frontier, rated

OPEN = Workload(name="w", prompt_tokens=10, output_tokens=5, rate_per_s=2.0, requests=4)
TOKENS_PER_S = 22.0  # of a made run: twenty answers of 11 tokens in 10 s


def points(found: Frontier) -> dict[str, Point]:
    return {point.arm: point for point in found.points()}


def test_both_definitions_of_per_gpu() -> None:
    """Of 22 output tokens/s two GPUs make 11 each; the one that decodes, 22. Prompts have 200 tokens/s."""
    found = points(frontier({"replicated": {1.0: [10]}, "disaggregated": {1.0: [10]}}))
    both, apart = found["replicated"], found["disaggregated"]
    assert both.tokens_per_s == apart.tokens_per_s == TOKENS_PER_S
    assert both.tokens_per_s_node == both.tokens_per_s_gpu == apart.tokens_per_s_gpu == 11.0
    assert (both.tokens_per_s_decode_gpu, apart.tokens_per_s_decode_gpu) == (11.0, 22.0)
    assert (both.prompt_tokens_per_s_prefill_gpu, apart.prompt_tokens_per_s_prefill_gpu) == (100.0, 200.0)
    assert apart.density == 11.0


def test_without_gpus_there_is_no_per_gpu() -> None:
    """Per node then."""
    cpus = {"replicated": Footprint(2, 0, 0, 0, ("a", "b"), ("a", "b"))}
    (point,) = Frontier("w", cpus, (rated("replicated"),)).points()
    assert point.tokens_per_s_gpu is point.tokens_per_s_decode_gpu is None
    assert point.prompt_tokens_per_s_prefill_gpu is None
    assert point.density == 11.0


def test_means_over_rounds() -> None:
    """Rounds of 10 and 20 s, with 20 and 10 of 20 good: 2 and 0.5 good requests/s."""
    runs = (rated("single"), rated("single", number=1, good=10, duration_s=20.0))
    (point,) = Frontier("w", FOOTPRINTS, runs, PROMISE).points()
    assert (point.rounds, point.kept_up) == (2, 2)
    assert point.tokens_per_s == pytest.approx((22 + 11) / 2)
    assert point.good_per_s == pytest.approx((2 + 0.5) / 2)
    assert point.good_share == pytest.approx(30 / 40)
    assert point.tokens_per_s_user == pytest.approx(20.0)
    assert point.ttft_p50_s == pytest.approx((0.5 + 1.75) / 2)
    assert point.ttft_p99_s is None, "forty requests have no 99th percentile"
    assert point.gaps_above == 0.0


def test_goodput_of_each_round() -> None:
    """As a forecast is scored with."""
    found = frontier({"replicated": {1.0: [10, 20], 2.0: [5]}})
    assert found.goodput_per_s == {("replicated", 1.0): (2.0, 1.0), ("replicated", 2.0): (4.0,)}


def test_a_p99_of_ttft_is_of_all_rounds_together() -> None:
    """Five rounds of 20 have a hundred requests: 99 of 0.5 s, and one of 3 s."""
    runs = tuple(rated("single", number=n, good=19 if n == 0 else 20) for n in range(5))
    (point,) = Frontier("w", FOOTPRINTS, runs, PROMISE).points()
    assert point.ttft_p99_s == pytest.approx(0.5 + 2.5 * 0.01)


def test_gaps_are_late_by_the_promise_on_them() -> None:
    """By that on ITL, else by that on TPOT; without either there is no share."""
    one = Frontier("w", FOOTPRINTS, (rated("single"),))
    shares = [
        point.gaps_above
        for promise in (Promise(), Promise(tpot_s=0.04), Promise(tpot_s=0.04, itl_s=0.05))
        for point in one.promising(promise).points()
    ]
    assert shares == [None, 1.0, 0.0]


def test_cost_of_tokens_and_of_good_requests() -> None:
    """Two GPUs at 3.6 EUR an hour are 0.002 EUR/s: over 22 tokens/s 90.9 EUR a million, over 2/s 0.001."""
    made = frontier({"single": {1.0: [10]}, "disaggregated": {1.0: [10]}})
    found = points(replace(made, price=Price(3.6, "gpu", "EUR")))
    assert found["disaggregated"].cost_per_million_tokens == pytest.approx(0.002 / 22 * 1e6)
    assert found["disaggregated"].cost_per_good_request == pytest.approx(0.001)
    assert found["single"].cost_per_good_request == pytest.approx(0.0005), "it leaves the other node free"
    assert points(made)["single"].cost_per_million_tokens is None
    none_good = Frontier("w", FOOTPRINTS, (rated("single", good=0),), PROMISE, Price(1.0, "node", "EUR"))
    assert none_good.points()[0].cost_per_good_request is None


def test_energy_of_a_token_by_role() -> None:
    """220 tokens: 110 J of prefill and 330 J of decode are 2 J a token, 0.5 and 1.5."""
    used = {"a": 110.0, "b": 330.0}
    runs = (rated("disaggregated", energy_j=used), rated("replicated", energy_j=used))
    found = points(Frontier("w", FOOTPRINTS, runs))
    apart, both = found["disaggregated"], found["replicated"]
    assert (apart.energy_j_token, apart.prefill_j_token, apart.decode_j_token) == (2.0, 0.5, 1.5)
    assert (both.energy_j_token, both.prefill_j_token, both.decode_j_token) == (2.0, None, None)


@pytest.mark.parametrize("used", [None, {"b": 330.0}])
def test_energy_that_was_not_read_is_none(used: dict[str, float] | None) -> None:
    """Not even in part: the sum would be too small. The role that was read is shown."""
    (point,) = Frontier("w", FOOTPRINTS, (rated("disaggregated", energy_j=used),)).points()
    assert point.energy_j_token is point.prefill_j_token is None
    assert point.decode_j_token == (1.5 if used else None)


def test_energy_of_every_round_or_none() -> None:
    runs = (rated("single", energy_j={"a": 220.0}), rated("single", number=1))
    (point,) = Frontier("w", FOOTPRINTS, runs).points()
    assert point.energy_j_token is None


def _placed(arm: str, user: float, density: float) -> Point:
    (point,) = Frontier("w", FOOTPRINTS, (rated("single"),)).points()
    return replace(point, arm=arm, tokens_per_s_user=user, tokens_per_s_gpu=density)


def test_the_pareto_set() -> None:
    """(12, 6) beats (10, 5) of another way, and leaves (12, 4) of its own way in; equal points stay."""
    fast, dense = _placed("a", 20, 2), _placed("b", 5, 9)
    good, own, beaten = _placed("a", 12, 6), _placed("a", 12, 4), _placed("b", 10, 5)
    twin = _placed("b", 20, 2)
    assert pareto([fast, dense, good, own, beaten, twin]) == (fast, dense, good, own, twin)
    assert pareto([own, _placed("b", 12, 5)]) == (_placed("b", 12, 5),), "equal in one, beaten in the other"


def test_rivals_are_the_ways_of_other_kinds() -> None:
    """Neither other settings of one's own kind, nor twins."""
    arms = ("single", "replicated", "replicated@tuned", "disaggregated", "disaggregated-again")
    places = dict.fromkeys(arms, FOOTPRINTS["single"])
    found = Frontier("w", places, tuple(map(rated, arms)))
    assert found.rivals("replicated@tuned") == ("single", "disaggregated")
    assert found.rivals("disaggregated") == ("single", "replicated", "replicated@tuned")


def measured(arm: str, number: int = 0, seed: int = 1, rate: float = 2.0, invalid: str | None = None) -> Run:
    return made_run(arm, OPEN.at_rate(rate), number, seed=seed, invalid=invalid)


def test_measured_runs_are_collected() -> None:
    """Arms in the order of the footprints, rates ascending; an invalid run is said, with its reason."""
    runs = [
        measured("disaggregated", rate=4.0, seed=2),
        measured("disaggregated"),
        measured("single"),
        measured("single", rate=4.0, seed=2, invalid="no proof"),
    ]
    found = collect(runs, FOOTPRINTS, PROMISE)
    assert (found.workload, found.arms, found.rates) == ("w", ("single", "disaggregated"), (2.0, 4.0))
    assert found.at("single", 4.0) == ()
    assert found.left_out == ("single at 4/s, round 0: no proof",)
    assert [(point.arm, point.rate_per_s) for point in found.points()] == [
        ("single", 2.0), ("disaggregated", 2.0), ("disaggregated", 4.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([], "valid runs of one workload"),
        ([measured("single", invalid="no proof")], "here 0 of"),
        ([measured("elsewhere")], "no footprint"),
        ([measured("single"), measured("single")], "there twice"),
        ([measured("single"), measured("disaggregated", seed=2)], "two seeds"),
        ([measured("single"), replace(measured("single", 1), workload=OPEN.model_copy(update={"name": "v"}))],
         "one workload"),
    ],
)  # fmt: skip
def test_runs_that_make_no_frontier_are_refused(runs: list[Run], why: str) -> None:
    with pytest.raises(InvalidRun, match=why):
        collect(runs, FOOTPRINTS, PROMISE)

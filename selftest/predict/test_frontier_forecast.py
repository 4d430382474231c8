"""A frontier that is forecast: every way with the same arrivals.

Oracle: a way that is served by itself, whose requests are counted here.
"""

from __future__ import annotations

import json

import pytest

from disagglab.config.arrivals import STEADY, arrivals
from disagglab.config.schema import SloSection
from disagglab.config.workload import Steady, Workload
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.predict import frontier_forecast, ways
from disagglab.predict.breakeven import Cluster, Point
from disagglab.predict.sharding import AllReduces
from disagglab.predict.speeds import Prefill, Speeds, Step
from disagglab.predict.ways import Planned
from disagglab.stats.metric import percentile

LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)
SMALL = Cluster(
    Speeds(Prefill(0.04, 4.5e-4, 1.8e-7), Step(0.046, 1.5e-3, 3e-6), 1e8, 0.002, 0.01, 0.01),
    LAYOUT, "0.31.0", 2048,
)  # fmt: skip
WAYS = (
    Planned("single", "single", step_tokens=2048),
    Planned("replicated", "replicated", step_tokens=2048),
    Planned("replicated@chunk-128", "replicated", step_tokens=128),
    Planned("disaggregated", "disaggregated", step_tokens=2048),
)
SLO = SloSection(ttft_s=2.0, tpot_s=0.15)


def load(rate: float, requests: int = 30, **more: object) -> Workload:
    """An open loop of long prompts."""
    given = {"prompt_tokens": 1024, "output_tokens": 32, **more}
    return Workload.model_validate({"name": "documents", "requests": requests, "rate_per_s": rate, **given})


LOADS = (load(0.4), load(1.2))


def test_points_are_the_ways_served_with_the_arrivals_of_the_load() -> None:
    """Tokens, TTFT, ITL, attainment and goodput of a point are those of its runs, averaged over the seeds."""
    found = frontier_forecast.forecast(SMALL, WAYS, LOADS, SLO, (1, 2))
    assert found.arms == tuple(one.arm for one in WAYS)
    assert found.rates_per_s == (0.4, 1.2)
    point = next(one for one in found.points if (one.arm, one.rate_per_s) == ("disaggregated", 1.2))
    runs = [
        ways.serve(SMALL, WAYS[3], Point(1024, 32, 0), [one.arrival_s for one in arrivals(LOADS[1], seed)])
        for seed in (1, 2)
    ]
    good = [
        sum(t <= 2.0 and each <= 0.15 for t, each in zip(run.ttft_s, run.tpot_s, strict=True)) for run in runs
    ]
    assert min(good) > 0, "or the point says nothing"
    assert max(good) < 30
    assert point.attainment == pytest.approx(sum(good) / 60)
    assert point.goodput_per_s == pytest.approx(
        sum(many / run.duration_s for many, run in zip(good, runs, strict=True)) / 2
    )
    assert point.output_tokens_per_s == pytest.approx(sum(30 * 32 / run.duration_s for run in runs) / 2)
    assert point.ttft_p50_s == pytest.approx(sum(percentile(run.ttft_s, 50) or 0 for run in runs) / 2)
    assert point.ttft_p99_s is None, "30 requests do not tell it"
    assert point.itl_p99_s == pytest.approx(sum(run.itl_s(99) or 0 for run in runs) / 2)


def test_a_forecast_is_a_plain_record() -> None:
    """It comes back from JSON as it was; another format is refused."""
    found = frontier_forecast.forecast(SMALL, WAYS, LOADS, SLO, (1,))
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert frontier_forecast.read(record) == found
    assert record["winners"][0] == {"rate_per_s": 0.4, "arm": found.winner(0.4)}
    with pytest.raises(ValueError, match="format 2"):
        frontier_forecast.read({**record, "format": 2})


def test_figures_of_one_stream() -> None:
    """Steady requests decode while long prompts come: their gaps alone tell what a chunk budget does."""
    steady = Steady(requests=4, prompt_tokens=64, output_tokens=120, lead_s=1.0)
    loads = [load(0.5, 6, steady=steady)]
    found = frontier_forecast.forecast(SMALL, WAYS[1:3], loads, SLO, (1,), stream=STEADY)
    default, cut = (one.itl_p99_s or 0 for one in found.points)
    assert {one.requests for one in found.points} == {4}
    assert default > 3 * cut > 0
    with pytest.raises(ValueError, match="no stream 'other'"):
        frontier_forecast.forecast(SMALL, WAYS[1:3], loads, SLO, (1,), stream="other")


def test_what_is_no_frontier_is_refused() -> None:
    """A closed loop offers no rate; two loads of one rate are one point."""
    closed = Workload(name="x", prompt_tokens=64, output_tokens=4, requests=4, concurrency=2)
    with pytest.raises(ValueError, match="x is a closed loop"):
        frontier_forecast.forecast(SMALL, WAYS, [closed], SLO, (1,))
    with pytest.raises(ValueError, match=r"single at 0\.4/s is asked for twice"):
        frontier_forecast.forecast(SMALL, WAYS, [LOADS[0], LOADS[0]], SLO, (1,))


def test_the_sharded_way_answers_a_prompt_sooner() -> None:
    """Two ranks over a link that costs little; over one that is slow it is the last."""
    made = (*WAYS[1:2], Planned("sharded", "sharded", step_tokens=4096))
    for link, sooner in ((1e12, True), (1e6, False)):
        found = frontier_forecast.forecast(
            SMALL, made, LOADS[:1], SLO, (1,), AllReduces(30, 512, 2, link, 1e-6)
        )
        replicas, ranks = (one.ttft_p50_s or 0 for one in found.points)
        assert (ranks < replicas) is sooner

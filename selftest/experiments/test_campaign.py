"""Ways at offered rates and on workloads of gates: what is offered, in which order, what a death leaves.

Servers are stand-ins and runs are made; the oracle is the log of a campaign, written down by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagglab.config.schema import SloSection
from disagglab.config.workload import Steady, Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import campaign
from disagglab.experiments.campaign import closed, conduct, footprints, offered, planned, reduces
from disagglab.experiments.turns import Contender
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.measure import ledger
from disagglab.predict.breakeven import Cluster
from disagglab.predict.sharding import AllReduces
from disagglab.predict.speeds import Prefill, Speeds, Step
from selftest.experiments.standin import LAB, WAYS, Scene

CLOSED = Workload(name="p", prompt_tokens=8, output_tokens=2, concurrency=4, requests=12)
STEADY = Steady(prompt_tokens=8, output_tokens=20, requests=3, lead_s=1.0)
OPEN = Workload(name="q", prompt_tokens=8, output_tokens=2, rate_per_s=2.0, requests=12, steady=STEADY)
SLO = SloSection(ttft_s=5.0, tpot_s=5.0)
SHARDED = Contender.of(WAYS["sharded"])
CHUNKS = Contender.of(WAYS["replicated@chunk-128"])
OWN = Contender.of("replicated")
Make = Callable[[int], Scene]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes scenes that hold so many deployments at once."""
    return lambda resident: Scene(monkeypatch, tmp_path, resident)


def test_a_closed_loop_stays_as_it_is() -> None:
    assert closed(CLOSED) is CLOSED


@pytest.mark.parametrize(("requests", "at_once"), [(12, 6), (13, 6), (5, 2), (3, 2), (2, 2)])
def test_an_open_loop_is_closed_with_half_of_its_requests_at_once(requests: int, at_once: int) -> None:
    """The steady ones are left out; prompts, answers and their number stay."""
    found = closed(OPEN.model_copy(update={"requests": requests}))
    assert (found.concurrency, found.rate_per_s, found.steady) == (at_once, None, None)
    assert (found.requests, found.total_requests) == (requests, requests)
    assert (found.name, found.prompt_tokens, found.output_tokens) == ("q", 8, 2)
    Workload.model_validate(found.model_dump())


def test_offered_rates_are_shares_of_a_capacity() -> None:
    """Four digits of them, so that a rate in a report is the rate that was offered."""
    found = offered(CLOSED, (0.25, 0.5, 1.0, 1.5), 4 / 3)
    assert [one.rate_per_s for one in found] == [0.3333, 0.6667, 1.333, 2.0]
    assert {(one.concurrency, one.requests, one.steady) for one in found} == {(None, 12, None)}
    for one in found:
        Workload.model_validate(one.model_dump())


def test_offered_rates_of_an_open_loop_keep_its_steady_requests() -> None:
    """In place of its own rate."""
    found = offered(OPEN, (0.5, 2.0), 10.0)
    assert [(one.rate_per_s, one.steady) for one in found] == [(5.0, STEADY), (20.0, STEADY)]


def test_a_length_that_a_plan_made_is_left_behind() -> None:
    """It is of closed loops alone."""
    (found,) = offered(CLOSED.of_length(40), (1.0,), 1.0)
    assert (found.length, found.run_requests) == (None, 12)


RATED = offered(CLOSED, (0.5, 1.0), 8.0)  # 4 and 8 requests/s
GATED = [CLOSED, OPEN]


def test_rates_come_before_gates_and_rounds_are_mirrored(make: Make) -> None:
    """Two rounds, one start at a time: what is last in the first is first in the second."""
    scene = make(1)
    conduct(scene.load, [OWN, SHARDED], RATED, GATED, 2, SLO)
    first = [
        "run replicated p 0 91000", "run replicated p 0 91000",
        "run replicated p 0 95000", "run replicated q 0 95001",
    ]  # fmt: skip
    second = [
        "run replicated q 1 95101", "run replicated p 1 95100",
        "run replicated p 1 91001", "run replicated p 1 91001",
    ]  # fmt: skip

    def over(entries: list[str]) -> list[str]:
        return [entry.replace("replicated", "sharded") for entry in entries]

    assert scene.entries("run") == [*first, *over(first), *over(second), *second]
    assert len(scene.entries("start")) == 3


def test_progress_tells_the_rate(make: Make) -> None:
    scene = make(1)
    conduct(scene.load, [OWN], RATED, GATED, 1, SLO)
    assert [line for line in scene.shown if line.startswith("round")] == [
        "round 1 of 1, p at 4/s, replicated",
        "round 1 of 1, p at 8/s, replicated",
        "round 1 of 1, p, replicated",
        "round 1 of 1, q, replicated",
    ]


def test_runs_are_told_apart_by_what_was_asked(make: Make) -> None:
    """The rated ones, and those of gates as a comparison takes them, in pairs by round; no warm-ups."""
    scene = make(2)
    found = conduct(scene.load, [OWN, CHUNKS], RATED, GATED, 3, SLO)
    assert (len(found.rated), len(found.gated.runs), found.died) == (2 * 2 * 3, 2 * 2 * 3, None)
    assert {run.workload.rate_per_s for run in found.rated} == {4.0, 8.0}
    assert {run.workload for run in found.gated.runs} == {CLOSED, OPEN}
    assert [run.topology for run in found.at("replicated")] == ["replicated"] * 6
    assert found.at("single") == []
    assert len(found.gated.pairs("p", "replicated", CHUNKS.arm, "ttft_p50")) == 3
    assert found.gated.slo == SLO
    assert all(run.round >= 0 for run in (*found.rated, *found.gated.runs))
    stored = list((scene.store.folder / "runs").glob("*.json"))
    assert len(stored) == 2 * 2 * 3 * 2 + len(scene.entries("warm"))
    assert len(scene.entries("warm")) == 2


def test_all_ways_get_the_same_prompts_and_arrivals(make: Make) -> None:
    """A seed of each round for the rates, and one of each round and workload for the gates; none twice."""
    scene = make(1)
    found = conduct(scene.load, [OWN, CHUNKS, SHARDED], RATED, GATED, 3, SLO)
    seeds: dict[tuple[str, str, int], set[int]] = {}
    for kind, runs in (("rated", found.rated), ("gated", found.gated.runs)):
        for run in runs:
            seeds.setdefault((kind, run.workload.name, run.round), set()).add(run.seed)
    assert all(len(each) == 1 for each in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 3 * 3


def test_servers_are_warmed_up_for_the_fullest_that_is_asked(make: Make) -> None:
    """Six at once of the open loop's twelve; four of the closed one; six of the rates' twelve."""
    scene = make(1)
    conduct(scene.load, [OWN], RATED, GATED, 1, SLO)
    assert scene.entries("warm") == ["warm replicated 6"]
    other = make(1)
    conduct(other.load, [OWN], [], [CLOSED], 1, SLO)
    assert other.entries("warm") == ["warm replicated 4"]


def test_a_death_ends_a_campaign_and_leaves_what_was_measured(make: Make) -> None:
    """sharded dies of its first gate in round 1: its two rated runs and all four of replicated are there,
    with the run that it died of, which is invalid; no later one is made, and both parts say why.
    """
    scene = make(1)
    scene.kills = {"run sharded p 0 95000"}
    found = conduct(scene.load, [OWN, SHARDED], RATED, GATED, 2, SLO)
    assert found.died is not None
    assert found.gated.died is found.died
    assert "vllm-a@sharded-2 died" in str(found.died)
    assert scene.entries("run")[-1] == "run sharded p 0 95000"
    assert [(run.topology, run.invalid) for run in found.rated] == [
        *[("replicated", None)] * 2,
        *[("sharded", None)] * 2,
    ]
    assert [(run.topology, run.invalid) for run in found.gated.runs] == [
        ("replicated", None),
        ("replicated", None),
        ("sharded", "a server died"),
    ]
    assert found.gated.valid("p", "sharded") == []


def test_a_start_that_fails_leaves_what_was_measured(make: Make) -> None:
    """The sharded server does not come up in round 1: the replicas have their runs; both parts say why."""
    scene = make(1)
    scene.fails = {"sharded"}
    found = conduct(scene.load, [OWN, SHARDED], RATED, GATED, 2, SLO)
    assert found.gated.died is found.died
    assert "does not come up" in str(found.died)
    assert {run.topology for run in (*found.rated, *found.gated.runs)} == {"replicated"}
    assert len(found.rated) == len(RATED)


def test_a_death_of_the_warm_up_leaves_what_was_measured(make: Make) -> None:
    scene = make(1)
    scene.kills = {"warm sharded"}
    found = conduct(scene.load, [OWN, SHARDED], RATED, GATED, 2, SLO)
    assert found.died is not None
    assert len(found.rated) == len(found.gated.runs) == 2
    assert not found.at("sharded")


def test_an_invalid_run_on_living_servers_ends_nothing(make: Make) -> None:
    """Negative control: it is kept, and does not count."""
    scene = make(1)
    scene.wrong = {"run sharded p 0 95000"}
    found = conduct(scene.load, [OWN, SHARDED], RATED, GATED, 2, SLO)
    assert found.died is None
    assert len(found.gated.runs) == 2 * 2 * 2
    assert [run.topology for run in found.gated.invalid()] == ["sharded"]
    assert [run.round for run in found.gated.valid("p", "sharded")] == [1]


def test_ways_occupy_what_they_use() -> None:
    """Cores here, so nodes count: one, two, both roles of one each, and one server over both. A twin takes
    what its way takes.
    """
    kinds = [Contender.of(kind) for kind in ("single", "replicated", "disaggregated")]
    turned = Contender.of(WAYS["disaggregated@turned"])
    found = footprints(LAB, [*kinds, SHARDED, turned, OWN.twin])
    assert {arm: (one.nodes, one.gpus, one.apart) for arm, one in found.items()} == {
        "single": (1, 0, False),
        "replicated": (2, 0, False),
        "disaggregated": (2, 0, True),
        "sharded": (2, 0, False),
        "disaggregated@turned": (2, 0, True),
        "replicated-again": (2, 0, False),
    }
    assert (found["disaggregated"].prefill, found["disaggregated"].decode) == (("a",), ("b",))
    assert (found["disaggregated@turned"].prefill, found["disaggregated@turned"].decode) == (("b",), ("a",))
    assert found["sharded"].decode == ("a-b",)


def test_a_contender_is_planned_under_its_own_name() -> None:
    """The options are those of its way; of a kind, the lab's own."""
    found = [planned(LAB, one) for one in (OWN, OWN.twin, CHUNKS, CHUNKS.twin, SHARDED)]
    assert [(one.arm, one.kind) for one in found] == [
        ("replicated", "replicated"),
        ("replicated-again", "replicated"),
        ("replicated@chunk-128", "replicated"),
        ("replicated@chunk-128-again", "replicated"),
        ("sharded", "sharded"),
    ]
    assert [one.step_tokens for one in found[1:4]] == [found[0].step_tokens, 128, 128]
    assert [one.ranks for one in found] == [1, 1, 1, 1, 2]


MODEL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def test_ranks_send_over_the_link_where_there_is_one() -> None:
    """Between hosts at the rate of [transport] link_gbit_s: 8 Gbit/s are 1e9 B/s. On one host, or where no
    rate is stated, at that of memory.
    """

    def rate(hosts: int, link_gbit_s: float | None) -> float:
        nodes = [node.model_copy(update={"host": f"h{n % hosts}"}) for n, node in enumerate(LAB.nodes)]
        transport = LAB.transport.model_copy(update={"link_gbit_s": link_gbit_s})
        lab = LAB.model_copy(update={"nodes": tuple(nodes), "transport": transport})
        return reduces(lab, MODEL, 5e9).link_bytes_per_s

    assert (rate(2, 8.0), rate(2, None), rate(1, 8.0)) == (1e9, 5e9, 5e9)


LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)
SPEEDS = Speeds(Prefill(0.04, 4.5e-4), Step(0.046, 1.5e-3), 1e8, 0.002, 0.01, 0.01)
CLUSTER = Cluster(SPEEDS, LAYOUT, "0.31.0", 2048)
SENDS = AllReduces(2, 64, 2, 5e9, campaign.LATENCY_S)


@pytest.mark.parametrize(
    ("sends", "arms"),
    [(SENDS, ("replicated", CHUNKS.arm, "sharded")), (None, ("replicated", CHUNKS.arm))],
)
def test_a_forecast_is_of_every_way_that_it_knows_enough_of(
    sends: AllReduces | None, arms: tuple[str, ...]
) -> None:
    """Twins are their ways; a sharded one is left out where nobody knows what its ranks send. The arrivals
    are those that the rounds will have.
    """
    none: Any = None
    known = campaign.Speeds(none, CLUSTER, 8.0)
    found, served = campaign.forecast(LAB, known, [OWN, OWN.twin, CHUNKS, SHARDED], RATED, 2, SLO, sends)
    assert found.arms == arms
    assert found.rates_per_s == (4.0, 8.0)
    assert found.seeds == (campaign.RATE_SEED, campaign.RATE_SEED + 1)
    assert {arm for arm, _ in served} == set(arms)


class Calibrated:
    """What a calibration gives, without one."""

    @staticmethod
    def cluster(*_: Any) -> Cluster:
        return CLUSTER


def test_speeds_are_those_of_the_labs_own_servers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One start, warm; then a closed loop on the replicas, whose requests by its time are their capacity. An
    open loop is closed for it.
    """
    scene = make(1)
    asked: list[str] = []

    def calibrate(_engine: Any, *given: Any) -> Calibrated:
        asked.extend(topology.name for topology in given[:3])
        return Calibrated()

    monkeypatch.setattr(campaign, "calibrate", calibrate)
    monkeypatch.setattr(ledger, "block_size", lambda _: 128)
    known = campaign.speeds(scene.load, LAB, OPEN)
    assert asked == ["single", "replicated", "disaggregated"]
    assert scene.entries("start") == ["start @own-1"]
    assert scene.entries("run") == [f"run replicated q 0 {campaign.CAPACITY_SEED}"]
    assert known.capacity_per_s == pytest.approx(0.5)  # a made request takes 2 s, one after another


def test_a_capacity_that_was_not_proved_is_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make(1)
    scene.wrong = {"run replicated"}
    monkeypatch.setattr(campaign, "calibrate", lambda *_: Calibrated())
    with pytest.raises(InvalidRun, match="capacity of the replicas: the client was late"):
        campaign.speeds(scene.load, LAB, CLOSED)
    assert len(list((scene.store.folder / "runs").glob("p.00.*.json"))) == 1

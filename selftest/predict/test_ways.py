"""Ways to use nodes, as a forecast takes them: of a lab file, and beside the simulation they stand for."""

from __future__ import annotations

import dataclasses

import pytest

from disagglab.config import labs
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.predict import simulation, ways
from disagglab.predict.breakeven import Cluster, Point
from disagglab.predict.engine import Request
from disagglab.predict.sharding import AllReduces
from disagglab.predict.speeds import Prefill, Speeds, Step
from disagglab.predict.ways import Planned

LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)
ROUND = Speeds(Prefill(0.1, 0.001), Step(0.1, 0.01), link_bytes_per_s=2e6, request_s=0.03, handoff_s=0.02)
CLUSTER = Cluster(ROUND, LAYOUT, "0.31.0", step_tokens=0)
FREE = AllReduces(2, 100, 2, 1e18)
POINT, TIMES = Point(400, 3, 0.0), (0.0, 0.01, 0.55)


def test_each_kind_by_hand() -> None:
    """Three prompts of 0.5 s. One node: the second waits for the first and the third for both. Two replicas:
    the third comes to the first node. Two ranks that send nothing: everything in half the time.
    """
    one = ways.serve(CLUSTER, Planned("single", "single"), POINT, TIMES)
    assert one.ttft_s == pytest.approx((0.53, 0.03 + 0.5 + 0.51 - 0.01, 0.03 + 1.01 + 0.52 - 0.55))
    both = ways.serve(CLUSTER, Planned("replicated", "replicated"), POINT, TIMES)
    assert both == simulation.by_replicas(CLUSTER, POINT, TIMES)
    apart = ways.serve(CLUSTER, Planned("disaggregated", "disaggregated"), POINT, TIMES)
    assert apart == simulation.by_prefill_and_decode(CLUSTER, POINT, TIMES)
    half = ways.serve(CLUSTER, Planned("sharded", "sharded"), POINT, TIMES[:1], FREE)
    assert half.ttft_s == pytest.approx((0.03 + 0.25,))
    assert half.tpot_s == pytest.approx((0.055,))


def test_a_sharded_way_wants_to_know_what_is_sent() -> None:
    """Its all-reduces are never taken for nothing."""
    with pytest.raises(ValueError, match="sharded: what its ranks send"):
        ways.serve(CLUSTER, Planned("sharded", "sharded"), POINT, TIMES)


def test_limits_and_nodes_are_those_of_the_way() -> None:
    """Not those of the cluster it is given."""
    planned = Planned("x", "disaggregated", prefill_nodes=2, decode_nodes=3, step_tokens=128, max_seqs=4)
    busy = dataclasses.replace(CLUSTER, step_tokens=9, sequences=1, decode_sequences=2)
    found = ways.cluster_of(busy, dataclasses.replace(planned, decode_max_seqs=7))
    assert (found.prefill_nodes, found.decode_nodes, found.step_tokens) == (2, 3, 128)
    assert (found.limits.sequences, found.decode_limits.sequences) == (4, 7)
    assert found.decode_limits.step_tokens == 128
    counts = [
        dataclasses.replace(planned, kind=kind).nodes_used
        for kind in ("single", "replicated", "disaggregated", "sharded")
    ]
    assert counts == [1, 2, 5, 2]


def test_long_prompts_beside_steady_decode() -> None:
    """The 99th percentile of the gaps of four steady requests: a whole prompt on a replica, a chunk with a
    budget of 128 tokens, no prompt at all where decode is apart. Fewer tokens a step cost TTFT.
    """
    requests = [Request(0.0, 16, 200)] * 4 + [Request(2.0 + 4 * number, 1000, 4) for number in range(6)]
    steady, long = frozenset(range(4)), range(4, 10)
    made = (
        Planned("replicated", "replicated", step_tokens=8192),
        Planned("replicated@chunk-128", "replicated", step_tokens=128),
        Planned("disaggregated", "disaggregated", step_tokens=8192),
    )
    whole, cut, apart = (ways.serve_requests(CLUSTER, one, requests) for one in made)
    assert whole.itl_s(99, steady) == pytest.approx(0.1 + 1.0 + 2 * 0.01)
    assert cut.itl_s(99, steady) == pytest.approx(0.1 + 0.126 + 2 * 0.01)
    assert (apart.itl_s(99, steady) or 1) < 0.16
    assert min(cut.ttft_s[i] for i in long) > max(whole.ttft_s[i] for i in long)


def test_ways_of_a_lab_file() -> None:
    """Budgets, nodes and ranks of the lab's own arms and of its [[way]] sections."""
    lab = labs.load_lab("embedded-ways")
    found = {one.arm: one for one in (*ways.own(lab), *(ways.of_way(lab, way) for way in lab.ways))}
    assert list(found)[:3] == ["single", "replicated", "disaggregated"]
    assert (found["replicated"].nodes, found["replicated"].step_tokens) == (2, 2048)
    assert found["replicated@chunk-128"].step_tokens == 128
    sharded = found["sharded"]
    assert (sharded.ranks, sharded.step_tokens, sharded.max_seqs) == (2, 4096, 256)
    by_role = found["disaggregated@by-role"]
    assert (by_role.step_tokens, by_role.decode_step_tokens) == (2048, 2048)
    assert (by_role.max_seqs, by_role.decode_max_seqs) == (128, 8)

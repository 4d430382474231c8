"""Claims of others beside the points of a frontier.

Oracle: tables whose winners are seen at a glance; requests counted by hand.
"""

from __future__ import annotations

import math

import pytest

from disagglab.predict import claims
from disagglab.predict.claims import Cell, Claim
from disagglab.predict.simulation import Served


def cells(*rows: tuple[float, float, float, float]) -> list[Cell]:
    """Of TTFT limit, TPOT limit, goodput of replicas and of disaggregated serving, at 20 requests/s."""
    return [Cell(20.0, ttft, tpot, {"replicated@x": r, "disaggregated": d}) for ttft, tpot, r, d in rows]


CORNERS = cells((1, 0.01, 3, 3), (1, 0.1, 5, 3), (9, 0.01, 3, 5), (9, 0.1, 5, 5))
NAMED = {one.name: one for one in claims.CLAIMS}
TAICHI = [NAMED["tight TTFT, relaxed TPOT"], NAMED["relaxed TTFT, tight TPOT"]]


def verdicts(grid: list[Cell], some: list[Claim], tags: tuple[str, ...] = ()) -> list[str]:
    """In the order of the claims."""
    return [one.verdict for one in claims.judge(grid, tags, some)]


def test_corners_bear_a_claim_out_or_refute_it() -> None:
    """As TaiChi says; the other way round; and level, which tells nothing."""
    assert verdicts(CORNERS, TAICHI) == ["held", "held"]
    turned = [
        Cell(one.rate_per_s, one.ttft_limit_s, one.tpot_limit_s,
             dict(zip(one.goodput_per_s, reversed(list(one.goodput_per_s.values())), strict=True)))
        for one in CORNERS
    ]  # fmt: skip
    assert verdicts(turned, TAICHI) == ["refuted", "refuted"]
    level = cells(*((ttft, tpot, 5, 5.1) for ttft in (1, 9) for tpot in (0.01, 0.1)))
    assert verdicts(level, TAICHI) == ["not tested", "not tested"]
    nobody = cells(*((ttft, tpot, 0, 0) for ttft in (1, 9) for tpot in (0.01, 0.1)))
    assert verdicts(nobody, TAICHI) == ["not tested", "not tested"]
    assert verdicts([*CORNERS, *cells((1, 0.1, 1, 3))], TAICHI) == ["mixed", "held"]


def test_a_claim_is_tested_where_it_speaks() -> None:
    """Not in other corners, with one limit, at other rates, without a way of either side, on other labs."""
    judged = claims.judge(CORNERS, (), TAICHI)
    assert [(one.bears_out, one.speaks_against, one.level) for one in judged] == [(1, 0, 0), (1, 0, 0)]
    assert verdicts(CORNERS[:2], TAICHI) == ["not tested", "not tested"]
    alone = [Cell(20.0, one.ttft_limit_s, one.tpot_limit_s, {"disaggregated": 1.0}) for one in CORNERS]
    assert verdicts(alone, TAICHI) == ["not tested", "not tested"]
    rates = [NAMED["many requests"], NAMED["few requests"]]
    assert verdicts(CORNERS, rates) == ["not tested", "not tested"]
    assert verdicts(CORNERS, [NAMED["with RDMA"]]) == ["not tested"]
    assert verdicts(CORNERS[2:3], [NAMED["with RDMA"]], ("rdma",)) == ["held"]
    with pytest.raises(ValueError, match="unknown tags tcp"):
        claims.judge(CORNERS, ("tcp",))


def test_level_counts_where_nothing_is_to_be_gained() -> None:
    """Where both limits are relaxed, as much goodput is no more goodput; more of it refutes the claim."""
    claim = NAMED["no throughput gained"]
    assert verdicts(CORNERS, [claim]) == ["held"]
    assert verdicts([*CORNERS[:3], *cells((9, 0.1, 5, 6))], [claim]) == ["refuted"]


def test_a_factor_has_to_be_reached() -> None:
    """40 % more is claimed: 1.4 times is enough, 1.3 times is not, and equal refutes it."""
    claim, tags = NAMED["40 to 60 % more"], ("multi-turn", "kv-routing")
    for ours, told in ((1.4, "held"), (1.3, "refuted"), (1.0, "refuted")):
        assert verdicts(cells((1, 0.1, 1.0, ours)), [claim], tags) == [told]


def test_grid_counts_requests_under_every_pair_of_limits() -> None:
    """Two requests in 10 s: TTFT 1 and 3 s, TPOT 0.1 and 0.2 s in one run; both good in the other."""
    runs = {
        ("disaggregated", 2.0): (Served((1.0, 3.0), (0.1, 0.2), (2.0, 5.0), 10.0),),
        ("replicated", 2.0): (
            Served((1.0, 3.0), (0.1, 0.2), (2.0, 5.0), 10.0),
            Served((0.1, 0.1), (0.01, 0.01), (2.0, 5.0), 10.0),
        ),
    }
    found = {(one.ttft_limit_s, one.tpot_limit_s): one for one in claims.grid(runs, (1, 5), (0.1, 0.3))}
    assert len(found) == 4
    assert found[1, 0.1].goodput_per_s == pytest.approx({"disaggregated": 0.1, "replicated": 0.15})
    assert found[5, 0.3].goodput_per_s == pytest.approx({"disaggregated": 0.2, "replicated": 0.2})
    assert claims.kind("replicated@chunk-128-again") == claims.kind("replicated-again") == "replicated"
    assert found[1, 0.1].best(("sharded",)) is None


def test_every_claim_can_be_tested() -> None:
    """Kinds, tags and corners that exist; a source, and words; no name twice."""
    assert len(NAMED) == len(claims.CLAIMS)
    for one in claims.CLAIMS:
        assert one.says
        assert one.source
        assert set(one.ahead).isdisjoint(one.behind)
        assert one.wants <= set(claims.TAGS)
        assert 0 <= one.above_per_s < one.below_per_s <= math.inf

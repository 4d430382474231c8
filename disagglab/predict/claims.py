"""What others say about when splitting prefill and decode pays, beside the points of a frontier.

A claim is data: a corner of the plane of TTFT and TPOT limits, a range of rates, kinds of ways that are to be
ahead there, and those that are to be behind. It is held against goodput, forecast or measured alike.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from disagglab.config.schema import SloSection
from disagglab.predict.frontier_forecast import Runs
from disagglab.predict.goodput import MARGIN, goodput
from disagglab.predict.ways import Kind

SHARE = 1 / 3  # of a grid's limits, from either end, that are called tight, and relaxed

Corner = Literal["tight", "relaxed"]
Verdict = Literal["held", "refuted", "mixed", "not tested"]


@dataclass(frozen=True)
class Claim:
    """``ahead``, ``behind``: kinds; the best way of each is taken. ``ttft``, ``tpot``: among the limits of a
    grid, None: any. ``above_per_s``, ``below_per_s``: offered rates.

    ``factor``: by which the one is to be ahead at least. ``level_counts``: whether it is enough not to be
    behind. ``wants``: what has to be true of lab and load, by tag of TAGS.
    """

    name: str
    source: str
    says: str
    ahead: tuple[Kind, ...]
    behind: tuple[Kind, ...]
    ttft: Corner | None = None
    tpot: Corner | None = None
    above_per_s: float = 0.0
    below_per_s: float = math.inf
    factor: float = 1.0
    level_counts: bool = False
    wants: frozenset[str] = frozenset()


TAGS = {
    "rdma": "KV crosses a link with RDMA",
    "no-rdma": "KV crosses a link without RDMA",
    "multi-turn": "conversations of several turns, which share prefixes",
    "single-turn": "requests that share nothing",
    "kv-routing": "a router that knows what is cached where",
}
TOGETHER: tuple[Kind, ...] = ("replicated", "sharded")  # prefill and decode on the same servers
APART: tuple[Kind, ...] = ("disaggregated",)
TAICHI = "TaiChi, arXiv 2508.01989, abstract"
VLLM_DOCS = "vLLM documentation, features/disagg_prefill"
SEED = "the seed AI Dynamo: The Hard Way, When to Use Disaggregated Serving"
CLAIMS = (
    Claim(
        "tight TTFT, relaxed TPOT", TAICHI,
        "aggregation is optimal under tight TTFT and relaxed TPOT",
        TOGETHER, APART, ttft="tight", tpot="relaxed",
    ),
    Claim(
        "relaxed TTFT, tight TPOT", TAICHI,
        "disaggregation excels under strict TPOT and relaxed TTFT",
        APART, TOGETHER, ttft="relaxed", tpot="tight",
    ),
    Claim(
        "no throughput gained", VLLM_DOCS,
        "disaggregated prefill does not improve throughput: where both limits are relaxed it is not ahead",
        TOGETHER, APART, ttft="relaxed", tpot="relaxed", level_counts=True,
    ),
    Claim(
        "many requests", SEED, "good fit: high request volume (> 100 requests/s)",
        APART, TOGETHER, above_per_s=100,
    ),
    Claim(
        "few requests", SEED, "poor fit: low request volume (< 10 requests/s)",
        TOGETHER, APART, below_per_s=10,
    ),
    Claim(
        "latency first", SEED,
        "poor fit: latency more critical than throughput; taken as both limits tight",
        TOGETHER, APART, ttft="tight", tpot="tight",
    ),
    Claim(
        "with RDMA", SEED, "good fit: RDMA-capable network available",
        APART, TOGETHER, wants=frozenset({"rdma"}),
    ),
    Claim(
        "without RDMA", SEED, "poor fit: no RDMA hardware",
        TOGETHER, APART, wants=frozenset({"no-rdma"}),
    ),
    Claim(
        "one turn", SEED, "poor fit: mostly single-turn requests",
        TOGETHER, APART, wants=frozenset({"single-turn"}),
    ),
    Claim(
        "several turns", SEED, "good fit: multi-turn conversations (cache reuse)",
        APART, TOGETHER, wants=frozenset({"multi-turn"}),
    ),
    Claim(
        "40 to 60 % more", "the seed AI Dynamo: The Hard Way, Performance Results",
        "throughput 40-60% higher than round-robin routing, with cache-aware routing; taken as goodput",
        APART, ("replicated",), factor=1.4, wants=frozenset({"multi-turn", "kv-routing"}),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Good requests per second of each arm at one offered rate under one pair of limits."""

    rate_per_s: float
    ttft_limit_s: float
    tpot_limit_s: float
    goodput_per_s: Mapping[str, float]

    def best(self, kinds: Collection[str]) -> float | None:
        """The highest goodput of the arms of some kinds; None where there is no such arm."""
        return max((value for arm, value in self.goodput_per_s.items() if kind(arm) in kinds), default=None)


def kind(arm: str) -> str:
    """The kind of an arm: ``replicated`` of ``replicated@chunk-128``, and of its A/A twin."""
    return arm.partition("@")[0].removesuffix("-again")


def grid(runs: Runs, ttft_limits_s: Sequence[float], tpot_limits_s: Sequence[float]) -> list[Cell]:
    """Mean goodput of runs, forecast or measured, at every rate under every pair of limits."""
    rates = sorted({rate for _, rate in runs})
    cells = []
    for rate, ttft, tpot in itertools.product(rates, ttft_limits_s, tpot_limits_s):
        slo = SloSection(ttft_s=ttft, tpot_s=tpot)
        there = {arm: each for (arm, at), each in runs.items() if at == rate}
        means = {
            arm: statistics.fmean(goodput(one, slo).per_s for one in each) for arm, each in there.items()
        }
        cells.append(Cell(rate, ttft, tpot, means))
    return cells


@dataclass(frozen=True)
class Judged:
    """A claim beside a frontier. ``bears_out``, ``speaks_against``, ``level``: cells of its corner, by what
    they say; cells in which no way has a good request are none of them. ``why``: of a claim that is not
    tested.
    """

    claim: str
    source: str
    says: str
    verdict: Verdict
    bears_out: int
    speaks_against: int
    level: int
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A plain record for JSON."""
        return asdict(self)


def judge(
    cells: Sequence[Cell],
    tags: Collection[str] = (),
    claims: Iterable[Claim] = CLAIMS,
    margin: float = MARGIN,
) -> list[Judged]:
    """Every claim beside a grid.

    *held*: cells bear it out, and none speaks against it; *refuted*: the other way round; *mixed*: both.
    *not tested*: the grid has no cell of that corner and those rates, or no way of one side, or tells no two
    ways apart there; or lab and load are not what the claim is about.

    Args:
        tags: what is true of lab and load, of TAGS.
        margin: relative difference of goodput below which the two sides are level.

    Raises:
        ValueError: if a tag is not one of TAGS.
    """
    if unknown := sorted(set(tags) - set(TAGS)):
        raise ValueError(f"unknown tags {', '.join(unknown)}; there are {', '.join(TAGS)}")
    return [_judged(one, cells, tags, margin) for one in claims]


def _judged(claim: Claim, cells: Sequence[Cell], tags: Collection[str], margin: float) -> Judged:
    def said(verdict: Verdict, counts: tuple[int, int, int] = (0, 0, 0), why: str = "") -> Judged:
        return Judged(claim.name, claim.source, claim.says, verdict, *counts, why)

    if missing := sorted(claim.wants - set(tags)):
        return said("not tested", why=f"not the case here: {'; '.join(TAGS[one] for one in missing)}")
    ttft = _limits({one.ttft_limit_s for one in cells}, claim.ttft)
    tpot = _limits({one.tpot_limit_s for one in cells}, claim.tpot)
    there = [
        one
        for one in cells
        if one.ttft_limit_s in ttft
        and one.tpot_limit_s in tpot
        and claim.above_per_s < one.rate_per_s < claim.below_per_s
    ]
    if not there:
        return said("not tested", why="no point has such limits and rates")
    bears_out = against = level = 0
    for cell in there:
        ahead, behind = cell.best(claim.ahead), cell.best(claim.behind)
        if ahead is None or behind is None:
            return said("not tested", why="one side has no way here")
        if ahead == behind == 0:
            continue
        needed = claim.factor if claim.factor > 1 else 1 + margin
        if ahead >= behind * needed:
            bears_out += 1
        elif behind >= ahead * (1 + margin) or claim.factor > 1:
            against += 1
        else:
            level += 1
    counts = bears_out, against, level
    confirmed = bears_out + (level if claim.level_counts else 0)
    if not confirmed and not against:
        return said("not tested", counts, "the ways are level there, or none has a good request")
    return said("mixed" if confirmed and against else "held" if confirmed else "refuted", counts)


def _limits(limits: Collection[float], corner: Corner | None) -> set[float]:
    """Those of a corner: a third of them from either end; none where there is only one limit."""
    ordered = sorted(limits)
    if corner is None:
        return set(ordered)
    many = max(1, int(len(ordered) * SHARE)) if len(ordered) > 1 else 0
    return set(ordered[:many] if corner == "tight" else ordered[len(ordered) - many :])

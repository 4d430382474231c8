"""What others expect of Dynamo, held against the intervals that were measured. None of it is assumed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagglab.experiments.beside_dynamo import DYNAMO_KV, DYNAMO_ROUND_ROBIN, tagged
from disagglab.experiments.conversations import (
    CONVERSATIONS,
    E2E,
    FIGURES,
    HIT_RATE,
    MARGIN,
    THROUGHPUT,
    values,
)
from disagglab.experiments.match import LIMIT
from disagglab.experiments.routing import BLOCK_SIZE, Held, times_by_hit
from disagglab.results.gate import GateState, State
from disagglab.results.records import VerdictRow
from disagglab.serving.topology import DISAGGREGATED, SINGLE
from disagglab.stats.verdict import Verdict, judge

HITS, MISSES = "turns that found their history", "turns that did not"
CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "open"


@dataclass(frozen=True)
class Expectation:
    """What is said of Dynamo: candidate over baseline lies between ``low`` and ``high``, as ratio - 1.

    ``limit``: what is compared with where there is no other arm.
    """

    said: str
    figure: str
    candidate: str
    baseline: str
    low: float
    high: float
    limit: float | None = None


# What the notebooks that this lab replaces print, without having measured it.
EXPECTATIONS = (
    Expectation(
        "40-60 % more throughput than round robin", THROUGHPUT, DYNAMO_KV, DYNAMO_ROUND_ROBIN, 0.40, 0.60
    ),
    Expectation("30-40 % less latency by KV-aware routing", E2E, DYNAMO_KV, DYNAMO_ROUND_ROBIN, -0.40, -0.30),
    Expectation("30-40 % faster than naive disaggregation", E2E, DYNAMO_KV, DISAGGREGATED, -0.40, -0.30),
    Expectation(
        "latency 115 ms against 150 ms of one node", E2E, DYNAMO_KV, SINGLE, 115 / 150 - 1, 115 / 150 - 1
    ),
    Expectation("latency 100 ms on a hit, 150 ms on a miss", E2E, HITS, MISSES, 100 / 150 - 1, 100 / 150 - 1),
    Expectation("70-85 % hits", HIT_RATE, DYNAMO_KV, LIMIT, 0.70 / 0.75 - 1, 0.85 / 0.75 - 1, limit=0.75),
)


def hits_and_misses(told: Mapping[str, Sequence[Held]], figure: str = E2E) -> list[tuple[float, float]]:
    """(miss, hit) of each round: latency of turns of Dynamo's arms that found their history, and others'.

    Compared at equal turn, because later prompts are longer: geometric means, over the turns that have both,
    of the medians. A round in which no turn has both is left out.

    Args:
        figure: E2E or TTFT, s.
    """
    pairs = []
    arms = [told[name] for name in (DYNAMO_ROUND_ROBIN, DYNAMO_KV) if name in told]
    for together in zip(*arms, strict=True):
        found = times_by_hit(together, BLOCK_SIZE, lambda turn: turn.e2e_s if figure == E2E else turn.ttft_s)
        both = [turn for turn in found.hits if turn in found.misses]
        if both:
            hit, miss = (
                statistics.geometric_mean(statistics.median(times[turn]) for turn in both)
                for times in (found.hits, found.misses)
            )
            pairs.append((miss, hit))
    return pairs


def span(one: Expectation) -> tuple[float, float]:
    """What counts as expected: a single value, in which no interval could lie, with MARGIN to each side."""
    width = MARGIN if one.low == one.high else 0.0
    return one.low - width, one.high + width


def standing(one: Expectation, verdict: Verdict) -> str:
    """What the interval says of an expectation.

    ``confirmed``: it lies within the expected range (:func:`span`); ``refuted``: it has nothing in common
    with it; ``open``: anything else, and in any case what has no spread. One round is never confirmed.
    """
    if verdict.smallest_detectable is None:
        return OPEN
    low, high = span(one)
    if verdict.high < low or verdict.low > high:
        return REFUTED
    return CONFIRMED if low <= verdict.low and verdict.high <= high else OPEN


def expectation_rows(told: Mapping[str, Sequence[Held]]) -> list[VerdictRow]:
    """One row an expectation of which both sides were measured. ``gate`` says how it stands."""
    rows = []
    for one in EXPECTATIONS:
        if one.limit is not None:
            pairs = [(one.limit, rate) for rate in values(told, one.candidate, one.figure)]
        elif one.candidate == HITS:
            pairs = hits_and_misses(told, one.figure)
        else:
            measured = [values(told, arm, one.figure) for arm in (one.baseline, one.candidate)]
            pairs = list(zip(*measured, strict=True)) if all(measured) else []
        if not pairs:
            continue
        metric = FIGURES[one.figure]
        verdict = judge(pairs, metric.better, MARGIN)
        low, high = span(one)
        row = VerdictRow.of(
            verdict,
            workload=CONVERSATIONS,
            metric=one.figure,
            unit=metric.unit,
            candidate=tagged(one.candidate),
            baseline=tagged(one.baseline),
            candidate_value=statistics.fmean(right for _, right in pairs),
            baseline_value=statistics.fmean(left for left, _ in pairs),
            gate=GateState(State.EXPECTED, about=f"{low:+.0%} to {high:+.0%}", answer=standing(one, verdict)),
            reason=f"expected: {one.said}; {verdict.reason}",
        )
        rows.append(row)
    return rows

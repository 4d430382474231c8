"""The frontier: each way at several offered rates, forecast before, judged for the promise and around it.

Every point is runs that were proved by the ledger, on arrivals that were drawn beforehand, the same for all
ways. The oracle for "good" is the [slo] of the lab file; the bands are of log-ratios within a round
(disagglab/results/standing.py). The forecast is on disk before the first run, and is scored, not asserted: a
refuted forecast is a result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from disagglab.config.arms import AGAIN, twin_of
from disagglab.config.schema import Lab, SloSection
from disagglab.experiments.campaign import Campaign
from disagglab.predict import claims, forecast_score, goodput
from disagglab.predict.claims import Judged
from disagglab.pytest_plugin.session import Session
from disagglab.results import frontier_file, frontier_plots, frontier_text
from disagglab.results.frontier import Frontier, pareto
from disagglab.results.gate import GateState, State
from disagglab.results.recorder import Recorder
from disagglab.results.records import VerdictRow
from disagglab.results.run_folder import Store
from disagglab.stats.metric import METRICS
from disagglab.stats.verdict import judge

from .conftest import FORECAST, Entered, Foreseen

pytestmark = pytest.mark.lab_has("tuning", "slo")

SCORE, CLAIMS = "forecast-score.json", "claims.json"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the lab's limits, in the grid that claims are held against
MARGIN = 0.05
FULL_RATES = 5  # of a frontier that is not short


def test_frontier_was_forecast_before_it_was_measured(
    foreseen: Foreseen, campaign: Campaign, entered: Entered, store: Store
) -> None:
    """The forecast is on disk before the first run at an offered rate, with every way at every rate."""
    path = store.folder / FORECAST
    assert path.stat().st_mtime_ns < campaign.begun_ns
    points = {(one.arm, one.rate_per_s) for one in foreseen.forecast.points}
    arms = [one.arm for one in entered.contenders if not one.again]
    assert points == {(arm, one.rate_per_s) for arm in arms for one in foreseen.rated}
    assert campaign.rated


def test_every_point_is_proved(
    campaign: Campaign, foreseen: Foreseen, entered: Entered, live: Session
) -> None:
    """Every way has a valid run at every rate in every round; none is left out.

    Below five rates no curve is drawn: --short has one.
    """
    invalid = [run for run in (*campaign.rated, *campaign.gated.runs) if run.invalid is not None]
    assert not invalid, f"{len(invalid)} runs are invalid; first: {invalid[0].topology}: {invalid[0].invalid}"
    assert live.short or len(foreseen.rated) >= FULL_RATES
    rounds = {run.round for run in campaign.rated}
    for one in entered.contenders:
        there = {(run.workload.rate_per_s, run.round) for run in campaign.at(one.arm)}
        assert there == {(each.rate_per_s, number) for each in foreseen.rated for number in rounds}, one.arm


def test_frontier_of_every_way(measured: Frontier, live: Session, store: Store, record: Recorder) -> None:
    """Tokens/s per node against tokens/s per user, p99 ITL and goodput by rate, and who is ahead, in words.

    The same figures come out of the session's folder again: disagglab frontier FOLDER.
    """
    with live.uncaptured():
        live.progress("frontier").tell(frontier_text.lines(measured))
    frontier_plots.record(record, measured)
    assert {point.arm for point in pareto(measured.points())} <= set(measured.arms)
    again = frontier_file.read(store.folder)
    assert frontier_text.lines(again) == frontier_text.lines(measured)


def test_turns_leave_open_what_a_second_start_shows(
    measured: Frontier, live: Session, store: Store, record: Recorder
) -> None:
    """The replicas started again beside themselves: what differs is noise of starts, and an A/A row.

    Skipped with --short, which has no twin.
    """
    if live.short:
        pytest.skip("SHORT: the twin of the replicas is a start more in every round")
    (twin,) = (arm for arm in measured.arms if arm.endswith(AGAIN))
    (arm,) = (one for one in measured.arms if twin_of(one) == twin)
    promise = measured.promise
    for metric in ("output_tokens_per_s", "itl_p99"):
        pairs = []
        for rate in measured.rates:
            for one, other in zip(measured.at(arm, rate), measured.at(twin, rate), strict=True):
                values = [
                    run.output_tokens / run.duration_s if metric == "output_tokens_per_s" else run.itl_p99_s
                    for run in (one, other)
                ]
                assert None not in values, f"{metric} needs 100 gaps a run"
                pairs.append((float(values[0] or 0), float(values[1] or 0)))
        verdict = judge(pairs, METRICS[metric].better, MARGIN)
        store.add(
            VerdictRow.of(
                verdict,
                workload=f"{measured.workload}, offered rates",
                metric=metric,
                unit=METRICS[metric].unit,
                candidate=twin,
                baseline=arm,
                candidate_value=sum(right for _, right in pairs) / len(pairs),
                baseline_value=sum(left for left, _ in pairs) / len(pairs),
                gate=GateState(State.IDENTICAL),
            )
        )
        record.numbers(
            f"{metric}, second start / first",
            [right / left for left, right in pairs],
            "ratio",
            arm=arm,
            note=f"{verdict.outcome}; pairs of all rates and rounds; {promise}",
        )
        assert verdict.rounds == len(measured.rates) * len({run.round for run in measured.runs})


def test_forecast_is_scored(foreseen: Foreseen, measured: Frontier, store: Store, record: Recorder) -> None:
    """Every point that was forecast is held beside what was measured: winners by rate, error of goodput."""
    good = {
        (arm, rate): [run.good_per_s(measured.promise) for run in measured.at(arm, rate)]
        for arm in measured.arms
        if not arm.endswith(AGAIN)
        for rate in measured.rates
    }
    found = forecast_score.score(foreseen.forecast, good)
    (store.folder / SCORE).write_text(json.dumps(found.as_dict(), indent=1))
    assert not found.left_out
    assert len(found.rates) == len(measured.rates)
    said = "; ".join(
        f"{one.rate_per_s:.3g}/s forecast {one.forecast}, measured {one.measured}: {one.outcome}"
        for one in found.rates
    )
    for name, value in (
        ("rates whose winner was forecast rightly", found.right_share),
        ("or not told from the winner", found.right_or_tie_share),
    ):
        if value is not None:
            record.numbers(name, [value], "share", what="rates", note=said)
    for name, value in (
        ("goodput forecast against measured, median", found.median_factor),
        ("goodput forecast against measured, worst", found.worst_factor),
    ):
        if value is not None:
            record.numbers(name, [value], "factor", what="points", note=f"worst at {found.worst_at}")
    for arm in measured.arms:
        if arm.endswith(AGAIN):
            continue
        ahead = {one.rate_per_s: one.goodput_per_s for one in foreseen.forecast.points if one.arm == arm}
        record.plot(
            f"Goodput forecast and measured: {arm}",
            "offered requests/s",
            "good requests/s",
            {
                "forecast": (list(ahead), list(ahead.values())),
                "measured": (
                    [rate for rate in measured.rates for _ in good[arm, rate]],
                    [value for rate in measured.rates for value in good[arm, rate]],
                ),
            },
            style="points and their lines",
            caption=f"Good: {measured.promise}.",
        )


def test_claims_of_others_beside_the_frontier(
    foreseen: Foreseen,
    campaign: Campaign,
    measured: Frontier,
    lab: Lab,
    slo: SloSection,
    store: Store,
    record: Recorder,
) -> None:
    """What papers and the project's seeds say about when splitting pays, by limits around the lab's own.

    Held against what was forecast and what was measured; a claim whose premise the lab has not got (RDMA,
    turns that come back) is not tested, and says why.
    """
    seen = {
        (arm, rate): [goodput.seen(run) for run in campaign.at(arm) if run.workload.rate_per_s == rate]
        for arm in measured.arms
        if not arm.endswith(AGAIN)
        for rate in measured.rates
    }
    ttft, tpot = ([factor * limit for factor in FACTORS] for limit in (slo.ttft_s, slo.tpot_s))
    tags = {"single-turn", "rdma" if any(node.rdma for node in lab.nodes) else "no-rdma"}
    by_side: dict[str, Sequence[Judged]] = {
        side: claims.judge(claims.grid(runs, ttft, tpot), tags)
        for side, runs in (("forecast", foreseen.served), ("measured", seen))
    }
    (store.folder / CLAIMS).write_text(
        json.dumps({side: [one.as_dict() for one in found] for side, found in by_side.items()}, indent=1)
    )
    assert {len(found) for found in by_side.values()} == {len(claims.CLAIMS)}
    for before, after in zip(by_side["forecast"], by_side["measured"], strict=True):
        told = after.bears_out + after.speaks_against + after.level
        assert (after.verdict == "not tested") or told, after
        record.numbers(
            f"claim: {after.claim}",
            [after.bears_out, after.speaks_against, after.level],
            "cells",
            what="for, against, level",
            note=f"{after.source}: {after.says}; measured: {after.verdict} {after.why}; forecast:"
            f" {before.verdict}",
        )

"""Goodput under the lab's objective: where disaggregation wins, where it loses, predicted and then measured.

Means hide what a limit does: one arm may be slower on average and still keep a promise that the other breaks.
Before anything is measured here, the model of docs/explanation/break-even.md, with this session's speeds,
names the point at which disaggregated serving is most surely ahead in good requests per second, and the one
at which the replicas are. The oracle is the load: open-loop runs of both topologies, in turns, with the same
arrivals in a round and others in the next; each proved by its ledger, judged by the interval of all other
verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from disagglab.config.schema import Lab, SloSection
from disagglab.experiments import rounds
from disagglab.experiments.calibration import Calibration
from disagglab.experiments.comparison import Comparison
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.predict import breakeven, breakeven_points, goodput
from disagglab.predict.breakeven_points import Agreement, Budget
from disagglab.predict.goodput import KINDS, MARGIN, USEFUL, Arms, GoodputForecast, Named, seen
from disagglab.pytest_plugin.session import Session
from disagglab.results.gate import GateState, State
from disagglab.results.recorder import Recorder
from disagglab.results.records import VerdictRow
from disagglab.results.run_folder import Store
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, Topology
from disagglab.stats.verdict import Verdict, holm

SEED = 69_000  # of the rounds
SEARCH_SEEDS = range(70_000, 70_005)  # others, so that the points do not fit the arrivals of the rounds
WINDOW_S, SHORT_WINDOW_S = 8.0, 4.0  # in which the requests of one run arrive
MOST_E2E_S, SHORT_MOST_E2E_S = 6.0, 5.0  # of a request; a run is over so long after its window
LEAST_REQUESTS, SHORT_LEAST_REQUESTS = 30, 5  # of a run; a share of good requests is known to one in so many
STRETCHES = (1.0, 1.5, 2.25)  # of window and E2E, until there are both a win and a loss
LOADS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)  # of what the replicas can bear
LEAST_PROMPT, MOST_OUTPUT = 128, 512  # tokens
LEAST_OUTPUT = 16  # tokens; in a shorter answer one late token decides
TTFT_FACTORS, TPOT_FACTORS = (0.5, 1.0, 2.0), (0.5, 0.75, 1.0, 1.5, 2.0)  # of the objective, for the table
UNBOUNDED = 100.0  # a limit above it says that too few rounds were run, not how large the ratio is
PAIR = f"{DISAGGREGATED} / {REPLICATED}"


@dataclass
class Chosen:
    """The points that the model named, by kind, with their runs.

    ``named``: what the search said of each kind. ``points``: of the kinds that it found. ``expected``: the
    same points for the very arrivals of the rounds.
    """

    named: dict[str, Named]
    points: dict[str, GoodputForecast]
    expected: dict[str, Arms]
    comparison: Comparison = field(default_factory=Comparison)

    def measured(self, kind: str) -> Arms:
        """What the clients saw, one run a round."""
        name = self.points[kind].name
        return Arms(
            tuple(seen(run) for run in self.comparison.valid(name, REPLICATED)),
            tuple(seen(run) for run in self.comparison.valid(name, DISAGGREGATED)),
        )


@pytest.fixture(scope="module")
def slo(lab: Lab) -> SloSection:
    """The lab's objective."""
    assert lab.slo is not None
    return lab.slo


@pytest.fixture(scope="module")
def chosen(
    slo: SloSection,
    calibration: Calibration,
    live: Session,
    lab: Lab,
    engine: LoadEngine,
    replicated: Topology,
    disaggregated: Topology,
    shape: KvShape,
    store: Store,
) -> Chosen:
    """The clearest win and the clearest loss, measured round by round, in mirrored order."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    cluster = calibration.cluster(lab, shape, block)
    longest = lab.model.max_model_len
    window, most_e2e, least = (
        (SHORT_WINDOW_S, SHORT_MOST_E2E_S, SHORT_LEAST_REQUESTS)
        if live.short
        else (WINDOW_S, MOST_E2E_S, LEAST_REQUESTS)
    )
    line = live.progress("goodput")

    def searches() -> Iterator[list[GoodputForecast]]:
        for stretch in STRETCHES:
            with live.uncaptured():
                line.show(f"search, runs of {window * stretch:g} s")
            yield list(
                goodput.forecasts(
                    cluster,
                    slo,
                    breakeven.lengths(LEAST_PROMPT, longest // 2),
                    breakeven.lengths(LEAST_OUTPUT, MOST_OUTPUT),
                    LOADS,
                    Budget(window * stretch, most_e2e * stretch, longest),
                    least,
                    SEARCH_SEEDS,
                )
            )

    named = goodput.named(searches())
    points = {kind: one.clearest for kind, one in named.items() if one.clearest is not None}
    assert points, (
        f"at none of {named['win'].looked_at} points does either topology keep TTFT {slo.ttft_s:g} s and TPOT"
        f" {slo.tpot_s:g} s for {USEFUL:.0%} of its requests and the other fewer; change [slo] of {lab.file}"
    )
    seeds = {
        kind: [SEED + 100 * place + number for number in range(live.rounds)]
        for place, kind in enumerate(KINDS)
    }
    expected = {
        kind: goodput.forecast(cluster, one.point, one.load, slo, one.window_s, seeds[kind]).arms
        for kind, one in points.items()
    }
    result = Chosen(named, points, expected, Comparison(slo=slo))
    kinds = list(points)
    said = {one.name: f"predicted {kind}: {one.said}" for kind, one in points.items()}
    turns = rounds.trials(
        (replicated, disaggregated),
        lambda _: [one.workload for one in points.values()],
        live.rounds,
        lambda number, position: seeds[kinds[position]][number],
    )
    with live.uncaptured():
        for run in rounds.runs(engine, turns, shape, store, line.show, lambda one: said[one.name]):
            result.comparison.runs.append(run)
    line.done(f"{len(result.comparison.runs)} runs, {len(result.comparison.invalid())} invalid")
    return result


@pytest.mark.lab_has("slo", "own_cores")
def test_predicted_win_and_loss_of_goodput_are_not_refuted(
    chosen: Chosen, slo: SloSection, live: Session, store: Store, record: Recorder
) -> None:
    """Where the model is surest that disaggregation gains or loses goodput, no measurement says otherwise.

    A measurement agrees (its 95 % interval excludes 1 on the predicted side), or is undecided; it must not
    lie on the other side, nor be equivalent where a difference was predicted. Prediction, measurement and
    verdict are recorded; so is it if the model knows no win on this lab, and then the loss alone is measured.
    """
    broken = chosen.comparison.invalid()
    assert not broken, f"{len(broken)} runs are invalid; the first: {broken[0].topology}: {broken[0].invalid}"
    promise = f"SLO: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s"
    for kind in KINDS:
        said = chosen.named[kind]
        note = f"{promise}; of {said.looked_at} points that a run can show"
        if kind not in chosen.points:
            note += f"; no {kind} is predicted on this lab, so none was measured"
        name = f"points predicted as a {kind} of goodput"
        record.numbers(name, [said.called], "points", what="model", note=note)
    verdicts = {}
    for kind in chosen.points:
        measured = chosen.measured(kind)
        assert len(measured.replicated) == len(measured.disaggregated) == live.rounds, f"{kind}: rounds lack"
        verdicts[kind] = measured.verdict(slo)
    adjusted = holm([verdict.p for verdict in verdicts.values()])
    refuted = []
    for (kind, verdict), p_adjusted in zip(verdicts.items(), adjusted, strict=True):
        point = chosen.points[kind]
        stance = breakeven_points.agreement(1 / point.ratio, verdict)  # there lower is better
        store.add(verdict_row(chosen, kind, slo, verdict, stance, p_adjusted))
        record_point(record, chosen, kind, promise, verdict, stance)
        record_limits(record, chosen, kind, slo)
        draw(record, chosen, kind, slo)
        if stance == "disagrees":
            refuted.append(
                f"predicted {kind}, {point.said}: ratio {point.ratio:.2f}, measured {interval(verdict)}"
                f" ({verdict.outcome})"
            )
    assert not refuted, f"{promise}: {'; '.join(refuted)}"


STANCES: dict[Agreement, str] = {
    "agrees": "the measurement agrees",
    "disagrees": "the measurement disagrees",
    "undecided": "the measurement decides nothing",
}


def interval(verdict: Verdict) -> str:
    """A ratio with its limits."""
    high = f"{1 + verdict.high:.2f}" if verdict.high < UNBOUNDED else "unbounded"
    return f"{1 + verdict.effect:.2f}, 95 % CI {1 + verdict.low:.2f} to {high}"


def verdict_row(
    chosen: Chosen, kind: str, slo: SloSection, verdict: Verdict, stance: Agreement, p_adjusted: float
) -> VerdictRow:
    """The verdict on a point as the report's table shows it. ``p_adjusted``: of no difference, with Holm's
    correction over the points of the session.
    """
    point = chosen.points[kind]
    theirs, ours = chosen.measured(kind).per_s(slo)
    return VerdictRow.of(
        verdict,
        workload=point.name,
        metric="goodput_per_s",
        unit="requests/s",
        candidate=DISAGGREGATED,
        baseline=REPLICATED,
        candidate_value=ours,
        baseline_value=theirs,
        gate=GateState(State.PREDICTED, about=kind),
        reason=f"{verdict.reason}; SLO TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s; predicted ratio"
        f" {point.ratio:.2f}: {STANCES[stance]}",
        saturated=sum(chosen.comparison.saturated(point.name, arm) for arm in (REPLICATED, DISAGGREGATED)),
        p_adjusted=p_adjusted,
        family=len(chosen.points),
    )


def record_point(
    record: Recorder, chosen: Chosen, kind: str, promise: str, verdict: Verdict, stance: Agreement
) -> None:
    """Keep attainment and goodput of each arm and their ratio, as predicted and as measured."""
    point, expected, measured = chosen.points[kind], chosen.expected[kind], chosen.measured(kind)
    slo = point.slo
    name = f"predicted {kind}, {point.said}"
    about = f"{promise}; {point.workload.requests} requests, {point.point.rate_per_s:.3g} a second"
    for place, arm in enumerate((REPLICATED, DISAGGREGATED)):
        runs = (measured.replicated, measured.disaggregated)[place]
        command = chosen.comparison.valid(point.name, arm)[0].command
        before, here = point.arms.attainment(slo)[place], expected.attainment(slo)[place]
        found = [goodput.goodput(run, slo) for run in runs]
        record.numbers(
            f"SLO attainment, {name}",
            [one.attainment for one in found],
            "share of sent",
            arm=arm,
            command=command,
            note=f"{about}; predicted {before:.2f}, for these arrivals {here:.2f}",
        )
        before, here = point.arms.per_s(slo)[place], expected.per_s(slo)[place]
        record.numbers(
            f"goodput, {name}",
            [one.per_s for one in found],
            "requests/s",
            arm=arm,
            command=command,
            note=f"{about}; predicted {before:.3g}, for these arrivals {here:.3g}",
        )
    record.numbers(
        f"goodput ratio, {name}",
        [
            goodput.goodput(ours, slo).comparable_per_s / goodput.goodput(theirs, slo).comparable_per_s
            for theirs, ours in zip(measured.replicated, measured.disaggregated, strict=True)
        ],
        "ratio",
        arm=PAIR,
        what="rounds",
        note=f"{promise}; predicted {interval(point.verdict)}; for these arrivals"
        f" {1 + expected.verdict(slo).effect:.2f}; measured {interval(verdict)}: {verdict.outcome};"
        f" {STANCES[stance]}; margin {MARGIN:g}; of good requests k of n, (k + 1/2) / (n + 1)",
    )


def record_limits(record: Recorder, chosen: Chosen, kind: str, slo: SloSection) -> None:
    """Keep how the ratio would be under other objectives: which limit decides."""
    point = chosen.points[kind]
    for row in goodput.limits(slo, TTFT_FACTORS, TPOT_FACTORS):
        shown = ", ".join(f"{one.tpot_s * 1e3:g}" for one in row)
        for what, arms in (("predicted", point.arms), ("measured", chosen.measured(kind))):
            record.numbers(
                f"goodput ratio by limit, {what}, TTFT limit {row[0].ttft_s:g} s, {point.said}",
                arms.ratios(row),
                "ratio",
                arm=PAIR,
                what="TPOT limits",
                note=f"TPOT limits {shown} ms, in this order; the lab's SLO: TTFT {slo.ttft_s:g} s, TPOT"
                f" {slo.tpot_s:g} s",
            )


def draw(record: Recorder, chosen: Chosen, kind: str, slo: SloSection) -> None:
    """Share of good requests under every TPOT limit, and the ratio of goodput for several TTFT limits."""
    point, expected, measured = chosen.points[kind], chosen.expected[kind], chosen.measured(kind)
    tpots = sorted({*expected.tpot_limits(), slo.tpot_s})
    shown = [tpot * 1e3 for tpot in tpots]
    slos = [SloSection(ttft_s=slo.ttft_s, tpot_s=tpot) for tpot in tpots]
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for place, arm in enumerate((REPLICATED, DISAGGREGATED)):
        for what, arms in (("measured", measured), ("predicted for these arrivals", expected)):
            series[f"{arm}, {what}"] = (shown, [arms.attainment(one)[place] for one in slos])
    series["limit of the lab"] = ((slo.tpot_s * 1e3,) * 2, (0.0, 1.0))
    record.plot(
        f"Predicted {kind}: good requests by TPOT limit",
        "TPOT limit, ms",
        "good / sent",
        series,
        style="points and their lines",
        caption=f"{point.said}; TTFT limit {slo.ttft_s:g} s; mean over rounds.",
    )
    ratios = {
        f"TTFT limit {slo.ttft_s * factor:g} s": (
            shown,
            point.arms.ratios([SloSection(ttft_s=slo.ttft_s * factor, tpot_s=tpot) for tpot in tpots]),
        )
        for factor in TTFT_FACTORS
    }
    record.plot(
        f"Predicted {kind}: ratio of goodput by TPOT limit",
        "TPOT limit, ms",
        PAIR,
        {**ratios, "equal": (shown, [1.0] * len(shown))},
        style="curves",
        caption=f"{point.said}; predicted. Above 1 disaggregated serving gives more good requests a second."
        f" The lab's limits: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s * 1e3:g} ms.",
    )

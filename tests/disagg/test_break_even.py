"""Where disaggregation beats as many replicas: a map from measured speeds, and points of it measured.

Speeds are measured one at a time on an otherwise idle lab: a prompt alone, steps of 1 to 16 sequences, a
transfer. The map puts them together with queueing theory (docs/explanation/break-even.md) and has seen no
load. The oracle is the load: open-loop runs of both topologies at points of the map, in turns, each proved by
its ledger, judged by the intervals of all other verdicts.

A run of seconds never reaches the equilibrium that the map describes. So each point is also predicted step by
step for the very arrivals of its runs (predict/simulation.py). Where that agrees with what was measured and
the map does not, the run was too short for the map; where neither does, a speed or the model is wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from disagglab.config.arrivals import arrivals
from disagglab.config.schema import Lab
from disagglab.experiments import rounds
from disagglab.experiments.calibration import Calibration
from disagglab.experiments.comparison import Comparison
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.predict import breakeven, breakeven_map, breakeven_points, simulation, speedfit
from disagglab.predict.breakeven import Cluster, Outcome
from disagglab.predict.breakeven_points import Agreement, Budget
from disagglab.predict.roofline import Efficiency
from disagglab.pytest_plugin.session import Session
from disagglab.results import metrics
from disagglab.results.recorder import Recorder
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, Topology
from disagglab.stats.verdict import Verdict, judge

SEED = 68_000
POINTS, SHORT_POINTS = 6, 3
WINDOW_S, SHORT_WINDOW_S = 7.0, 2.5  # in which the requests of one run arrive
# of a request; the nearer to the window, the farther from equilibrium
MOST_E2E_S, SHORT_MOST_E2E_S = (3.5, 2.5)
STRETCHES = (1.0, 1.5, 2.25, 3.4)  # of both, until they hold enough points
LOADS = (0.2, 0.4, 0.6)
LEAST_PROMPT, LEAST_OUTPUT, MOST_OUTPUT = 128, 8, 512  # tokens
MARGIN = 0.05  # differences below it count as equivalent
FIT_FACTOR = 2.0  # between a measured speed and the fit; a shared core is half as fast for seconds at a time
HOSTLESS_LOADS = (0.25, 0.5, 0.75)
CURVE = 1.2  # ratio of neighbouring prompt lengths on a drawn boundary
FIGURES: dict[str, Callable[[Run], float]] = {
    "e2e_s": lambda run: statistics.fmean(run.e2e_s),
    "ttft_s": lambda run: statistics.fmean(run.ttft_s),
    "tpot_s": lambda run: statistics.fmean(metrics.tpot_s(run)),
}
NAMES = {"e2e_s": "mean E2E", "ttft_s": "mean TTFT", "tpot_s": "mean TPOT"}
ONE_USER = "one user at a time"


@dataclass
class Checked:
    """Points of the map with their runs."""

    cluster: Cluster
    points: list[Outcome]
    comparison: Comparison = field(default_factory=Comparison)

    def name(self, point: Outcome) -> str:
        """The workload of a point."""
        return breakeven_points.workload(point, 1.0).name

    def verdict(self, point: Outcome, figure: str) -> Verdict:
        """Disaggregated against replicated, over the rounds."""
        arms = {
            arm: {run.round: FIGURES[figure](run) for run in self.comparison.valid(self.name(point), arm)}
            for arm in (REPLICATED, DISAGGREGATED)
        }
        pairs = [(value, arms[DISAGGREGATED][number]) for number, value in arms[REPLICATED].items()]
        return judge(pairs, "lower", MARGIN)

    def step_by_step(self, point: Outcome, figure: str) -> float:
        """The ratio that the model gives for the very arrivals of the runs, geometric mean over rounds."""
        logs = []
        for run in self.comparison.valid(self.name(point), REPLICATED):
            times = [one.arrival_s for one in arrivals(run.workload, run.seed)]
            ours = simulation.disaggregated(self.cluster, point.point, times)
            theirs = simulation.replicated(self.cluster, point.point, times)
            logs.append(math.log(getattr(ours, figure) / getattr(theirs, figure)))
        return math.exp(statistics.fmean(logs))


def said(name: str) -> str:
    """How reports name a point."""
    prompt, output, load = name.removeprefix("break-even-").split("-")
    return f"{prompt} prompt, {output} output tokens, load {load}"


@pytest.fixture(scope="module")
def checked(
    calibration: Calibration,
    live: Session,
    lab: Lab,
    engine: LoadEngine,
    replicated: Topology,
    disaggregated: Topology,
    shape: KvShape,
    store: Store,
) -> Checked:
    """Both topologies at points of the map, round by round, in mirrored order; same arrivals for both."""
    cluster = calibration.cluster(lab, shape, ledger.block_size(disaggregated.decode[0].metrics()))
    first_window = SHORT_WINDOW_S if live.short else WINDOW_S
    count = SHORT_POINTS if live.short else POINTS
    longest = lab.model.max_model_len
    most_e2e = SHORT_MOST_E2E_S if live.short else MOST_E2E_S
    for stretch in STRETCHES:  # a machine that is slow today takes longer for the same points
        window, longest_e2e = first_window * stretch, most_e2e * stretch
        found = breakeven_points.candidates(
            cluster,
            breakeven.lengths(LEAST_PROMPT, longest // 2),
            breakeven.lengths(LEAST_OUTPUT, MOST_OUTPUT),
            LOADS,
            Budget(window, longest_e2e, longest),
        )
        points = breakeven_points.choose(found, count)
        if len(points) == count:
            break
    assert len(points) == count, f"runs of {window:g} s can show {len(found)} points, {count} are wanted"
    result = Checked(cluster, points)
    line = live.progress("break-even")
    asked = [breakeven_points.workload(point, window) for point in points]
    turns = rounds.trials(
        (replicated, disaggregated),
        lambda _: asked,
        live.rounds,
        lambda number, position: SEED + 1 + number * len(asked) + position,
    )
    with live.uncaptured():
        for run in rounds.runs(engine, turns, shape, store, line.show, lambda one: said(one.name)):
            result.comparison.runs.append(run)
    line.done(f"{len(result.comparison.runs)} runs, {len(result.comparison.invalid())} invalid")
    return result


@pytest.mark.lab_has("own_cores")
def test_fitted_speeds_reproduce_what_was_measured(
    calibration: Calibration, record: Recorder, timing: Callable[..., None]
) -> None:
    """A few constants hold all that was measured of a prompt and a step, within a factor of 2.

    An engine is described like a disk: a fixed cost and a rate. If the description misses the very
    measurements it was made from, no prediction from it means anything. The factor is that of a shared core,
    which may be half as fast during one of them as during the next; the misfit itself is recorded.
    """
    speeds = calibration.speeds
    prefill, step = speeds.prefill, speeds.step
    computed = [one.ttft_s - speeds.request_s for one in calibration.prefills]
    for one, seconds in zip(calibration.prefills, computed, strict=True):
        fitted = prefill.time_s(one.tokens)
        record.numbers(
            f"prefill alone, {one.tokens} tokens", [seconds], "s", what=ONE_USER, note=f"fit {fitted:.4g} s"
        )
    for row in calibration.steps:
        record.numbers(
            f"decode step, {row.batch} sequences a node, {row.context_tokens:.0f} tokens of context",
            [row.step_s],
            "s",
            what="median gap",
            note=f"fit {step.time_s(row.batch, row.context_tokens):.4g} s",
        )
    for moved in calibration.handed:
        note = f"{moved.kv_bytes:,.0f} B; fit {calibration.link.time_s(moved.kv_bytes):.4g} s"
        record.numbers(
            f"KV transfer, {moved.tokens} tokens", [moved.transfer_s], "s", what=ONE_USER, note=note
        )
    how = f"least squares of relative errors, {len(calibration.prefills)} lengths"
    record.numbers("prefill: base", [prefill.base_s], "s", what="fit", note=how)
    record.numbers("prefill: for each token", [prefill.per_token_s], "s", what="fit", note=how)
    record.numbers("prefill: for each token squared", [prefill.per_token2_s], "s", what="fit", note=how)
    how = f"least squares of relative errors, {len(calibration.steps)} batches and contexts"
    record.numbers("decode step: base", [step.base_s], "s", what="fit", note=how)
    record.numbers("decode step: for each sequence", [step.per_sequence_s], "s", what="fit", note=how)
    record.numbers(
        "decode step: for each token of context", [step.per_context_token_s], "s", what="fit", note=how
    )
    low, high = (rate / 1e9 for rate in calibration.link.bytes_per_s_ci)
    note = f"95 % CI {low:.2f} to {high:.2f}; {calibration.link.points} runs"
    record.numbers("KV transfer: bandwidth", [speeds.link_bytes_per_s / 1e9], "GB/s", what="fit", note=note)
    record.numbers("KV transfer: latency", [speeds.link_latency_s], "s", what="fit")
    record.numbers("request outside the engine", [speeds.request_s], "s", what="median over lengths")
    record.numbers("hand-over beside transfer and step", [speeds.handoff_s], "s", what="median over lengths")
    timing(computed, prompt_tokens=[one.tokens for one in calibration.prefills])
    fits = {
        "prefill": speedfit.worst_factor(
            [prefill.time_s(one.tokens) for one in calibration.prefills], computed
        ),
        "decode step": speedfit.worst_factor(
            [step.time_s(row.batch, row.context_tokens) for row in calibration.steps],
            [row.step_s for row in calibration.steps],
        ),
    }
    for name, factor in fits.items():
        record.numbers(f"{name}: largest factor between fit and measurement", [factor], "ratio", what="fit")
    assert all(factor <= FIT_FACTOR for factor in fits.values()), f"fit and measurement differ: {fits}"


@pytest.mark.lab_has("own_cores")
def test_map_beside_what_was_measured(checked: Checked, live: Session, lab: Lab, record: Recorder) -> None:
    """Points that the map calls wins, losses and even are measured; which agree and which do not is recorded.

    Nothing asks the map to be right: a point that disagrees is a result. What is asked is that every run was
    proved and every point measured in every round, and that the map is not void. Its ratios of E2E, TTFT and
    TPOT at all points have to be in the order of the measured ones more often than not. And, unless
    --short, the third of the points whose E2E it puts highest has to be measured higher, on average, than
    the third that it puts lowest: knowing that TTFT loses and TPOT gains does not help there. A map that
    knew nothing would fail either in one session of two. With --short a run is over before
    batches and queues have built up, and the thirds are one point each.
    """
    broken = checked.comparison.invalid()
    assert not broken, f"{len(broken)} runs are invalid; the first: {broken[0].topology}: {broken[0].invalid}"
    verdicts: dict[str, list[Verdict]] = {figure: [] for figure in FIGURES}
    stances: dict[str, dict[Agreement, list[str]]] = {
        figure: {"agrees": [], "disagrees": [], "undecided": []} for figure in FIGURES
    }
    for point in checked.points:
        for figure in FIGURES:
            verdict = checked.verdict(point, figure)
            assert verdict.rounds == live.rounds, f"{checked.name(point)}: {verdict.rounds} rounds"
            stance = record_point(record, checked, point, figure, verdict)
            verdicts[figure].append(verdict)
            stances[figure][stance].append(said(checked.name(point)))
    for figure, found in stances.items():
        for stance, names in found.items():
            record.numbers(
                f"map, {NAMES[figure]}: points where the measurement {STANCES[stance]}",
                [len(names)],
                "points",
                what=f"{len(checked.points)} points",
                note="; ".join(names),
            )
    predicted = [point.ratio() for point in checked.points]
    measured = [1 + verdict.effect for verdict in verdicts["e2e_s"]]
    every = [point.ratio(figure) for figure in FIGURES for point in checked.points]
    seen = [1 + verdict.effect for figure in FIGURES for verdict in verdicts[figure]]
    tau, tau_of_all = (breakeven_points.concordance(*pair) for pair in ((predicted, measured), (every, seen)))
    record.numbers("map, mean E2E: order of points kept (Kendall's tau)", [tau], "-1 to 1", what="points")
    record.numbers("map, all ratios: order kept (Kendall's tau)", [tau_of_all], "-1 to 1", what="points")
    draw(record, checked, lab, verdicts["e2e_s"])
    third = len(predicted) // 3
    order = sorted(range(len(predicted)), key=lambda place: predicted[place])
    lowest, highest = (
        statistics.fmean(math.log(measured[place]) for place in places)
        for places in (order[:third], order[-third:])
    )
    assert tau_of_all > 0, f"the order of ratios is not that of the map: predicted {every}, measured {seen}"
    assert live.short or highest > lowest, (
        f"points that the map puts highest were measured at {math.exp(highest):.2f}, those that it puts"
        f" lowest at {math.exp(lowest):.2f}: predicted {predicted}, measured {measured}"
    )


STANCES: dict[Agreement, str] = {
    "agrees": "agrees",
    "disagrees": "disagrees",
    "undecided": "decides nothing",
}


def record_point(
    record: Recorder, checked: Checked, point: Outcome, figure: str, verdict: Verdict
) -> Agreement:
    """Keep what was predicted and measured at a point, by arm and as a ratio."""
    name = said(checked.name(point))
    values = {}
    for arm, side in ((REPLICATED, point.replicated), (DISAGGREGATED, point.disaggregated)):
        runs = checked.comparison.valid(checked.name(point), arm)
        values[arm] = [FIGURES[figure](run) for run in runs]
        note = f"map {getattr(side, figure):.4g} s; {point.point.rate_per_s:.3g} requests/s"
        record.numbers(
            f"{NAMES[figure]}, {name}", values[arm], "s", arm=arm, command=runs[0].command, note=note
        )
    stance = breakeven_points.agreement(point.ratio(figure), verdict)
    decided = f", decided by {point.decided_by}" if figure == "e2e_s" else ""
    record.numbers(
        f"ratio of {NAMES[figure]}, {name}",
        [b / a for a, b in zip(values[REPLICATED], values[DISAGGREGATED], strict=True)],
        "ratio",
        arm=f"{DISAGGREGATED} / {REPLICATED}",
        what="rounds",
        note=f"map {point.ratio(figure):.2f}{decided}; step by step for these arrivals"
        f" {checked.step_by_step(point, figure):.2f}; measured {1 + verdict.effect:.2f}, 95 % CI"
        f" {1 + verdict.low:.2f} to {1 + verdict.high:.2f}: {verdict.outcome}; {STANCES[stance]}",
    )
    return stance


def draw(record: Recorder, checked: Checked, lab: Lab, verdicts: list[Verdict]) -> None:
    """The map at each load that was measured, with its points; and measured beside predicted ratios."""
    prompts = breakeven.lengths(LEAST_PROMPT // 2, lab.model.max_model_len // 2, CURVE)
    for load in LOADS:
        here = [
            (point, verdict)
            for point, verdict in zip(checked.points, verdicts, strict=True)
            if math.isclose(point.load, load)
        ]
        if not here:
            continue
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            "predicted: even on the line, disaggregated sooner inside": breakeven.boundary(
                checked.cluster, prompts, (2, MOST_OUTPUT), load
            )
        }
        for label, outcomes in (
            ("measured: disaggregated sooner", {"better"}),
            ("measured: replicas sooner", {"worse"}),
            ("measured: undecided or equivalent", {"undecided", "equivalent"}),
        ):
            chosen = [point.point for point, verdict in here if verdict.outcome in outcomes]
            series[label] = (
                tuple(float(one.prompt_tokens) for one in chosen),
                tuple(float(one.output_tokens) for one in chosen),
            )
        record.plot(
            f"Break-even map at load {load:g}",
            "prompt tokens",
            "output tokens",
            series,
            style="map",
            caption=f"Mean time of a request at {load:g} of what the replicas can bear; a run has"
            " its own rate at each point.",
        )
    predicted = [point.ratio() for point in checked.points]
    span = [min(predicted), max(predicted)]
    record.plot(
        "Measured against predicted ratio of mean E2E",
        "predicted, disaggregated / replicated",
        "measured",
        {
            "points": (predicted, [1 + verdict.effect for verdict in verdicts]),
            "as predicted": (span, span),
        },
        style="points over lines",
        caption="Geometric mean over rounds; the records have the intervals.",
    )


@pytest.mark.hostless
@pytest.mark.lab_has("speed", "link_rate")
def test_predicted_map_of_the_lab_file(lab: Lab, record: Recorder) -> None:
    """From nominal figures alone: where this lab would gain, and that it never gains capacity.

    Prefill and decode on separate nodes can each be idle while the other is not; replicas share both. So
    disaggregation may answer sooner and never bears more.
    """
    found = breakeven_map.predict(
        lab, breakeven_map.assumed(lab, loads=HOSTLESS_LOADS, efficiency=Efficiency()), HOSTLESS_LOADS
    )
    note = "; ".join(found.assumptions)
    for load, cells in found.outcomes.items():
        won = [one.ratio() for one in cells.values() if one.wins]
        name = f"map at load {load:g}: cells that disaggregation wins"
        record.numbers(name, [len(won)], f"of {len(cells)} cells", what="computed", note=note)
    prompts = breakeven.lengths(found.prompts[0], found.prompts[-1], CURVE)
    record.plot(
        "Predicted break-even map",
        "prompt tokens",
        "output tokens",
        {
            f"load {load:g}": breakeven.boundary(
                found.cluster, prompts, (LEAST_OUTPUT, found.outputs[-1]), load
            )
            for load in HOSTLESS_LOADS
        },
        style="curves",
        caption="Arithmetic from nominal figures, not a measurement. Inside a line disaggregated serving"
        " answers sooner than the replicas, at that share of what they can bear.",
    )
    for prompt, output in ((prompt, output) for prompt in found.prompts for output in found.outputs):
        ours = breakeven.disaggregated_capacity_per_s(found.cluster, prompt, output)
        theirs = breakeven.capacity_per_s(found.cluster, prompt, output)
        assert ours <= theirs * (1 + 1e-9), f"{prompt}, {output} tokens: {ours} of {theirs} requests/s"

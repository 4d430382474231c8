"""Figures that decide nothing: empty, one point, all equal, zero, infinite, not a number. What takes measured
figures answers, or raises the error that it promises; no other error gets through.

The oracle is the docstring of each function. Hypothesis makes the input, weighted towards what is extreme.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import calibration
from disagglab.measure import transfer_stats
from disagglab.predict import goodput, scattered_reads, speedfit
from disagglab.predict.scattered_reads import ReadTime
from disagglab.predict.speedfit import HandedTime, PrefillTime, StepTime
from disagglab.results import metrics, open_loop
from disagglab.results.records import Ledger, Reading, Run, Snapshot
from disagglab.stats import changepoint, linefit, steady
from disagglab.stats.linefit import LineFit
from disagglab.stats.verdict import gate_p, judge, noise_floor

EXTREME = [0.0, 1.0, 1.0, 2.0, -1.0, 5e-324, 1e-300, 1e300, math.inf, math.nan]
figures = st.sampled_from(EXTREME) | st.floats()
sizes = st.sampled_from([0, 1, 1, 2, 2**62])
clock = st.sampled_from([0.0, 1e-9, 0.5, 0.5, 1e9]) | st.floats(0, 1e9).map(lambda value: round(value, 9))
unhurried = settings(deadline=None)  # a busy machine is no finding
LINK = LineFit(0.001, (0.0, 0.002), 1e9, (1e8, 1e10), 1.0, 9)


def finite_or_refused(ask: Any) -> None:
    """Ask; only InvalidRun may come instead of an answer, and no answer is "not a number"."""
    try:
        answer = ask()
    except InvalidRun:
        return
    flat = dataclasses.astuple(answer) if dataclasses.is_dataclass(answer) else (answer,)  # type: ignore[arg-type]
    assert not any(isinstance(value, float) and math.isnan(value) for value in flat), answer


@unhurried
@given(st.lists(st.tuples(figures, figures), max_size=6))
def test_a_line(points: list[tuple[float, float]]) -> None:
    """Transfer times against sizes."""
    finite_or_refused(lambda: linefit.fit([x for x, _ in points], [y for _, y in points]))


@unhurried
@given(st.lists(st.builds(ReadTime, sizes, sizes, figures), max_size=6))
def test_scattered_reads(points: list[ReadTime]) -> None:
    """Read times against sizes and pieces."""
    finite_or_refused(lambda: scattered_reads.fit(points))


@unhurried
@given(st.lists(st.lists(figures, max_size=3), max_size=3))
def test_repeats_of_reads(repeats: list[list[float]]) -> None:
    """The probe's rows, with too few repeats."""
    rows = [{"seconds": one, "at_once": 1, "bytes": 1, "pieces": 1} for one in repeats]
    finite_or_refused(lambda: len(scattered_reads.points(rows)))


@unhurried
@given(st.lists(st.tuples(figures, figures), max_size=6), st.sampled_from(["better", "not worse"]))
def test_verdicts(pairs: list[tuple[float, float]], want: Any) -> None:
    """Pairs of figures, one a round."""
    finite_or_refused(lambda: judge(pairs, "lower", 0.05))
    finite_or_refused(lambda: gate_p(pairs, "higher", 0.05, want))
    finite_or_refused(lambda: noise_floor(pairs))


@unhurried
@given(st.lists(st.sampled_from(EXTREME), max_size=9))
def test_change_points(values: list[float]) -> None:
    """Medians of sessions."""
    finite_or_refused(lambda: len(changepoint.find(values)))


@unhurried
@given(
    st.lists(st.builds(PrefillTime, st.sampled_from([64, 128]), figures, figures), max_size=3),
    st.lists(st.builds(StepTime, st.sampled_from([1, 2]), st.just(64.0), figures), max_size=3),
    st.lists(st.builds(HandedTime, st.sampled_from([64, 128, 256]), figures, figures, figures), max_size=3),
)
def test_speeds(prefills: list[PrefillTime], steps: list[StepTime], handed: list[HandedTime]) -> None:
    """What one engine was timed at."""
    finite_or_refused(lambda: speedfit.fit_speeds(prefills, steps, handed, LINK))


def run_of(count: int, time_s: float, tokens: int, ledger: Ledger | None = None) -> Run:
    """A run of so many equal answers; every time in it is ``time_s``."""
    workload = Workload(name="w", prompt_tokens=64, output_tokens=2, rate_per_s=1.0, requests=max(count, 1))
    gaps = (time_s,) * (tokens - 1)
    return Run(
        "t", workload, 1, 0, "", time_s, None, (time_s,) * count, (time_s,) * count, (gaps,) * count,
        (64,) * count, (tokens,) * count, (time_s,) * count, ("main",) * count, ledger,
    )  # fmt: skip


@unhurried
@given(
    st.integers(0, 2), st.sampled_from([0.0, 1.0]), st.integers(1, 2), st.sampled_from(["", "main", "steady"])
)
def test_figures_of_a_run(count: int, time_s: float, tokens: int, stream: str) -> None:
    """No answers, answers of one token, a run that took no time: a figure is None where there is nothing to
    measure.
    """
    book = ledger_of(1)
    run = run_of(count, time_s, tokens, book)
    slo = SloSection(ttft_s=1.0, tpot_s=1.0)
    found = metrics.figures(run, slo, stream)
    if not count:
        assert {found["slo_attainment"], found["transfer_share_of_ttft"], found["ttft_p50"]} == {None}
    if not time_s:
        assert {found["output_tokens_per_s"], found["goodput_per_s"]} == {None}
    queue = open_loop.of(run)
    assert (queue is None) == (not count)
    if queue is not None:
        assert queue.keeps_up is open_loop.KeepsUp.TOO_SHORT
        queue.as_json()
    speedfit.full_gaps(run)
    finite_or_refused(lambda: goodput.seen(run).duration_s)
    finite_or_refused(lambda: calibration.step_of(run, 1))


@unhurried
@given(st.lists(st.tuples(clock, clock), max_size=60), st.integers(0, 60))
def test_queues(requests: list[tuple[float, float]], first: int) -> None:
    """Arrivals at once, answers in no time, a window without any."""
    requests.sort()
    starts, times = [one for one, _ in requests], [one for _, one in requests]
    found = steady.balance(starts, times, first)
    finite_or_refused(lambda: found.ratio if found else 0)
    assert all(number >= 0 for number in steady.found_in_system(starts, times))
    finite_or_refused(lambda: steady.growth_p(times))
    finite_or_refused(lambda: steady.left_out(times))


def ledger_of(transfers: int, kv_bytes: int = 1) -> Ledger:
    """A ledger with so many transfers."""
    return Ledger({}, {}, {}, kv_bytes, transfers, 1.0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("book", [None, ledger_of(0), ledger_of(1, 0)])
def test_transfers_of_a_run_without_any(book: Ledger | None) -> None:
    """Neither a mean time nor a bandwidth of nothing."""
    nothing = Snapshot("a", "u", ())
    run = dataclasses.replace(run_of(1, 1.0, 2, book), readings=(Reading({"a": nothing}, {}),) * 2)
    with pytest.raises(InvalidRun):
        transfer_stats.of(run)
    if book is None or not book.transfers:
        with pytest.raises(InvalidRun):
            calibration.handed_over(run)

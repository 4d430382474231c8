"""Speeds of one engine, fitted to what was measured on it. All fits are least squares of relative errors with
no negative constant: no prompt and no sequence makes a step shorter.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.errors import InvalidRun
from disagglab.predict.breakeven import Prefill, Speeds, Step
from disagglab.results.records import Run
from disagglab.stats.linefit import LineFit


@dataclass(frozen=True)
class PrefillTime:
    """A prompt that was computed alone. ``ttft_s``: as the client saw it; ``outside_s``: what of it the
    server does not count.
    """

    tokens: int
    ttft_s: float
    outside_s: float


@dataclass(frozen=True)
class StepTime:
    """Decode steps of ``batch`` sequences on an engine, with their mean context."""

    batch: int
    context_tokens: float
    step_s: float


@dataclass(frozen=True)
class HandedTime:
    """TTFT of a prompt that one user sent to the disaggregated topology, and the KV bytes that moved."""

    tokens: int
    ttft_s: float
    kv_bytes: float
    transfer_s: float


def fit_speeds(
    prefills: Sequence[PrefillTime], steps: Sequence[StepTime], handed: Sequence[HandedTime], link: LineFit
) -> Speeds:
    """All speeds. What a request costs outside the engine, and what the hand-over costs, are medians over
    the lengths: of what the server does not count, and of what TTFT has beside all else.

    Raises:
        InvalidRun: if a kind of measurement is missing, no length was measured both ways, a prompt took no
            time beside what is outside the engine, a step took none, or a time is no finite number.
    """
    if not prefills or not steps or not handed:
        raise InvalidRun(f"speeds of {len(prefills)} prompts, {len(steps)} steps, {len(handed)} hand-overs")
    outside = max(0.0, statistics.median(one.outside_s for one in prefills))
    computed = {one.tokens: one.ttft_s - outside for one in prefills}
    if not all(seconds > 0 for seconds in computed.values()):
        raise InvalidRun(f"prompts took no longer than the {outside:.3g} s outside the engine: {computed}")
    if not all(one.step_s > 0 for one in steps):
        raise InvalidRun(f"a step took no time: {list(steps)}")
    step = fit_step(steps)
    latency = max(0.0, link.latency_s)
    rest = [
        one.ttft_s
        - outside
        - computed[one.tokens]
        - (latency + one.kv_bytes / link.bytes_per_s)
        - step.time_s(1, one.tokens)
        for one in handed
        if one.tokens in computed
    ]
    if not rest:
        raise InvalidRun(f"no prompt of {sorted(computed)} tokens was handed over")
    prefill = fit_prefill(list(computed), list(computed.values()))
    handoff = max(0.0, statistics.median(rest))
    return Speeds(prefill, step, link.bytes_per_s, latency, outside, handoff)


def fit_prefill(tokens: Sequence[int], seconds: Sequence[float]) -> Prefill:
    """Base, linear and quadratic part of the time of a prompt."""
    return Prefill(*_fit([(1.0, float(n), float(n) * n) for n in tokens], seconds))


def fit_step(measured: Sequence[StepTime]) -> Step:
    """Base, and what a sequence and a token of its context add."""
    rows = [(1.0, float(one.batch), one.batch * one.context_tokens) for one in measured]
    return Step(*_fit(rows, [one.step_s for one in measured]))


def _fit(rows: Sequence[tuple[float, float, float]], seconds: Sequence[float]) -> tuple[float, float, float]:
    import numpy
    import scipy.optimize

    # columns are brought to one size first: the quadratic one is a million times the constant one
    scales = [max(column) for column in zip(*rows, strict=True)]
    matrix = [
        [value / scale / time for value, scale in zip(row, scales, strict=True)]
        for row, time in zip(rows, seconds, strict=True)
    ]
    if not all(math.isfinite(value) for row in matrix for value in row):
        raise InvalidRun(f"times from {min(seconds):g} to {max(seconds):g} s decide no speeds")
    found, _ = scipy.optimize.nnls(numpy.array(matrix), numpy.ones(len(seconds)))
    base, linear, last = (float(value) / scale for value, scale in zip(found, scales, strict=True))
    return base, linear, last


def worst_factor(fitted: Sequence[float], measured: Sequence[float]) -> float:
    """The largest factor, in either direction, between a fitted and a measured value; at least 1."""
    return max(max(a / b, b / a) for a, b in zip(fitted, measured, strict=True))


def full_gaps(run: Run) -> list[float]:
    """Gaps between tokens that lie wholly in the time in which all requests of a run decode, s."""
    if not run.start_s:
        return []
    begin = max(start + ttft for start, ttft in zip(run.start_s, run.ttft_s, strict=True))
    end = min(start + e2e for start, e2e in zip(run.start_s, run.e2e_s, strict=True))
    found = []
    for start, ttft, gaps in zip(run.start_s, run.ttft_s, run.itl_s, strict=True):
        times = list(itertools.accumulate(gaps, initial=start + ttft))
        found += [
            gap
            for gap, (before, after) in zip(gaps, itertools.pairwise(times), strict=True)
            if begin <= before and after <= end
        ]
    return found

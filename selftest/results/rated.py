"""Runs of a frontier that were never made, with good requests that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disagglab.results.footprint import Footprint
from disagglab.results.frontier import Frontier
from disagglab.results.promise import Promise
from disagglab.results.rated_run import RatedRun

PROMISE = Promise(ttft_s=1.0, tpot_s=0.1)
SENT, DURATION_S = 20, 10.0
MANY = 2000  # requests, so that one more or less is no difference
ONE, BOTH = Footprint(1, 1, 1, 1, ("a",), ("a",)), Footprint(2, 2, 2, 2, ("a", "b"), ("a", "b"))
APART = Footprint(2, 2, 1, 1, ("a",), ("b",))
FOOTPRINTS = {"single": ONE, "replicated": BOTH, "disaggregated": APART}


def rated(
    arm: str,
    rate_per_s: float = 1.0,
    number: int = 0,
    good: int | None = None,
    duration_s: float = DURATION_S,
    tpot_s: float = 0.05,
    energy_j: Mapping[str, float] | None = None,
    sent: int = SENT,
) -> RatedRun:
    """Requests of 100 tokens with answers of 11. The good ones have a TTFT of 0.5 s, the others 3 s;
    every gap is as long as the TPOT.
    """
    good = sent if good is None else good
    return RatedRun(
        arm=arm,
        rate_per_s=rate_per_s,
        round=number,
        seed=number,
        duration_s=duration_s,
        keeps_up="keeps up",
        ttft_s=(0.5,) * good + (3.0,) * (sent - good),
        tpot_s=(tpot_s,) * sent,
        gap_s=(tpot_s,) * sent,
        gaps={tpot_s: 10 * sent},
        itl_p99_s=tpot_s,
        prompt_tokens=100 * sent,
        output_tokens=11 * sent,
        energy_j=energy_j,
    )


def frontier(durations_s: Mapping[str, Mapping[float, Sequence[float]]], sent: int = SENT) -> Frontier:
    """All requests good: arm → rate → how long the run of each round took, so that goodput is its inverse."""
    runs = [
        rated(arm, rate, number, duration_s=duration_s, sent=sent)
        for arm, rates in durations_s.items()
        for rate, rounds in rates.items()
        for number, duration_s in enumerate(rounds)
    ]
    return Frontier("made", FOOTPRINTS, tuple(runs), PROMISE)

"""The answers to the exercises of tests/tuning/README.md, worked out by the project's own code.

The oracle is arithmetic that the lesson asks for by hand. Change a number there and here together.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from disagglab.kv.shape import KvShape, Layer
from disagglab.predict.engine import Request, serve
from disagglab.predict.speeds import Limits, Prefill, Speeds, Step
from disagglab.results.frontier import Point, pareto
from disagglab.stats.best import judge_best

STEP_S, TOKEN_S = 0.010, 0.0001  # of a decode step; what each prompt token adds to a step


def speeds() -> Speeds:
    """An engine whose step takes 10 ms, and 0.1 ms more for each prompt token in it."""
    return Speeds(Prefill(STEP_S, TOKEN_S), Step(STEP_S, 0.0), link_bytes_per_s=1e9)


def longest_gap_s(chunk: int, prompt: int = 1000) -> float:
    """The longest gap of one sequence that decodes while a prompt arrives."""
    asked = [Request(0.0, 1, 200), Request(0.5, prompt, 2)]
    engine = serve(speeds(), Limits(chunk, 8), asked)
    return max(gap for gap, _ in engine.gaps[0])


def ttft_s(chunk: int, prompt: int = 1000) -> float:
    """TTFT of the prompt that arrives while the sequence decodes."""
    engine = serve(speeds(), Limits(chunk, 8), [Request(0.0, 1, 200), Request(0.5, prompt, 2)])
    return engine.first_s[1] - 0.5


@pytest.mark.parametrize(("chunk", "steps", "gap_ms"), [(2048, 1, 110.0), (251, 4, 35.0), (126, 8, 22.5)])
def test_exercise_1_a_chunk_bounds_the_gap(chunk: int, steps: int, gap_ms: float) -> None:
    """1,000 prompt tokens beside one decoding sequence: so many steps, and the longest gap is one of them.

    The decoding sequence takes one token of the budget first, so a chunk is the budget less one.
    """
    assert math.ceil(1000 / (chunk - 1)) == steps
    assert longest_gap_s(chunk) == pytest.approx(gap_ms / 1e3, rel=0.01)


def test_exercise_2_what_the_chunk_costs_the_prompt() -> None:
    """Every further step adds its base: with 8 steps in place of 1 TTFT is 70 ms longer, of 110."""
    assert ttft_s(126) - ttft_s(2048) == pytest.approx(7 * STEP_S, abs=STEP_S)


@pytest.mark.parametrize(("prefill", "best"), [(1.0, "2P2D"), (3.0, "1P3D"), (0.4, "3P1D")])
def test_exercise_3_rates_of_roles_are_matched(prefill: float, best: str) -> None:
    """Four nodes; one prefills so many requests/s or decodes 1.2/s; the slower role is the rate."""
    decode = 1.2
    rates = {f"{p}P{4 - p}D": min(p * prefill, (4 - p) * decode) for p in (1, 2, 3)}
    assert max(rates, key=lambda name: rates[name]) == best


def test_exercise_4_a_rank_keeps_half_of_the_heads() -> None:
    """Two ranks of 4 KV heads keep 2 each: half the bytes a token, so twice the tokens in the same memory.

    One KV head cannot be halved: both ranks hold a copy, and a cache holds as many tokens as before.
    """
    four, one = (KvShape((Layer(heads, 64, 64),) * 30, "bfloat16") for heads in (4, 1))
    assert (four.bytes_per_token, four.on_rank(2).bytes_per_token) == (30_720, 15_360)
    assert one.bytes_per_token == one.on_rank(2).bytes_per_token == 7_680


def point(arm: str, user: float, node: float) -> Point:
    """A point of a frontier with these tokens/s per user and per node; dominance looks at nothing else."""
    figures: dict[str, Any] = dict.fromkeys(Point.__dataclass_fields__, 0.0)
    figures |= {"arm": arm, "tokens_per_s_gpu": None, "tokens_per_s_user": user, "tokens_per_s_node": node}
    return Point(**figures)


def test_exercise_5_who_is_dominated() -> None:
    """Of four points (tokens/s per user, per node) B is beaten by A in both; C and D are traded for A."""
    points = [point("A", 20, 100), point("B", 18, 90), point("C", 40, 60), point("D", 10, 120)]
    assert {one.arm for one in pareto(points)} == {"A", "C", "D"}


def test_exercise_6_the_best_of_several_has_had_luck() -> None:
    """Against the better of two that differ by noise alone, the naive interval says worse, and the one that
    pays for the pick does not.
    """
    candidate = [10.0, 10.4, 9.7, 10.2, 9.9]
    lucky = [10.15, 10.62, 9.8, 10.37, 10.02]
    other = [9.9, 10.5, 9.8, 10.1, 9.9]
    pairs = {
        name: list(zip(values, candidate, strict=True))
        for name, values in (("lucky", lucky), ("other", other))
    }
    naive = judge_best({"lucky": pairs["lucky"]}, "higher", 0.01)
    paid = judge_best(pairs, "higher", 0.01)
    assert paid.baseline == naive.baseline == "lucky"
    assert paid.verdict.high > naive.verdict.high
    assert paid.verdict.low == pytest.approx(naive.verdict.low)

"""One engine step by step: chunk budgets, sequences at once, gaps between tokens.

Oracles: requests worked out by hand from round speeds, and what holds for any requests and limits (every
answer has its tokens, gaps add up, no step holds more than its budget).
"""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.predict import engine, simulation
from disagglab.predict.breakeven import Cluster
from disagglab.predict.engine import Gap, Request
from disagglab.predict.simulation import Served
from disagglab.predict.speeds import Limits, Prefill, Speeds, Step
from disagglab.stats.metric import percentile

# A step: 0.1 s, 0.001 s a prompt token, 0.01 s a sequence; 1,000 B of KV a token, 0.2 s for 400 of them.
ROUND = Speeds(Prefill(0.1, 0.001), Step(0.1, 0.01), link_bytes_per_s=2e6, request_s=0.03, handoff_s=0.02)
LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)
STEADY, LONG = Request(0.0, 10, 20), Request(0.05, 300, 5)


def served(gaps: tuple[tuple[Gap, ...], ...]) -> Served:
    """A run of which only the gaps count."""
    times = (0.0,) * len(gaps)
    return Served(times, times, times, 1.0, gaps)


def flat(gaps: list[Gap]) -> list[tuple[float, int]]:
    """Gaps with times that may be compared."""
    return [(round(gap, 9), count) for gap, count in gaps]


def test_a_prompt_is_cut_beside_a_sequence_that_decodes() -> None:
    """300 tokens with a budget of 128 take three steps, 127 + 127 + 46, of which the sequence has a token
    each: 0.237, 0.237, 0.156 s. Then both decode four times in 0.12 s, and the steady one 12 times alone.
    """
    found = engine.serve(ROUND, Limits(128), [STEADY, LONG])
    assert found.first_s[0] == pytest.approx(0.11)
    assert found.first_s[1] == pytest.approx(0.11 + 0.237 + 0.237 + 0.156)
    assert flat(found.gaps[0]) == [(0.237, 1), (0.237, 1), (0.156, 1), (0.12, 4), (0.11, 12)]
    assert flat(found.gaps[1]) == [(0.12, 4)]
    assert found.last_s[0] == pytest.approx(0.74 + 4 * 0.12 + 12 * 0.11)


def test_without_a_budget_it_is_one_step() -> None:
    """The same with whole prompts: one gap of 0.41 s in place of three shorter ones, and a first token
    sooner by two bases and two tokens of the sequence beside it.
    """
    for limits in (Limits(), Limits(8192)):
        found = engine.serve(ROUND, limits, [STEADY, LONG])
        assert found.first_s[1] == pytest.approx(0.11 + 0.41)
        assert flat(found.gaps[0]) == [(0.41, 1), (0.12, 4), (0.11, 14)]


def test_prompts_share_a_step_and_the_last_is_cut() -> None:
    """A budget of 128 takes 100 tokens of the first prompt and 28 of the second; the other 72 come with the
    first one's next token. A budget of 256 takes both in one step, and without one each has a step.
    """
    both = [Request(0.0, 100, 2), Request(0.0, 100, 2)]
    cut = engine.serve(ROUND, Limits(128), both)
    assert cut.first_s == pytest.approx({0: 0.228, 1: 0.41})
    assert cut.last_s == pytest.approx({0: 0.41, 1: 0.52})
    together = engine.serve(ROUND, Limits(256), both)
    assert together.first_s == pytest.approx({0: 0.3, 1: 0.3})
    assert engine.serve(ROUND, Limits(), both).first_s == pytest.approx({0: 0.2, 1: 0.41})


def test_pieces_of_a_prompt_cost_what_the_prompt_does() -> None:
    """Attention looks back on earlier pieces, so that work adds up; each of the three pieces has a base."""
    speeds = dataclasses.replace(ROUND, prefill=Prefill(0.1, 0.001, 1e-6))
    cut = engine.serve(speeds, Limits(128), [Request(0.0, 300, 2)])
    assert [count for _, count in cut.blocks] == [1, 1, 1, 1]
    assert cut.blocks[1][0] == pytest.approx(0.1 + 0.128 + (256**2 - 128**2) * 1e-6)
    assert cut.first_s[0] == pytest.approx(3 * 0.1 + 0.3 + 0.09)


def test_no_more_sequences_than_the_server_takes() -> None:
    """With max-num-seqs 1 the second prompt waits for the first answer's end, 0.42 s; with 2 it does not."""
    both = [Request(0.0, 100, 3), Request(0.0, 100, 3)]
    one, two = (engine.serve(ROUND, Limits(1000, some), both) for some in (1, 2))
    assert one.first_s == pytest.approx({0: 0.2, 1: 0.62})
    assert two.first_s == pytest.approx({0: 0.3, 1: 0.3})
    assert (Limits().most_sequences, Limits(8, 0).most_sequences) == (Limits(0, 0).most_sequences, 8)
    assert (Limits(8, 4).most_sequences, Limits(8, 16).most_sequences) == (4, 8)


def test_a_step_beside_decode_has_at_least_the_base_of_decode() -> None:
    """A lower base of prefill counts for prompts alone: 0.02 + 0.01 s; beside a sequence it is 0.1 s."""
    speeds = dataclasses.replace(ROUND, prefill=Prefill(0.02, 0.001))
    found = engine.serve(speeds, Limits(), [STEADY, dataclasses.replace(LONG, at_s=0.01)])
    assert found.first_s[0] == pytest.approx(0.03)
    assert flat(found.gaps[0])[0] == (0.41, 1)


def test_a_decode_node_takes_up_as_many_as_it_may() -> None:
    """Transfers end at 0.2 and 0.4 s. One sequence at a time: the second has its first token after the three
    of the first, at 0.64 s; two at a time: in the step that begins at 0.42 s.
    """
    both = [Request(0.0, 400, 3), Request(0.0, 400, 3)]
    one, two = (engine.fetch_and_serve(ROUND, Limits(0, some), both, [0.2, 0.2]) for some in (1, 2))
    assert one.first_s == pytest.approx({0: 0.31, 1: 0.64})
    assert [flat(one.gaps[place]) for place in (0, 1)] == [[(0.11, 2)], [(0.11, 2)]]
    assert two.first_s == pytest.approx({0: 0.31, 1: 0.54})
    assert flat(two.gaps[0]) == [(0.11, 1), (0.12, 1)]
    assert flat(two.gaps[1]) == [(0.11, 2)]


def test_roles_have_budgets_of_their_own() -> None:
    """A budget of 200 on the prefill node makes two steps of 400 tokens, 0.1 s more; on the decode node it
    changes nothing, and a bound of one sequence there nothing at the prefill node.
    """
    plain = Cluster(ROUND, LAYOUT, "0.31.0", 8192)
    requests = [Request(0.0, 400, 3), Request(0.0, 400, 3)]
    whole = simulation.by_roles(plain, requests)
    cut = simulation.by_roles(dataclasses.replace(plain, step_tokens=200, decode_step_tokens=8192), requests)
    assert whole.ttft_s[0] == pytest.approx(0.03 + 0.9 + 0.02 + 0.2 + 0.11)
    assert cut.ttft_s[0] == pytest.approx(0.03 + 0.6 + 0.02 + 0.2 + 0.11)
    narrow = simulation.by_roles(dataclasses.replace(plain, decode_step_tokens=200), requests)
    assert narrow == whole
    single = simulation.by_roles(dataclasses.replace(plain, decode_sequences=1), requests)
    assert single.ttft_s[0] == whole.ttft_s[0]
    assert single.ttft_s[1] > whole.ttft_s[1]


REQUESTS = st.lists(
    st.builds(Request, st.floats(0, 20), st.integers(1, 900), st.integers(1, 30)), min_size=1, max_size=15
).map(lambda found: sorted(found, key=lambda one: one.at_s))
LIMITS = st.builds(Limits, st.integers(0, 700), st.integers(0, 6))


@settings(max_examples=150, deadline=None)
@given(REQUESTS, LIMITS)
def test_every_answer_has_its_tokens(requests: list[Request], limits: Limits) -> None:
    """Whatever the limits: a gap for each token but the first, which add up; no step beyond its budget; no
    work lost: the time of all steps is that of their bases, prompts and tokens.
    """
    found = engine.serve(ROUND, limits, requests)
    tokens = 0
    for place, one in enumerate(requests):
        assert found.first_s[place] >= one.at_s + 0.001 * one.prompt_tokens
        assert sum(count for _, count in found.gaps[place]) == one.output_tokens - 1
        spent = sum(gap * count for gap, count in found.gaps[place])
        assert spent == pytest.approx(found.last_s[place] - found.first_s[place])
        tokens += one.output_tokens - 1
    steps = sum(count for _, count in found.blocks)
    whole = sum(each * count for each, count in found.blocks)
    prompts = sum(one.prompt_tokens for one in requests)
    assert whole == pytest.approx(0.1 * steps + 0.001 * prompts + 0.01 * tokens)
    if limits.step_tokens:
        assert max(each for each, _ in found.blocks) <= 0.1 + 0.01 * limits.step_tokens + 1e-9
        assert steps * limits.step_tokens >= prompts + tokens


@settings(max_examples=100, deadline=None)
@given(REQUESTS, LIMITS, st.floats(0, 1))
def test_every_fetched_answer_has_its_tokens(requests: list[Request], limits: Limits, moved: float) -> None:
    """The same of a decode node, which gives the first token too."""
    found = engine.fetch_and_serve(ROUND, limits, requests, [moved] * len(requests))
    for place, one in enumerate(requests):
        assert found.first_s[place] >= one.at_s + moved + 0.1
        assert sum(count for _, count in found.gaps[place]) == one.output_tokens - 1
        spent = sum(gap * count for gap, count in found.gaps[place])
        assert spent == pytest.approx(found.last_s[place] - found.first_s[place])


def test_percentiles_of_gaps_are_those_of_single_gaps() -> None:
    """Equal gaps that are kept together count as often as they came, also where the percentile lies between
    two of them; of some requests alone as well.
    """
    source = random.Random(5)
    rows = [[(source.random(), source.randint(1, 30)) for _ in range(12)] for _ in range(4)]
    run = served(tuple(tuple(row) for row in rows))
    for chosen in (None, {1, 3}):
        single = [
            gap
            for place, row in enumerate(rows)
            if chosen is None or place in chosen
            for gap, count in row
            for _ in range(count)
        ]
        for p in (50, 90, 99):
            wanted = percentile(single, p)
            assert wanted is not None
            assert run.itl_s(p, chosen) == pytest.approx(wanted)
        above = sum(gap > 0.7 for gap in single) / len(single)
        assert 0 < above < 1
        assert run.gaps_above(0.7, chosen) == pytest.approx(above)


def test_too_few_gaps_have_no_percentile() -> None:
    """99 gaps do not tell the 99th percentile, 100 do; no gap has no share either."""
    assert served((((0.1, 99),),)).itl_s(99) is None
    assert served((((0.1, 50),), ((0.1, 50),))).itl_s(99) == 0.1
    assert served((((0.1, 9),),)).gaps_above(0.1) == 0
    assert served(((),)).gaps_above(0.1) is None

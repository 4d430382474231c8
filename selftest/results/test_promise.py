"""Limits of a promise, and the one figure of a request's gaps that tells whether it keeps one."""

from __future__ import annotations

import pytest

from disagglab.config.schema import SloSection
from disagglab.results.promise import NOTHING, Promise, gap_of, limit_text


def test_a_limit_that_is_met_exactly_is_kept() -> None:
    promise = Promise(ttft_s=1.0, tpot_s=0.1, itl_s=0.2)
    assert promise.kept(1.0, 0.1, 0.2)
    assert not promise.kept(1.001, 0.1, 0.2)
    assert not promise.kept(1.0, 0.101, 0.2)
    assert not promise.kept(1.0, 0.1, 0.201)


def test_what_is_not_promised_or_not_there_is_kept() -> None:
    """An answer of one token has no TPOT and no gaps."""
    assert NOTHING.kept(100.0, 100.0, 100.0)
    assert Promise(1.0, 0.1, 0.1).kept(1.0, None, None)
    assert not Promise(1.0, 0.1, 0.1).kept(1.1, None, None)


def test_one_gap_of_a_hundred_may_be_late() -> None:
    """Of 99 gaps none, of 100 one, of 250 two."""
    assert gap_of([0.1] * 98 + [0.5]) == 0.5
    assert gap_of([0.5, *[0.1] * 99]) == 0.1
    assert gap_of([0.5] * 2 + [0.1] * 98) == 0.5
    assert gap_of([0.5] * 2 + [0.2] + [0.1] * 247) == 0.2
    assert gap_of([]) is None


def test_a_promise_in_words() -> None:
    assert str(Promise(1.5, 0.05, None)) == "TTFT <= 1.5 s, TPOT <= 50 ms"
    assert str(Promise(itl_s=0.0125)) == "p99 ITL <= 12.5 ms"
    assert str(NOTHING) == "no promise"
    assert limit_text(2.0) == "2 s"


def test_the_labs_own() -> None:
    assert Promise.of(SloSection(ttft_s=2.0, tpot_s=0.15)) == Promise(2.0, 0.15)
    assert Promise.of(None) == NOTHING


@pytest.mark.parametrize("count", [1, 7, 99, 100, 101, 1000])
def test_the_gap_is_the_shortest_limit_that_is_kept(count: int) -> None:
    """At it no more than one gap of a hundred is longer; at any shorter limit more are."""
    gaps = [0.001 * (1 + 7 * i % count) for i in range(count)]
    limit = gap_of(gaps)
    assert limit is not None
    assert sum(gap > limit for gap in gaps) <= count / 100
    assert sum(gap > limit - 0.0005 for gap in gaps) > count / 100

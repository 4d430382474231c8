"""The map of winners: another promise, another winner, from the same requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagglab.results.promise import NOTHING, Promise
from disagglab.results.rated_run import RatedRun
from disagglab.results.winner_map import FACTORS, axis_of, grid, lines, winner_map
from selftest.results.rated import MANY, frontier, rated

# Replicas answer with a TTFT of 0.5 s and a TPOT of 0.15 s, disaggregated serving with 1.5 s and 0.05 s: the
# first keep what is tight on TTFT and relaxed on TPOT, the second the reverse; both what is relaxed on both.
NOISE = (9.9, 10.0, 10.1)


def runs(arm: str, ttft_s: float, tpot_s: float) -> tuple[RatedRun, ...]:
    return tuple(
        replace(
            rated(arm, rate, number, duration_s=duration_s, tpot_s=tpot_s, sent=MANY),
            ttft_s=(ttft_s,) * MANY,
        )
        for rate in (1.0, 2.0)
        for number, duration_s in enumerate(NOISE if arm == "replicated" else (10.0,) * 3)
    )


MADE = replace(
    frontier({}),
    runs=runs("replicated", 0.5, 0.15) + runs("disaggregated", 1.5, 0.05),
    promise=Promise(ttft_s=1.0, tpot_s=0.1),
)


def test_the_promise_decides_who_wins() -> None:
    """Factors 0.7 and 2 on both limits: rows TTFT <= 0.7 s and 2 s, columns TPOT <= 70 ms and 200 ms."""
    cells = winner_map(MADE, grid(MADE.promise, (0.7, 2.0)))
    assert [[cell.said for cell in row] for row in cells] == [
        ["-", "replicated 1-2/s"],
        ["disaggregated 1-2/s", "-"],
    ]
    assert cells[0][1].winner_at(1.0) == "replicated"
    assert cells[0][0].winner_at(1.0) is None


def test_a_table_of_the_map() -> None:
    cells = winner_map(MADE, grid(MADE.promise, (0.7, 2.0)))
    assert lines(cells, MADE.promise) == [
        "who is ahead, by promise, at which requests/s:",
        "TTFT <=  TPOT <= 70 ms        TPOT <= 200 ms",
        "700 ms   -                    replicated 1-2/s",
        "2 s      disaggregated 1-2/s  -",
    ]


def test_one_line_where_nobody_wins() -> None:
    cells = winner_map(MADE, [[Promise(0.1, 0.01)]])
    assert lines(cells, MADE.promise) == ["no way is ahead at any rate under any of 1 promises"]


def test_the_map_around_the_promise() -> None:
    """Six limits each way, and the promise itself among them."""
    promises = [cell.promise for row in winner_map(MADE) for cell in row]
    assert len(promises) == len(FACTORS) ** 2
    assert MADE.promise in promises


@pytest.mark.parametrize(
    ("promise", "axis", "shape"),
    [
        (Promise(1.0, 0.1), "tpot_s", (6, 6)),
        (Promise(1.0, 0.1, 0.2), "tpot_s", (6, 6)),
        (Promise(1.0, itl_s=0.2), "itl_s", (6, 6)),
        (Promise(itl_s=0.2), "itl_s", (1, 6)),
        (Promise(1.0), None, (6, 1)),
        (NOTHING, None, (1, 1)),
    ],
)
def test_what_is_not_promised_has_no_axis(promise: Promise, axis: str | None, shape: tuple[int, int]) -> None:
    found = grid(promise)
    assert axis_of(promise) == axis
    assert (len(found), len(found[0])) == shape

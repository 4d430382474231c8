"""What is kept of a run: good requests under any promise and late gaps, as the run itself says them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagglab.config.arrivals import MAIN, STEADY
from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.results.metrics import good_requests
from disagglab.results.promise import NOTHING, Promise
from disagglab.results.rated_run import RatedRun, rounded_up
from disagglab.results.records import Run

OPEN = Workload(name="w", prompt_tokens=10, output_tokens=5, rate_per_s=1.0, requests=3)
RUN = Run(
    "disaggregated", OPEN, 1, 2, "vllm bench serve", 10.0, None,
    ttft_s=(0.5, 1.0, 1.5, 0.5),
    e2e_s=(0.9, 1.4, 1.9, 0.5),
    itl_s=((0.1, 0.1, 0.05, 0.15), (0.1,) * 4, (0.1, 0.2, 0.05, 0.05), ()),
    prompt_tokens=(10, 20, 30, 40),
    output_tokens=(5, 5, 5, 1),
    start_s=(0.0, 1.0, 2.0, 3.0),
    streams=(STEADY, MAIN, MAIN, MAIN),
    energy_j={"a": 3.0},
)  # fmt: skip


def test_what_is_kept_by_hand() -> None:
    """A TPOT of 0.4 s / 4; each request's longest gap, as none has a hundred; one answer has one token."""
    kept = RatedRun.of(RUN)
    assert (kept.arm, kept.rate_per_s, kept.round, kept.seed, kept.sent) == ("disaggregated", 1.0, 2, 1, 4)
    assert kept.tpot_s == (0.1, 0.1, 0.1, None)
    assert kept.gap_s == (0.15, 0.1, 0.2, None)
    assert kept.gaps == {0.05: 3, 0.1: 7, 0.15: 1, 0.2: 1}
    assert (kept.prompt_tokens, kept.output_tokens) == (100, 16)
    assert kept.per_user == pytest.approx(10.0)
    assert kept.itl_p99_s is None, "twelve gaps have no 99th percentile"
    assert kept.energy_j == {"a": 3.0}


def test_one_stream_alone() -> None:
    kept = RatedRun.of(RUN, MAIN)
    assert kept.ttft_s == (1.0, 1.5, 0.5)
    assert kept.output_tokens == 11


@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(1.0, 0.1), (0.5, 0.1), (2.0, 0.09), (0.4, 1.0), (2.0, 2.0)])
def test_good_requests_are_those_of_the_metric(ttft_s: float, tpot_s: float) -> None:
    """Another account of the same: disagglab/results/metrics.py, of the times before they are rounded."""
    slo = SloSection(ttft_s=ttft_s, tpot_s=tpot_s)
    exact = replace(RUN, e2e_s=(0.9 - 1e-9, 1.4 - 1e-9, 1.9 - 1e-9, 0.5))  # 0.4 / 4 in binary is above 0.1
    assert RatedRun.of(exact).good(Promise.of(slo)) == good_requests(exact, slo)


def test_good_requests_are_those_that_keep_the_promise() -> None:
    """The table of times and the rule for one request say the same."""
    kept = RatedRun.of(RUN)
    found = set()
    for promise in (NOTHING, Promise(1.0), Promise(itl_s=0.15), Promise(1.0, 0.1, 0.1), Promise(0.1)):
        each = map(promise.kept, kept.ttft_s, kept.tpot_s, kept.gap_s)
        assert kept.good(promise) == sum(each)
        found.add(kept.good(promise))
    assert found == {4, 3, 2, 0}


def test_rates_of_good_requests() -> None:
    """Two in 10 s; compared as (2 + 1/2) / (4 + 1) of 4, and not as 0 where none is good."""
    kept = RatedRun.of(RUN)
    assert kept.good_per_s(Promise(1.0, 0.1, 0.1)) == pytest.approx(0.2)
    assert kept.comparable_per_s(Promise(1.0, 0.1, 0.1)) == pytest.approx(0.2)
    assert kept.comparable_per_s(Promise(0.1)) == pytest.approx(0.1 * 4 / 10)


def test_late_gaps() -> None:
    """Two of twelve are longer than 0.1 s, none longer than 0.2 s."""
    kept = RatedRun.of(RUN)
    assert kept.gaps_above(0.1) == pytest.approx(2 / 12)
    assert kept.gaps_above(0.2) == 0.0
    assert replace(kept, gaps={}).gaps_above(0.1) is None


@pytest.mark.parametrize(
    ("gap_s", "kept_s"),
    [(0.05, 0.05), (0.050001, 0.0501), (0.0123, 0.0123), (0.012301, 0.0124), (1.2345, 1.24), (0.0, 0.0),
     (0.000999, 0.000999), (0.0999501, 0.1)],
)  # fmt: skip
def test_a_limit_of_three_digits_divides_gaps_as_measured(gap_s: float, kept_s: float) -> None:
    assert rounded_up(gap_s) == pytest.approx(kept_s, rel=1e-12)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (replace(RUN, invalid="no proof"), "no proof"),
        (
            replace(RUN, workload=OPEN.model_copy(update={"rate_per_s": None, "concurrency": 1})),
            "closed loop",
        ),
        (replace(RUN, streams=(STEADY,) * 4), "no requests"),
    ],
)
def test_what_is_no_point_is_refused(run: Run, why: str) -> None:
    with pytest.raises(InvalidRun, match=why):
        RatedRun.of(run, MAIN)

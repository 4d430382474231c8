"""What a gate compares, on made-up runs: whose pairs it takes, and that nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import GateSection
from disagglab.errors import InvalidRun
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.match import LIMIT, between, is_row_of, match_of
from disagglab.experiments.rounds import WARM_UP_ROUND
from disagglab.stats.verdict import judge
from selftest.experiments.made import made_run

LAB = load_lab("embedded")
USER = LAB.workload("one-user")
TTFT = next(gate for gate in LAB.gates if gate.metric == "ttft_p50")
BEST = TTFT.model_copy(update={"baseline": "best"})
TIMES = {
    "single": (1.0, 1.1, 1.2),
    "replicated": (0.9, 1.0, 1.0),
    "replicated@tuned": (0.5, 0.6, 0.55),
    "sharded": (0.8, 0.8, 0.9),
    "disaggregated": (0.7, 0.8, 0.75),
    "disaggregated@tuned": (0.6, 0.72, 0.66),
    "single-again": (0.1, 0.1, 0.1),
    "replicated@tuned-again": (0.1, 0.1, 0.1),
    "dynamo-kv": (0.1, 0.1, 0.1),
}


def compared(times: Mapping[str, Sequence[float]] = TIMES, broken: Sequence[str] = ()) -> Comparison:
    """Rounds of these arms; the runs of some of them do not count."""
    return Comparison(
        [
            made_run(arm, USER, number, seconds, invalid="broken" if arm in broken else None)
            for arm, row in times.items()
            for number, seconds in enumerate(row)
        ],
        LAB.slo,
    )


def test_the_best_is_that_of_the_other_ways() -> None:
    """All kinds but the candidate's, the lab's own settings and ways; no twin, nothing that is no way."""
    match = match_of(compared(), BEST)
    assert list(match.pairs) == ["single", "replicated", "replicated@tuned", "sharded"]
    assert match.pairs["sharded"] == [(0.8, 0.7), (0.8, 0.8), (0.9, 0.75)]
    found = match.judge("fixed-n")
    assert (found.baseline, found.k, match.rounds) == ("replicated@tuned", 4, 3)
    assert match.called(found.baseline) == "best: replicated@tuned"


def test_a_way_is_a_candidate_like_any_other() -> None:
    """Tuned replicas against the best: then the disaggregated arms are among the others."""
    gate = BEST.model_copy(update={"candidate": "replicated@tuned"})
    match = match_of(compared(), gate)
    assert list(match.pairs) == ["single", "sharded", "disaggregated", "disaggregated@tuned"]
    assert match.judge("fixed-n").baseline == "disaggregated@tuned"
    assert match.judge("fixed-n").verdict.outcome == "better"


def test_a_named_baseline_and_a_limit() -> None:
    """One baseline, by its own name; a limit takes every run of the candidate that counts."""
    named = match_of(compared(), TTFT)
    assert list(named.pairs) == ["single"]
    assert named.called("single") == "single"
    assert named.judge("fixed-n").verdict == judge(named.pairs["single"], "lower", TTFT.margin)
    limit = TTFT.model_copy(update={"baseline": None, "limit": 0.5, "candidate": "sharded"})
    assert match_of(compared(), limit).pairs == {LIMIT: [(0.5, 0.8), (0.5, 0.8), (0.5, 0.9)]}
    assert between(compared(), limit, "single", "sharded").pairs["single"][0] == (1.0, 0.8)


def test_an_arm_without_a_run_that_counts_is_not_left_out_in_silence() -> None:
    """It was measured and is another way, so the best is not known without it."""
    match = match_of(compared(broken=["sharded"]), BEST)
    assert match.lacking == ("sharded",)
    assert not match.whole
    with pytest.raises(InvalidRun, match="baseline sharded: no pair"):
        match.judge("fixed-n")
    warm = Comparison([made_run("sharded", USER, WARM_UP_ROUND), *compared({"single": (1.0,)}).runs])
    assert list(match_of(warm, BEST).pairs) == ["single"], "a warm-up is no measurement"
    assert not match_of(Comparison([]), BEST).whole


@pytest.mark.parametrize(
    ("asked", "candidate", "baseline", "same"),
    [
        (BEST, "disaggregated", "best: sharded", True),
        (BEST, "disaggregated", "sharded", False),
        (BEST, "disaggregated@tuned", "best: sharded", False),
        (TTFT, "disaggregated", "single", True),
        (TTFT, "disaggregated", "best: single", False),
        (TTFT.model_copy(update={"baseline": None, "limit": 1.0}), "disaggregated", "limit", True),
    ],
)
def test_a_row_is_told_by_its_names(asked: GateSection, candidate: str, baseline: str, same: bool) -> None:
    """The picked baseline changes from round to round; that it was picked does not."""
    assert is_row_of(asked, candidate, baseline) == same

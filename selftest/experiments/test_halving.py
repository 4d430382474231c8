"""Successive halving on made runs: it finds what is best, pays equal effort, and tells luck from gain.

Oracle: the speeds that the runs were made with.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import SloSection
from disagglab.config.setting import Candidate, Setting, options
from disagglab.errors import InvalidRun
from disagglab.experiments.halving import Measure, schedule, search, seed_of
from disagglab.results.records import Run
from disagglab.results.search_record import Search
from selftest.experiments.made import made_run

LAB = load_lab("embedded")
WORKLOAD = LAB.workload("long-prompts-into-steady-decode")  # an open loop of 6 requests
SLO = SloSection(ttft_s=1.0, tpot_s=10.0)
KINDS = ("single", "replicated", "disaggregated")
Speed = Callable[[Candidate, int], float | str | None]  # seconds of a request; invalid: why; None: no start


def drawn(count: int) -> tuple[Setting, ...]:
    """The lab's own setting, then some of which each has its number as an option."""
    return (Setting(), *(Setting(options({"max-num-seqs": number})) for number in range(1, count)))


def number_of(candidate: Candidate) -> int:
    """The number of a setting; 0 is the lab's own."""
    return int(dict(candidate.setting.args).get("max-num-seqs", 0))


def measuring(speed: Speed, calls: list[tuple[str, int, list[Candidate]]] | None = None) -> Measure:
    """Measures by making runs up; notes what it was asked for."""

    def measure(candidates: Sequence[Candidate], seed: int, rung: str) -> Mapping[Candidate, Run | str]:
        if calls is not None:
            calls.append((rung, seed, list(candidates)))
        found: dict[Candidate, Run | str] = {}
        for one in candidates:
            value = speed(one, seed)
            if value is None:
                found[one] = "did not start: out of memory"
            else:
                reason = value if isinstance(value, str) else None
                seconds = 0.5 if isinstance(value, str) else value
                found[one] = made_run(one.kind, WORKLOAD, 0, seconds, seed=seed, invalid=reason)
        return found

    return measure


def searched(
    speed: Speed,
    count: int = 8,
    kinds: Sequence[str] = KINDS,
    confirm: int = 2,
    calls: list[tuple[str, int, list[Candidate]]] | None = None,
) -> Search:
    """A search of so many settings a kind."""
    settings = {kind: drawn(count) for kind in kinds}
    return search(settings, measuring(speed, calls), WORKLOAD, SLO, 18, confirm)


def ordered(candidate: Candidate, _seed: int) -> float:
    """All requests good; the higher the number, the lower the gaps. disaggregated: the other way round."""
    number = number_of(candidate)
    return 0.1 + 0.01 * (number if candidate.kind == "disaggregated" else 20 - number)


@pytest.mark.parametrize(
    ("settings", "rungs"), [(2, (2,)), (3, (3, 2)), (4, (4, 2)), (6, (6, 3, 2)), (8, (8, 4, 2))]
)
def test_half_of_the_settings_goes_on(settings: int, rungs: tuple[int, ...]) -> None:
    assert schedule(settings) == rungs
    with pytest.raises(ValueError, match="nothing to choose"):
        schedule(1)


def test_the_best_of_every_kind_is_found() -> None:
    """7 is best where gaps fall with the number; the lab's own, 0, where they rise."""
    found = searched(ordered)
    picks = {one.kind: one.pick for one in found.outcomes}
    assert picks == {"single": drawn(8)[7], "replicated": drawn(8)[7], "disaggregated": Setting()}
    assert found.outcome("disaggregated").found is None
    assert found.outcome("disaggregated").why == "the lab's own setting won the search"


def test_good_requests_go_before_gaps() -> None:
    """3 misses the objective and has the lowest gaps by far: it is out in the first rung."""

    def speed(candidate: Candidate, _seed: int) -> float:
        return 1.1 if number_of(candidate) == 3 else 0.5 + 0.01 * number_of(candidate)

    found = searched(speed, kinds=["single"])
    tried = [number_of(trial.candidate) for trial in found.searched() if trial.rung != "rung 0"]
    assert 3 not in tried
    assert found.outcome("single").winner == Setting()


def test_every_rung_is_paired_and_has_fresh_prompts() -> None:
    """One call a rung, with the candidates of all kinds and one seed, which no other rung has."""
    calls: list[tuple[str, int, list[Candidate]]] = []
    found = searched(ordered, calls=calls)
    assert [rung for rung, *_ in calls] == ["rung 0", "rung 1", "rung 2", "confirm 1", "confirm 2"]
    assert [len(each) for *_, each in calls] == [24, 12, 6, 4, 4]
    seeds = [seed for _, seed, _ in calls]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [seed_of(18, rung) for rung, *_ in calls]
    assert {trial.rung: trial.seed for trial in found.trials} == {rung: seed for rung, seed, _ in calls}


def test_effort_is_equal() -> None:
    """8 + 4 + 2 runs a kind. single, replicated and disaggregated are played by the same servers, so the
    search needs no more starts than one of them would, as long as the same settings are left.
    """
    found = searched(lambda candidate, _seed: 0.1 + 0.01 * number_of(candidate))
    found.require_equal_effort()
    assert [(one.settings, one.trials, one.runs, one.starts) for one in found.efforts] == [
        (8, 14, 14, 14)
    ] * 3
    assert found.starts == 14  # the lab's own won everywhere, so nothing was confirmed
    assert found.shortfalls() == []
    assert found.efforts[0].run_s == pytest.approx(sum(
        one.seen.took_s for one in found.searched("single") if one.seen is not None
    ))  # fmt: skip


def test_unequal_effort_is_refused() -> None:
    """The same search with a trial left out, and with one twice."""
    found = searched(ordered)
    last = max(place for place, trial in enumerate(found.trials) if trial.rung == "rung 1")
    cut = (*found.trials[:last], *found.trials[last + 1 :])
    with pytest.raises(InvalidRun, match="disaggregated had 3 trials in rung 1, and 4 are due"):
        dataclasses.replace(found, trials=cut).require_equal_effort()
    with pytest.raises(InvalidRun, match="disaggregated had 5 trials in rung 1, and 4 are due"):
        dataclasses.replace(found, trials=(*found.trials, found.trials[last])).require_equal_effort()


def test_settings_are_judged_by_all_of_their_runs() -> None:
    """1 is best in rung 0 by far and a little worse than 2 in rung 1: over both, it is ahead."""

    def speed(candidate: Candidate, seed: int) -> float:
        number = number_of(candidate)
        if seed == seed_of(18, "rung 1"):
            return {1: 0.22, 2: 0.2}.get(number, 0.9)
        return {1: 0.1, 2: 0.2}.get(number, 0.9)

    assert searched(speed, 4, ["single"]).outcome("single").winner == drawn(4)[1]


def test_what_fails_is_out_with_its_reason() -> None:
    """A start that fails and a run that is invalid end neither the search nor the other kinds."""

    def speed(candidate: Candidate, seed: int) -> float | str | None:
        if candidate.kind == "replicated":
            if number_of(candidate) == 7:
                return None
            if number_of(candidate) == 6:
                return "the client was late"
        return ordered(candidate, seed)

    found = searched(speed)
    assert found.outcome("single").pick == drawn(8)[7]
    assert found.outcome("replicated").pick == drawn(8)[5]
    out = {number_of(one.candidate): one.why_out for one in found.trials if one.seen is None}
    assert out == {7: "did not start: out of memory", 6: "invalid run: the client was late"}
    found.require_equal_effort()
    assert [one.trials for one in found.efforts] == [14, 14, 14]
    assert [one.runs for one in found.efforts] == [14, 12, 14]


def test_a_kind_that_lost_its_settings_is_told() -> None:
    """Five of eight fail in rung 0: three go on where four were planned. That is no unequal effort."""

    def speed(candidate: Candidate, seed: int) -> float | None:
        failed = candidate.kind == "single" and number_of(candidate) >= 3
        return None if failed else ordered(candidate, seed)

    found = searched(speed)
    found.require_equal_effort()
    assert [one.trials for one in found.efforts] == [13, 14, 14]
    (told,) = found.shortfalls()
    assert told.startswith("single, rung 1: 3 of 4 planned")


def test_one_that_is_left_alone_has_won() -> None:
    """Seven of eight fail: nothing is left to compare it with, so it runs no further rung."""

    def speed(candidate: Candidate, _seed: int) -> float | None:
        return 0.5 if number_of(candidate) == 4 else None

    found = searched(speed, kinds=["single"])
    assert len(found.searched()) == 8
    one = found.outcome("single")
    assert (one.winner, one.pick, one.found, one.confirmed) == (drawn(8)[4], drawn(8)[4], None, None)
    assert one.why == "the lab's own setting gave no valid run, so nothing confirms the winner"
    found.require_equal_effort()


def test_a_kind_of_which_nothing_runs_has_no_pick() -> None:
    found = searched(lambda one, seed: None if one.kind == "single" else ordered(one, seed))
    assert found.outcome("single").pick is None
    assert found.outcome("single").why == "no setting gave a valid run"
    assert found.outcome("replicated").pick == drawn(8)[7]
    found.require_equal_effort()


def test_a_winner_by_luck_is_not_picked() -> None:
    """1 has half the gaps of the lab's own in the search and a fifth more on fresh prompts."""
    fresh = {seed_of(18, f"confirm {number}") for number in (1, 2)}

    def speed(candidate: Candidate, seed: int) -> float:
        if number_of(candidate) == 1:
            return 0.6 if seed in fresh else 0.25
        return 0.5 + 0.1 * (number_of(candidate) > 0)

    one = searched(speed, 4, ["replicated"]).outcome("replicated")
    assert (one.winner, one.pick) == (drawn(4)[1], Setting())
    assert one.found is not None
    assert one.confirmed is not None
    assert one.found.itl_p99 == pytest.approx(-0.5)
    assert one.confirmed.itl_p99 == pytest.approx(0.2)
    assert "behind" in one.why


def test_a_winner_that_is_ahead_is_picked_with_both_gains() -> None:
    """Own: no request good, 0.2 s gaps. Winner: all six good, 0.05 s gaps, in search and confirmation."""

    def speed(candidate: Candidate, _seed: int) -> float:
        return 0.5 if number_of(candidate) == 1 else 2.0

    one = searched(speed, 4, ["replicated"], confirm=3).outcome("replicated")
    assert one.pick == one.winner == drawn(4)[1]
    for gain, pairs in ((one.found, 2), (one.confirmed, 3)):  # the lab's own came second in rung 0
        assert gain is not None
        assert (len(gain.pairs), gain.own.good, gain.winner.good) == (pairs, 0, 6 * pairs)
        assert gain.good_per_s is None  # of none there is no ratio
        assert gain.itl_p99 == pytest.approx(-0.75)


def test_a_winner_that_no_longer_runs_is_not_picked() -> None:
    """It starts in the search and not on fresh prompts; it is not asked for again."""
    calls: list[tuple[str, int, list[Candidate]]] = []

    def speed(candidate: Candidate, seed: int) -> float | None:
        fresh = seed not in {seed_of(18, "rung 0"), seed_of(18, "rung 1")}
        return None if fresh and number_of(candidate) == 3 else ordered(candidate, seed)

    one = searched(speed, 4, ["single"], 3, calls).outcome("single")
    assert (one.winner, one.pick, one.confirmed) == (drawn(4)[3], Setting(), None)
    assert "no valid run on fresh prompts" in one.why
    assert [rung for rung, *_ in calls if rung.startswith("confirm")] == ["confirm 1"]


def test_the_gain_of_a_search_among_equals_is_luck() -> None:
    """Eight settings that are all the same, with noise of 20 %: the search finds a lower p99 ITL than the
    lab's own, and fresh prompts do not.
    """
    found, confirmed = [], []
    for trial in range(60):
        source = random.Random(trial)

        def speed(_candidate: Candidate, _seed: int, source: random.Random = source) -> float:
            return 0.3 * math.exp(source.gauss(0, 0.2))

        one = searched(speed, 8, ["single"], 3).outcome("single")
        if one.found is not None and one.confirmed is not None:
            found.append(one.found.itl_p99 or 0.0)
            confirmed.append(one.confirmed.itl_p99 or 0.0)
    assert len(found) > 30
    assert statistics.median(found) < -0.1
    assert abs(statistics.median(confirmed)) < 0.1


def test_kinds_have_equally_many_settings() -> None:
    with pytest.raises(ValueError, match="equally many"):
        search({"single": drawn(3), "replicated": drawn(4)}, measuring(ordered), WORKLOAD, SLO, 1, 1)
    with pytest.raises(ValueError, match="each of them once"):
        search({"single": (Setting(), Setting())}, measuring(ordered), WORKLOAD, SLO, 1, 1)


def test_a_measure_that_leaves_one_out_is_refused() -> None:
    def measure(candidates: Sequence[Candidate], seed: int, rung: str) -> Mapping[Candidate, Run | str]:
        return measuring(ordered)(candidates[1:], seed, rung)

    with pytest.raises(InvalidRun, match="rung 0: neither a run nor a reason for single: the lab's own"):
        search({"single": drawn(4)}, measure, WORKLOAD, SLO, 1, 1)

"""Successive halving: every setting gets a short look, the better half of them a second one, and so on.

Source: K. Jamieson, A. Talwalkar, Non-stochastic best arm identification and hyperparameter optimization,
AISTATS 2016. Here a rung is one run of each setting that is left, all on the same prompts, so that settings
are compared in pairs; a setting is judged by all of its runs. Every kind of way is halved by itself, beside
the others: what is asked for is the best setting of each.

Who has won by a search has also had luck in it. So the winner and the lab's own setting run again on prompts
that nothing was chosen by, and the winner is picked unless it is behind there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from disagglab.config.schema import SloSection
from disagglab.config.setting import Candidate, Setting
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.results.objective import ranked, score, seen
from disagglab.results.records import Run
from disagglab.results.search_record import CONFIRM, RUNG, Gain, Outcome, Search, Trial

# Runs every candidate once: candidates, seed of the prompts, name of the rung -> its run, or in words why it
# could not be run, as where a server did not start. The order is the caller's: by start, where starts cost.
Measure = Callable[[Sequence[Candidate], int, str], Mapping[Candidate, Run | str]]


def schedule(settings: int) -> tuple[int, ...]:
    """How many settings of a kind run in each rung: 8, 4, 2; one is left after the last.

    Raises:
        ValueError: if there are fewer than two, which leaves nothing to choose.
    """
    if settings < 2:
        raise ValueError(f"{settings} settings leave nothing to choose")
    found = [settings]
    while found[-1] > 2:
        found.append(-(-found[-1] // 2))
    return tuple(found)


def seed_of(seed: int, rung: str) -> int:
    """The seed of a rung's prompts; another one for each."""
    return random.Random(f"{seed} {rung}").getrandbits(31)


def search(
    settings: Mapping[str, Sequence[Setting]],
    measure: Measure,
    workload: Workload,
    slo: SloSection,
    seed: int,
    confirm: int,
) -> Search:
    """Find the best setting of every kind.

    Args:
        settings: by kind, equally many of each, the lab's own first.
        measure: called once a rung with all candidates of it.
        workload: that is run, scaled to the lab.
        slo: the lab's objective.
        seed: that of each rung follows from it.
        confirm: runs of each winner, and of the lab's own setting, on fresh prompts.

    Raises:
        ValueError: if kinds have different numbers of settings, or a kind has one twice.
        InvalidRun: if ``measure`` did not answer for every candidate.
    """
    counts = {len(each) for each in settings.values()}
    if len(counts) != 1 or any(len(set(each)) != len(each) for each in settings.values()):
        raise ValueError("kinds need equally many settings, each of them once")
    rungs = schedule(counts.pop())
    halving = _Halving(measure, slo, seed, workload.rate_per_s is not None)
    alive = {kind: list(each) for kind, each in settings.items()}
    for index in range(len(rungs)):
        keep = rungs[index + 1] if index + 1 < len(rungs) else 1
        running = {kind: each for kind, each in alive.items() if index == 0 or len(each) > 1}
        if not running:
            break
        halving.run(
            [Candidate(kind, one) for kind, each in running.items() for one in each], f"{RUNG} {index}"
        )
        for kind, each in running.items():
            alive[kind] = halving.ranking(kind, each)[:keep]
    winners = {kind: each[0] if each else None for kind, each in alive.items()}
    own = {kind: each[0] for kind, each in settings.items()}
    halving.confirm(winners, own, confirm)
    return Search(
        workload=workload.name,
        open_loop=halving.open_loop,
        slo_ttft_s=slo.ttft_s,
        slo_tpot_s=slo.tpot_s,
        seed=seed,
        settings={kind: tuple(each) for kind, each in settings.items()},
        rungs=rungs,
        trials=tuple(halving.trials),
        outcomes=tuple(halving.outcome(kind, winners[kind], own[kind]) for kind in settings),
    )


class _Halving:
    """The trials so far."""

    def __init__(self, measure: Measure, slo: SloSection, seed: int, open_loop: bool) -> None:
        self._measure, self._slo, self._seed = measure, slo, seed
        self.open_loop = open_loop
        self.trials: list[Trial] = []
        self._not_run: set[Candidate] = set()  # where not even an invalid run came back

    def run(self, candidates: Sequence[Candidate], rung: str) -> None:
        """One run of each candidate."""
        seed = seed_of(self._seed, rung)
        found = self._measure(candidates, seed, rung)
        lacking = [one.words for one in candidates if one not in found]
        if lacking:
            raise InvalidRun(f"{rung}: neither a run nor a reason for {'; '.join(lacking)}")
        self.trials += [self._trial(one, rung, seed, found[one]) for one in candidates]
        self._not_run.update(one for one in candidates if isinstance(found[one], str))

    def _trial(self, candidate: Candidate, rung: str, seed: int, run: Run | str) -> Trial:
        if isinstance(run, str):
            return Trial(candidate, rung, seed, None, run or "no reason given")
        if run.invalid:
            return Trial(candidate, rung, seed, None, f"invalid run: {run.invalid}")
        return Trial(candidate, rung, seed, seen(run, self._slo))

    def ranking(self, kind: str, settings: Sequence[Setting]) -> list[Setting]:
        """Those that have not failed, best first, by all of their runs."""
        runs = {
            one: [trial.seen for trial in self.trials if trial.candidate == Candidate(kind, one)]
            for one in settings
        }
        scores = {
            one: score([each for each in found if each is not None])
            for one, found in runs.items()
            if None not in found
        }
        return ranked(scores, self.open_loop)

    def confirm(self, winners: Mapping[str, Setting | None], own: Mapping[str, Setting], count: int) -> None:
        """Run winners and own settings on fresh prompts. A kind leaves when one of the two cannot be run."""
        going = {kind: one for kind, one in winners.items() if one is not None and one != own[kind]}
        for number in range(1, count + 1):
            pairs = [Candidate(kind, each) for kind, one in going.items() for each in (own[kind], one)]
            if not pairs:
                return
            self.run(pairs, f"{CONFIRM} {number}")
            failed = {one.kind for one in self._not_run.intersection(pairs)}
            going = {kind: one for kind, one in going.items() if kind not in failed}

    def gain(self, kind: str, winner: Setting, own: Setting, confirms: bool) -> Gain | None:
        """Of the rungs, or confirmations, in which both gave a valid run; None where there is none."""
        runs = {
            (trial.rung, trial.candidate): trial.seen for trial in self.trials if trial.confirms == confirms
        }
        pairs = []
        for rung in dict.fromkeys(name for name, _candidate in runs):
            before, after = (runs.get((rung, Candidate(kind, one))) for one in (own, winner))
            if before is not None and after is not None:
                pairs.append((before, after))
        return Gain(tuple(pairs)) if pairs else None

    def outcome(self, kind: str, winner: Setting | None, own: Setting) -> Outcome:
        """What a kind came to."""
        if winner is None:
            return Outcome(kind, None, None, None, None, "no setting gave a valid run")
        if winner == own:
            return Outcome(kind, winner, own, None, None, "the lab's own setting won the search")
        found, confirmed = (self.gain(kind, winner, own, confirms) for confirms in (False, True))
        if confirmed is None:
            return self._unconfirmed(kind, winner, own, found)
        if confirmed.behind(self.open_loop):
            why = "the winner of the search is behind the lab's own setting on fresh prompts"
            return Outcome(kind, winner, own, found, confirmed, why)
        return Outcome(kind, winner, winner, found, confirmed, "the winner is not behind on fresh prompts")

    def _unconfirmed(self, kind: str, winner: Setting, own: Setting, found: Gain | None) -> Outcome:
        """Where no pair of runs confirms: what gave a valid run last counts, own before winner."""
        last = {
            one: [t for t in self.trials if t.candidate == Candidate(kind, one)][-1:] for one in (own, winner)
        }
        if any(trial.seen is not None for trial in last[own]):
            return Outcome(kind, winner, own, found, None, "the winner gave no valid run on fresh prompts")
        why = "the lab's own setting gave no valid run, so nothing confirms the winner"
        return Outcome(kind, winner, winner, found, None, why)

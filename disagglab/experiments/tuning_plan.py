"""The plan of a search: settings, runs, starts of servers, and how long that may take, before any of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from disagglab import text
from disagglab.config import drawing
from disagglab.config.schema import Lab
from disagglab.config.search_checks import asked, workload_of
from disagglab.config.search_space import TuningSection
from disagglab.config.setting import OWN_WORDS, Candidate, Setting, start_key
from disagglab.config.way import DISAGGREGATED
from disagglab.config.workload import Workload
from disagglab.errors import ConfigError, Problem
from disagglab.experiments.halving import schedule
from disagglab.results.search_record import CONFIRM, RUNG

START_S = 30.0  # of one deployment: what two ranks on two cores take until they are ready (27 s)
GPU_START_S = 90.0  # on two H100 a start of an 8B model took 72 to 138 s
RUN_S = 20.0  # of a closed loop with its proof, which depends on the lab: no more than an order of magnitude
AROUND_S = 5.0  # of an open loop: warm-up, counters and the last answer, beside the time of its arrivals
LEAST = 2  # settings, of which one is the lab's own


@dataclass(frozen=True)
class Step:
    """A rung, or all confirmations. ``runs``: of each kind; ``starts``: of all kinds together, at most."""

    name: str
    settings: int
    runs: int
    starts: int


@dataclass(frozen=True)
class TuningPlan:
    """``settings``: by kind. ``start_s``, ``run_s``: assumed of one start, one run."""

    workload: Workload
    settings: Mapping[str, Sequence[Setting]]
    steps: tuple[Step, ...]
    start_s: float
    run_s: float

    @property
    def starts(self) -> int:
        """At most, of all kinds together."""
        return sum(step.starts for step in self.steps)

    @property
    def runs(self) -> int:
        """At most, of all kinds together."""
        return len(self.settings) * sum(step.runs for step in self.steps)

    @property
    def seconds(self) -> float:
        """What starts and runs take at the seconds assumed, at most."""
        return self.starts * self.start_s + self.runs * self.run_s

    def lines(self) -> list[str]:
        """As people read it."""
        load = self.workload
        loop = f"{load.rate_per_s:g}/s" if load.rate_per_s else f"{load.concurrency} at once"
        steps = [(step.name, str(step.settings), str(step.runs), str(step.starts)) for step in self.steps]
        return [
            f"search on {load.name}: {load.total_requests} requests a run, {loop};"
            f" ways: {', '.join(self.settings)}",
            *(f"  {number}. {words}" for number, words in enumerate(self._words(), 1)),
            *text.table([("", "settings", "runs a kind", "starts, all kinds"), *steps], right={1, 2, 3}),
            f"at most {self.runs} runs and {self.starts} starts: {self.seconds / 60:.0f} min,"
            f" if a start takes {self.start_s:g} s and a run {self.run_s:.0f} s",
        ]

    def _words(self) -> Iterator[str]:
        """Each setting once, with what only disaggregated serving has of it."""
        for number, each in enumerate(zip(*self.settings.values(), strict=True)):
            common = each[0].common
            further = [one for one in each if one != one.common]
            for one in further[:1]:
                yield f"{common.words}; {DISAGGREGATED} also {one.beside.words}"
            if not further:
                yield common.words if number else f"{OWN_WORDS} settings"


def plan(lab: Lab, tuning: TuningSection) -> TuningPlan:
    """The plan of a lab's search. Nothing is started.

    Args:
        tuning: as :func:`disagglab.config.search_checks.asked` gives it.

    Raises:
        ConfigError: if the workload does not fit the lab.
    """
    workload = workload_of(lab, tuning)
    settings = drawing.draw(lab, tuning)
    run_s = workload.run_requests / workload.rate_per_s + AROUND_S if workload.rate_per_s else RUN_S
    every = {start_key(Candidate(kind, one)) for kind, each in settings.items() for one in each}
    own = {start_key(Candidate(kind, Setting())) for kind in settings}
    steps = []
    for index, count in enumerate(schedule(tuning.settings)):
        starts = len(every) if index == 0 else min(len(every), len(settings) * count)
        steps.append(Step(f"{RUNG} {index}", count, count, starts))
    pairs = min(len(every), len(settings) + len(own))
    steps.append(Step(f"{CONFIRM} 1 to {tuning.confirm}", 2, 2 * tuning.confirm, pairs * tuning.confirm))
    start_s = GPU_START_S if any(node.gpus for node in lab.nodes) else START_S
    return TuningPlan(workload, settings, tuple(steps), start_s, run_s)


def fitting(lab: Lab, workload: str, budget_s: float) -> int:
    """The most settings of each way that a time is enough for, at the seconds that a plan assumes.

    Args:
        workload: in place of the section's; empty: the section's.
        budget_s: of the whole search.

    Raises:
        ConfigError: if not even two settings fit; see also :func:`disagglab.config.search_checks.asked`.
    """
    tuning = asked(lab, workload)
    for count in range(tuning.settings, LEAST - 1, -1):
        if plan(lab, tuning.model_copy(update={"settings": count})).seconds <= budget_s:
            return count
    least = plan(lab, tuning.model_copy(update={"settings": LEAST}))
    wrong = f"{budget_s:.0f} s, and two settings of each way take {least.seconds:.0f} s"
    mend = f"give {least.seconds / 60:.0f}m or more, or take kinds out of [tuning]"
    raise ConfigError([Problem("command line", "--budget", wrong, mend)])

"""A comparison in the time given: pilot rounds, a plan of trials, then the rounds that the plan asks for.

The plan is made again after every round, so a round is spent where a gate is still open; verdicts are those
that hold at every look (:mod:`disagglab.stats.sequential`). The order of a round is drawn by lot: equal arms
then differ by the throw of a coin, whatever the machine does from one round to the next.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from disagglab.config.arms import AGAIN, OWN, SINGLE_AGAIN, twin_of, twinned
from disagglab.config.schema import GateSection, Lab
from disagglab.config.workload import Workload
from disagglab.experiments import run_length, trials
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.rounds import Trial, runs
from disagglab.experiments.trials import PILOT_ROUNDS, TrialPlan
from disagglab.experiments.warming import warm_up
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.death import Died
from disagglab.serving.topology import Topology
from disagglab.stats.rule import ORDER_DRAWN, Rule

Turn = Trial[Topology, Workload]
TWIN_EVERY = 3  # rounds; the noise of a long session becomes known, and little time goes to it


@dataclass(frozen=True)
class Entrants:
    """Who takes part. ``arms``: by name, in the order of a round, twins included; ``judged``: the lab with
    the gates that can be judged by them; ``ways``: names of arms that stand beside the candidate.
    """

    arms: Mapping[str, Topology]
    judged: Lab
    ways: tuple[str, ...] = ()

    def gates(self, workload: str) -> list[GateSection]:
        """The gates of a workload."""
        return [gate for gate in self.judged.gates if gate.workload == workload]

    def needed(self, workload: str) -> tuple[str, ...]:
        """The arms that judge the gates of a workload."""
        return trials.arms_needed(self.gates(workload), self.ways, tuple(self.arms))

    def of_round(self, workload: str, number: int) -> tuple[str, ...]:
        """The arms of a round: those that the gates need, and in every third round the twin of the baseline,
        which measures the noise.
        """
        wanted = {*self.needed(workload)}
        if number % TWIN_EVERY == 1:
            wanted.add(trials.twin_needed(self.gates(workload), tuple(self.arms)) or "")
        return tuple(name for name in self.arms if name in wanted)


def entrants(topologies: Sequence[Topology], judged: Lab) -> Entrants:
    """Who takes part, of the arms that are kept. Where the twin of single is among them, every baseline of a
    gate gets one; of several from which the best is picked one does, see
    :func:`disagglab.config.arms.twinned`.
    """
    arms = {topology.name: topology for topology in topologies if topology.name != SINGLE_AGAIN}
    if any(topology.name == SINGLE_AGAIN for topology in topologies):
        found = dict.fromkeys(twinned(gate, arms) for gate in judged.gates)
        twins = {twin_of(name): replace(arms[name], name=twin_of(name)) for name in found if name}
        arms |= twins
    ways = tuple(name for name in arms if name not in OWN and not name.endswith(AGAIN))
    return Entrants(arms, judged, ways)


@dataclass
class Budget:
    """Seconds for a comparison. ``now``: a clock that never goes back."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.now()

    @property
    def spent_s(self) -> float:
        """Since it began."""
        return self.now() - self.begun

    @property
    def left_s(self) -> float:
        """Of it; never below 0."""
        return max(0.0, self.seconds - self.spent_s)


def run_in_time(
    engine: LoadEngine,
    who: Entrants,
    workloads: Sequence[Workload],
    budget_s: float,
    store: Store,
    shape: KvShape,
    progress: Callable[[str], None],
    tell: Callable[[Sequence[str]], None],
    earlier: Sequence[Run] = (),
    rule: Rule = ORDER_DRAWN,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Comparison, TrialPlan | None]:
    """Warm every server up, measure the pilot rounds whatever the budget, then by plan until the time is
    spent or no gate is open.

    Args:
        budget_s: for pilot and planned rounds together, s; the warm-up is not of it.
        tell: shows the plan, before the first round that it plans.
        earlier: rounds of earlier sessions, numbered from 0 on for each workload; they count as pilot, too.
        rule: of the verdicts by which gates are open.

    Returns:
        The comparison, and the plan as it stands after the last round; None where nothing could be planned.
        A server that dies ends the rounds; what was measured before is returned.
    """
    comparison = Comparison(list(earlier), who.judged.slo)
    first: list[TrialPlan] = []

    def rounds_of(workload: str) -> int:
        return 1 + max((run.round for run in comparison.runs if run.workload.name == workload), default=-1)

    def one_round(workload: Workload, most: int) -> Iterator[Turn]:
        number, seed = rounds_of(workload.name), random.getrandbits(31)
        arms = who.of_round(workload.name, number)
        for name in random.sample(arms, len(arms)):
            yield Trial(number, most, who.arms[name], workload, seed)

    def planned(sized: Sequence[Workload], left_s: float) -> TrialPlan:
        arms = {one.name: who.needed(one.name) for one in sized}
        return trials.plan(comparison, who.judged, sized, arms, budget_s, left_s, rule)

    budget = Budget(budget_s, now)

    def turns() -> Iterator[Turn]:
        for number in range(PILOT_ROUNDS):
            for workload in workloads:
                if rounds_of(workload.name) <= number:
                    short = run_length.shortest(workload, who.gates(workload.name)) if number else workload
                    yield from one_round(short, PILOT_ROUNDS)
        while True:
            left_s = budget.left_s
            sized = [
                _sized(comparison, who, workload, left_s / len(workloads), rule) for workload in workloads
            ]
            found = planned(sized, left_s)
            if not first:
                first.append(found)
                store.write_meta(trials=found.as_json())
                tell(found.lines())
            share = found.following()
            if share is None:
                return
            yield from one_round(share.workload, share.done + share.planned)

    try:
        warm_up(engine, list(who.arms.values()), workloads, shape, store, progress, comparison.runs)
        budget = Budget(budget_s, now)
        for run in runs(engine, turns(), shape, store, progress):
            comparison.runs.append(run)
    except Died as died:
        comparison.died = died
        return comparison, None
    sized = [run.workload for run in _last_of_each(comparison, workloads)]
    return comparison, planned(sized, 0.0)


def _sized(comparison: Comparison, who: Entrants, workload: Workload, left_s: float, rule: Rule) -> Workload:
    """The workload with the length of runs that suits the time left for it."""
    needed = who.needed(workload.name)
    return run_length.length_of(
        comparison, workload, who.gates(workload.name), needed, left_s / len(needed), rule
    )


def _last_of_each(comparison: Comparison, workloads: Sequence[Workload]) -> Iterator[Run]:
    for workload in workloads:
        found = [run for run in comparison.runs if run.workload.name == workload.name and run.round >= 0]
        if found:
            yield found[-1]

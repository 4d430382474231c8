"""What a search asks, measured: candidates grouped by the servers that play them, one start after another."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from disagglab.config.setting import Candidate, Setting
from disagglab.config.workload import Workload
from disagglab.errors import ConfigError, LabError, StartError
from disagglab.experiments.campaign import closed
from disagglab.experiments.halving import Measure
from disagglab.experiments.turns import Contender, Load, by_start
from disagglab.measure.run import measure
from disagglab.results.records import Run
from disagglab.serving.death import Died
from disagglab.serving.topology import Topology

TRY = "try"  # ways of a search are called KIND@try-N


def measurer(load: Load, workload: Workload) -> Measure:
    """Measures each candidate of a rung once; one whose servers do not come up, or die while they are warmed
    up, is answered with the reason. The prompts of a rung are the same for all.
    """
    numbers: dict[Setting, int] = {}

    def measured(candidates: Sequence[Candidate], seed: int, rung: str) -> Mapping[Candidate, Run | str]:
        found: dict[Candidate, Run | str] = {}
        asked: dict[str, Candidate] = {}
        contenders = []
        for one in candidates:
            number = numbers.setdefault(one.setting, len(numbers))
            section = one.setting.way(one.kind, f"{TRY}-{number}", one.setting.words, "to be found out")
            contenders.append(Contender.of(section))
            asked[section.arm] = one
        groups = by_start(load.fleet, contenders)
        later = groups[1:]
        random.Random(seed).shuffle(later)  # drift within a rung favours no place of the draw
        for group in (*groups[:1], *later):
            load.show(f"{rung}: {', '.join(one.arm for one in group)}")
            left = list(group)
            while left:  # once, or again on servers started anew where one has died of a run
                try:
                    topologies = load.ready(left, [closed(workload)])
                except (ConfigError, StartError, Died) as error:
                    found |= {asked[one.arm]: _reason(error) for one in left}
                    break
                for topology in topologies:
                    load.show(f"{rung}: {topology.name}")
                    run = measure(load.engine, topology, workload, seed, len(numbers), load.shape)
                    load.store.add_run(run)
                    found[asked[topology.name]] = run
                    left.pop(0)
                    if run.invalid is not None and _has_died(topology):
                        break
        return found

    return measured


def _has_died(topology: Topology) -> bool:
    """Whether a server or the router has ended, so that others on them could not be measured either."""
    try:
        topology.require_alive()
    except Died:
        return True
    return False


def _reason(error: LabError) -> str:
    """Why servers did not come up, without the tail of their log; of bad input what is wrong with it."""
    if isinstance(error, ConfigError):
        return "; ".join(problem.wrong.splitlines()[0] for problem in error.problems)
    lines = str(error.death if isinstance(error, Died) else error).splitlines()
    return next((line for line in lines if line.startswith("likely cause")), lines[0])

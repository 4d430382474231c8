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
            try:
                topologies = load.ready(group, [closed(workload)])
            except (ConfigError, StartError, Died) as error:
                found |= {asked[one.arm]: _reason(error) for one in group}
                continue
            for topology in topologies:
                load.show(f"{rung}: {topology.name}")
                run = measure(load.engine, topology, workload, seed, len(numbers), load.shape)
                load.store.add_run(run)
                found[asked[topology.name]] = run
        return found

    return measured


def _reason(error: LabError) -> str:
    """Why servers did not come up, without the tail of their log."""
    lines = str(error).splitlines()
    return next((line for line in lines if line.startswith("likely cause")), lines[0])

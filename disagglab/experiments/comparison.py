"""Topologies measured in turns, round by round."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from disagglab.config.arrivals import MAIN, STEADY
from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.errors import StartError
from disagglab.experiments.rounds import WARM_UP_ROUND, runs, trials
from disagglab.experiments.warming import warm_up
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.results.metrics import figures
from disagglab.results.open_loop import saturated
from disagglab.results.records import FigureRow, Run
from disagglab.results.run_folder import Store
from disagglab.serving.death import Died
from disagglab.serving.topology import Topology
from disagglab.stats.metric import METRICS, of_stream


@dataclass
class Comparison:
    """All runs of one session's comparison, valid and invalid; ``slo`` decides which requests were good.

    ``died``: what ended it before its last round.
    """

    runs: list[Run] = field(default_factory=list)
    slo: SloSection | None = None
    died: Died | StartError | None = None

    def valid(self, workload: str, topology: str) -> list[Run]:
        """The runs that count, by round."""
        found = [
            r
            for r in self.runs
            if r.workload.name == workload and r.topology == topology and r.invalid is None
        ]
        return sorted(found, key=lambda run: run.round)

    def arms(self, workload: str, counted: bool = True) -> list[str]:
        """The arms with a run of a workload that counts, in the order of their first.

        Args:
            counted: False also takes those of which no run counts.
        """
        found = (run for run in self.runs if run.workload.name == workload and run.round != WARM_UP_ROUND)
        return list(dict.fromkeys(run.topology for run in found if run.invalid is None or not counted))

    def invalid(self) -> list[Run]:
        """The runs that do not count; each carries its reason."""
        return [run for run in self.runs if run.invalid is not None]

    def values(self, workload: str, topology: str, metric: str, stream: str = "") -> list[float]:
        """A run-level figure by round; runs that do not have it (too few samples) are left out."""
        found = (figures(run, self.slo, stream)[metric] for run in self.valid(workload, topology))
        return [value for value in found if value is not None]

    def pairs(
        self, workload: str, baseline: str, candidate: str, metric: str, stream: str = ""
    ) -> list[tuple[float, float]]:
        """(baseline, candidate) of every round in which both runs are valid, as a verdict takes them."""

        def value(run: Run) -> float | None:
            found = figures(run, self.slo, stream)[metric]
            return None if found is None else METRICS[metric].comparable(found, len(run.ttft_s))

        rounds = {run.round: value(run) for run in self.valid(workload, baseline)}
        pairs = []
        for run in self.valid(workload, candidate):
            left, right = rounds.get(run.round), value(run)
            if left is not None and right is not None:
                pairs.append((left, right))
        return pairs

    def of_pairs(
        self, workload: str, arms: Sequence[str], metric: str, stream: str = ""
    ) -> dict[str, list[float]]:
        """The figures of each arm in the rounds in which all of these arms have one."""
        by_arm = {
            arm: {run.round: figures(run, self.slo, stream)[metric] for run in self.valid(workload, arm)}
            for arm in arms
        }
        first, *others = by_arm.values()
        shared = [
            number
            for number, value in first.items()
            if value is not None and all(other.get(number) is not None for other in others)
        ]
        return {
            arm: [value for number in shared if (value := found[number]) is not None]
            for arm, found in by_arm.items()
        }

    def saturated(self, workload: str, topology: str) -> int:
        """How many of the runs that count fell behind their arrivals."""
        return sum(saturated(run) for run in self.valid(workload, topology))


def run_rounds(
    engine: LoadEngine,
    topologies: Sequence[Topology],
    workloads: Sequence[Workload],
    rounds: int,
    store: Store,
    shape: KvShape,
    progress: Callable[[str], None],
    cap: int = 0,
    open_workloads: Callable[[Comparison], Container[str]] = lambda _: (),
    slo: SloSection | None = None,
    earlier: Sequence[Run] = (),
) -> Comparison:
    """Warm every topology up, then measure all of them in every round.

    See :func:`disagglab.experiments.rounds.turns` for order and prompts. ``cap``: fixed beforehand; up to so
    many rounds are made of the workloads that ``open_workloads`` names when the planned ones are over.
    ``earlier``: whole rounds of earlier sessions, numbered from 0 on for each workload; they come first and
    count among ``rounds``. A server that dies ends the rounds; what was measured before is returned.
    """
    comparison = Comparison(list(earlier), slo)
    done = {
        one.name: 1 + max((run.round for run in earlier if run.workload.name == one.name), default=-1)
        for one in workloads
    }

    def wanted(number: int) -> list[Workload]:
        lacking = [one for one in workloads if done[one.name] <= number]
        still_open = open_workloads(comparison) if lacking and number >= rounds else done
        return [one for one in lacking if one.name in still_open]

    all_turns = trials(topologies, wanted, rounds, lambda *_: random.getrandbits(31), cap)
    try:
        warm_up(engine, topologies, workloads, shape, store, progress, comparison.runs)
        for run in runs(engine, all_turns, shape, store, progress):
            comparison.runs.append(run)
    except Died as died:
        comparison.died = died
    return comparison


def figure_rows(comparison: Comparison) -> list[FigureRow]:
    """Every run-level figure of every arm on every workload that was measured."""
    rows = []
    measured = {run.workload.name: run.workload for run in comparison.runs if run.round != WARM_UP_ROUND}
    for workload in measured.values():
        streams = ["", MAIN, STEADY] if workload.steady else [""]
        for arm in dict.fromkeys(run.topology for run in comparison.runs):
            for stream in streams:
                for metric in METRICS.values():
                    values = comparison.values(workload.name, arm, metric.name, stream)
                    if values:
                        name = of_stream(metric.name, stream)
                        found = (workload.name, arm, name, metric.unit, metric.better, tuple(values))
                        rows.append(FigureRow(*found, workload.definition))
    return rows

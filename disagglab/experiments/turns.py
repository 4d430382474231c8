"""Ways that take turns on the same nodes: servers start when their way's turn comes, and are warmed up then.

A start is a block: what differs between two starts of the same servers (placement, memory, which thread came
first) is in every pair of two ways, so it is in their spread. The twin of a way is its servers started again;
what differs between the two is what turns leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from disagglab.config.arms import twin_of
from disagglab.config.way_section import WaySection
from disagglab.config.workload import Workload
from disagglab.experiments.rounds import Trial, mirrored
from disagglab.experiments.warming import warm_up, warm_up_of
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.fleet import Fleet
from disagglab.serving.topology import Topology

Turn = Trial[Topology, Workload]


@dataclass(frozen=True)
class Contender:
    """A way that takes turns. ``way``: a section, or the name of a kind in the lab's own settings; ``again``:
    on servers started again, the twin of an A/A pair.
    """

    arm: str
    way: WaySection | str
    again: bool = False

    @classmethod
    def of(cls, way: WaySection | str) -> Contender:
        """A way under its own name."""
        return cls(way.arm if isinstance(way, WaySection) else way, way)

    @property
    def kind(self) -> str:
        """Single, replicated, disaggregated or sharded."""
        return self.way.kind if isinstance(self.way, WaySection) else self.way

    @property
    def twin(self) -> Contender:
        """The same on servers started again."""
        return Contender(twin_of(self.arm), self.way, again=True)


@dataclass(frozen=True)
class Load:
    """What starts and warms servers up, and measures on them.

    ``warm``: requests at once that a router and its servers were warmed up with, by their name and URL.
    """

    fleet: Fleet
    engine: LoadEngine
    shape: KvShape
    store: Store
    show: Callable[[str], None]
    warm: dict[tuple[str, str], int] = field(default_factory=dict)

    def ready(self, contenders: Sequence[Contender], workloads: Sequence[Workload]) -> list[Topology]:
        """The topologies of contenders whose servers are the same ones, started now if need be, warm.

        They are warmed up once a start, and again where a router is new or the workloads have more at once.

        Raises:
            StartError: if they do not come up.
            Died: if a server dies of the warm-up.
        """
        topologies = [self.fleet.topology(one.way, one.arm, one.again) for one in contenders]
        for topology in topologies:
            self.store.commands[f"router {topology.name}"] = topology.router.command
            for server in (*topology.servers, *topology.followers):
                self.store.commands[f"server {server.plan.process_name}"] = server.plan.command
        least = max(topology.cycle for topology in topologies)
        at_once = warm_up_of(workloads, least).requests
        keys = [(topology.served_name, topology.router.url) for topology in topologies]
        if any(self.warm.get(key, 0) < at_once for key in keys):
            broken: list[Run] = []
            warm_up(self.engine, topologies, workloads, self.shape, self.store, self.show, broken)
            self.warm.update(dict.fromkeys(keys, at_once))
        return topologies


def by_start(fleet: Fleet, contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Contenders that the same servers play beside each other; those whose servers run now come first."""
    groups: dict[str, list[Contender]] = {}
    for one in contenders:
        groups.setdefault(fleet.key_of(one.way, one.again), []).append(one)
    return [groups[key] for key in sorted(groups, key=lambda key: not fleet.runs(key))]


def in_turns(
    load: Load,
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    rounds: int,
    seed: Callable[[int, int], int],
    warm: Sequence[Workload],
) -> Iterator[Turn]:
    """Every way's turn at every workload in every round, start by start; the order of starts, and of
    workloads within one, is mirrored every other round.

    Args:
        seed: of a workload in a round, by the round's number and the workload's position: the same for all
            ways.
        warm: what servers are warmed up for after a start, in closed loops.

    Raises:
        StartError, Died: see :meth:`Load.ready`.
    """
    groups = by_start(load.fleet, contenders)
    for number in range(rounds):
        for group in mirrored(groups, number):
            topologies = load.ready(group, warm)
            places = mirrored(range(len(workloads)), number)
            for position in places:
                for topology in mirrored(topologies, number):
                    shared = seed(number, position)
                    yield Trial(number, rounds, topology, workloads[position], shared)

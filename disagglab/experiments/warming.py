"""The warm-up before runs that count: what is asked of which arm, so that no server and no pair is new."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from disagglab.config.workload import Workload
from disagglab.experiments.rounds import WARM_UP_ROUND, Trial, runs
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.topology import Topology

AT_LEAST_MET = 2  # requests through a router: the first one opens its connections


def warm_up(
    engine: LoadEngine,
    topologies: Sequence[Topology],
    workloads: Sequence[Workload],
    shape: KvShape,
    store: Store,
    progress: Callable[[str], None],
    broken: list[Run],
) -> None:
    """Let every server compute what the fullest workload has at once, and every router and pair of nodes
    meet.

    The whole load goes to arms with servers that have had none yet, those with the most equal servers first;
    each other router gets as many requests as make all pairs behind it. A twin is its arm a second time.

    Args:
        broken: where runs that do not count for another reason than being a warm-up are added.

    Raises:
        Died: see :func:`disagglab.experiments.rounds.runs`.
    """
    first = warm_up_turns(topologies, workloads)
    for run in runs(engine, first, shape, store, progress, named=lambda _: ""):
        if run.invalid is not None:  # a warm-up never counts, but one that broke is shown
            broken.append(run)


def warm_up_turns(
    topologies: Sequence[Topology], workloads: Sequence[Workload]
) -> list[Trial[Topology, Workload]]:
    """What a warm-up asks of which arm, in its order."""
    by_router: dict[str, Topology] = {}
    for topology in topologies:
        by_router.setdefault(topology.router.url, topology)
    whole = warm_up_of(workloads, max(topology.cycle for topology in topologies))
    loaded: set[int] = set()
    turns = []
    for arm in sorted(by_router.values(), key=lambda one: (bool(one.decode), -len(one.servers))):
        servers = {id(server) for server in arm.servers}
        few = min(whole.requests, max(AT_LEAST_MET, arm.cycle))
        load = _at_once(whole, few) if servers <= loaded else whole
        loaded |= servers
        turns.append(Trial(WARM_UP_ROUND, 0, arm, load, random.getrandbits(31)))
    return turns


def warm_up_of(workloads: Sequence[Workload], least: int = 1) -> Workload:
    """As many requests at once as the fullest of the workloads can have; it gets prompts of its own.

    Args:
        least: requests that it has in any case, so that every pair of nodes has met before it is measured.
    """
    fullest = max(workloads, key=lambda workload: workload.most_under_way)
    return _at_once(fullest, max(fullest.most_under_way, least))


def _at_once(workload: Workload, count: int) -> Workload:
    closed = {"rate_per_s": None, "steady": None, "shared_prefix_tokens": 0, "length": None}
    return workload.model_copy(update={"requests": count, "concurrency": count, **closed})

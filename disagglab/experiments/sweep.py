"""Open-loop arrivals at several rates, each on every arm; rates are shares of a closed loop's throughput."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments.rounds import mirrored
from disagglab.experiments.warming import warm_up_of
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.measure.run import measure
from disagglab.results import open_loop
from disagglab.results.metrics import figures
from disagglab.results.open_loop import KeepsUp
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.topology import Topology

SEED = 61_000
ATTAINMENT = 0.9  # of the requests sent have to be good for a rate to count as kept


@dataclass(frozen=True)
class Sweep:
    """One run of each arm at each offered rate (requests/s); ``capacity``: of replicated, closed loop."""

    capacity: float
    runs: dict[str, dict[float, Run]]


def sweep(
    engine: LoadEngine,
    single: Topology,
    replicated: Topology,
    disaggregated: Topology,
    workload: Workload,
    shape: KvShape,
    store: Store,
    progress: Callable[[str], None],
    short: bool = False,
) -> Sweep:
    """Capacity first, then every rate on every arm, in an order that is mirrored at every other rate.

    Args:
        short: every other rate.

    Raises:
        InvalidRun: if a run breaks a rule.
    """

    def run(topology: Topology, asked: Workload, seed: int, what: str) -> Run:
        progress(f"{topology.name}, {what}")
        done = measure(engine, topology, asked, seed, 0, shape)
        store.add_run(done)
        if done.invalid is not None:
            raise InvalidRun(done.invalid)
        return done

    order = (single, replicated, disaggregated)
    for topology in order:
        run(topology, warm_up_of([workload]), SEED, "warm-up")
    closed = run(replicated, workload, SEED + 1, "capacity")
    capacity = workload.requests / closed.duration_s
    shares = workload.rate_shares[::2] if short else workload.rate_shares
    runs: dict[str, dict[float, Run]] = {topology.kind: {} for topology in order}
    for number, share in enumerate(shares):
        rate = share * capacity
        for topology in mirrored(order, number):
            done = run(topology, workload.at_rate(rate), SEED + 2 + number, f"{rate:.2f} requests/s")
            runs[topology.kind][rate] = done
    return Sweep(capacity, runs)


def knee(runs: Mapping[float, Run], slo: SloSection) -> float | None:
    """The rate up to which every rate was kept: enough good requests, and a topology that keeps up for sure.

    None if not even the lowest was.
    """
    best = None
    for rate in sorted(runs):
        good = figures(runs[rate], slo)["slo_attainment"] or 0.0
        queue = open_loop.of(runs[rate])
        if good < ATTAINMENT or queue is None or queue.keeps_up is not KeepsUp.YES:
            break
        best = rate
    return best

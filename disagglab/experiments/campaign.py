"""Ways against each other at offered rates and on the workloads of gates: forecast, then measured in turns.

One pass over the ways is a round: a way's servers start, are warmed up, and measure everything that is asked
of the way in the round; then the next way has its turn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from disagglab.config import way
from disagglab.config.arms import DISAGGREGATED, REPLICATED, SINGLE
from disagglab.config.schema import Lab, SloSection
from disagglab.config.way_section import WaySection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun, StartError
from disagglab.experiments.calibration import Calibration, calibrate
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.rounds import runs
from disagglab.experiments.turns import Contender, Load, in_turns
from disagglab.kv.attention import Config
from disagglab.measure import ledger
from disagglab.measure.run import measure
from disagglab.predict import frontier_forecast, sharding, ways
from disagglab.predict.breakeven import Cluster
from disagglab.predict.frontier_forecast import FrontierForecast
from disagglab.predict.sharding import AllReduces
from disagglab.predict.simulation import Served
from disagglab.results.footprint import Footprint
from disagglab.results.records import Run
from disagglab.serving.death import Died

RATE_SEED, GATE_SEED, CAPACITY_SEED = 91_000, 95_000, 90_000
LATENCY_S = 50e-6  # of one all-reduce between processes of a host, beside its bytes: assumed, not measured


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What forecasts of a lab are made from. ``capacity_per_s``: requests/s that its replicas get through in
    a closed loop.
    """

    calibration: Calibration
    cluster: Cluster
    capacity_per_s: float


def closed(workload: Workload) -> Workload:
    """The workload as a closed loop, which shows what servers get through; an open one's with half of its
    requests at once, without steady ones.
    """
    if workload.concurrency is not None:
        return workload
    at_once = max(2, workload.requests // 2)
    return workload.model_copy(update={"rate_per_s": None, "steady": None, "concurrency": at_once})


def speeds(load: Load, lab: Lab, workload: Workload, short: bool = False) -> Speeds:
    """Measure the speeds of the lab's own servers, one at a time, and the capacity of its replicas.

    Raises:
        InvalidRun: if a run breaks a rule.
        StartError, Died: see :meth:`disagglab.experiments.turns.Load.ready`.
    """
    asked = closed(workload)
    own = [Contender.of(kind) for kind in (SINGLE, REPLICATED, DISAGGREGATED)]
    single, replicated, disaggregated = load.ready(own, [asked])
    longest = lab.model.max_model_len
    found = calibrate(
        load.engine, single, replicated, disaggregated, load.shape, longest, load.store, load.show, short
    )
    load.show("replicated, capacity")
    run = measure(load.engine, replicated, asked, CAPACITY_SEED, 0, load.shape)
    load.store.add_run(run)
    if run.invalid is not None:
        raise InvalidRun(f"capacity of the replicas: {run.invalid}")
    block = ledger.block_size(single.servers[0].metrics())
    return Speeds(found, found.cluster(lab, load.shape, block), asked.run_requests / run.duration_s)


def offered(workload: Workload, shares: Sequence[float], capacity_per_s: float) -> list[Workload]:
    """The workload in an open loop at each rate, the same for all ways."""
    steady = workload.steady if workload.rate_per_s is not None else None
    return [
        workload.at_rate(float(f"{share * capacity_per_s:.4g}")).model_copy(update={"steady": steady})
        for share in shares
    ]


def planned(lab: Lab, contender: Contender) -> ways.Planned:
    """A contender as a forecast takes it.

    Raises:
        ConfigError: if a chunk budget or a number of sequences makes no sense.
    """
    if isinstance(contender.way, WaySection):
        return dataclasses.replace(ways.of_way(lab, contender.way), arm=contender.arm)
    (found,) = (one for one in ways.own(lab) if one.kind == contender.kind)
    return dataclasses.replace(found, arm=contender.arm)


def reduces(lab: Lab, config: Config, bytes_per_s: float) -> AllReduces:
    """What the ranks of a sharded way send each other.

    Args:
        bytes_per_s: between the nodes of one host; between hosts [transport] link_gbit_s counts.
    """
    several = len(lab.host_names_of_nodes) > 1 and lab.transport.link_gbit_s
    rate = lab.transport.link_gbit_s * 1e9 / 8 if several and lab.transport.link_gbit_s else bytes_per_s
    return sharding.all_reduces(config, lab.model.dtype, rate, LATENCY_S)


def forecast(
    lab: Lab,
    known: Speeds,
    contenders: Sequence[Contender],
    rated: Sequence[Workload],
    rounds: int,
    slo: SloSection,
    sends: AllReduces | None,
) -> tuple[FrontierForecast, dict[tuple[str, float], tuple[Served, ...]]]:
    """What each way will make of the very arrivals of the rounds; twins and ways whose ranks send nobody
    knows what are left out.
    """
    taken = [
        planned(lab, one)
        for one in contenders
        if not one.again and (sends is not None or one.kind != way.SHARDED)
    ]
    seeds = [RATE_SEED + number for number in range(rounds)]
    served = frontier_forecast.serve(known.cluster, taken, rated, seeds, sends)
    return frontier_forecast.summed(served, rated, seeds, slo), served


@dataclasses.dataclass
class Campaign:
    """What was measured. ``rated``: runs at the offered rates; ``gated``: those of the gates' workloads.
    ``begun_ns``: when, as files have it. ``died``: what ended it before its last round.
    """

    rated: list[Run]
    gated: Comparison
    begun_ns: int
    died: Died | StartError | None = None

    def at(self, arm: str) -> list[Run]:
        """The rated runs of an arm."""
        return [run for run in self.rated if run.topology == arm]


def conduct(
    load: Load,
    contenders: Sequence[Contender],
    rated: Sequence[Workload],
    gated: Sequence[Workload],
    rounds: int,
    slo: SloSection | None,
) -> Campaign:
    """Every way in every round: first the offered rates, then the gates' workloads, in mirrored order.

    A server that dies, or does not come up, ends it; what was measured before is returned.
    """
    found = Campaign([], Comparison([], slo), time.time_ns())
    asked = [*rated, *gated]

    def seed(number: int, position: int) -> int:
        within = position - len(rated)
        return RATE_SEED + number if within < 0 else GATE_SEED + 100 * number + within

    warm = [closed(one) for one in (*rated[:1], *gated)]
    turns = in_turns(load, contenders, asked, rounds, seed, warm)

    def named(workload: Workload) -> str:
        at = f" at {workload.rate_per_s:.3g}/s" if workload in rated else ""
        return f"{workload.name}{at}"

    try:
        for run in runs(load.engine, turns, load.shape, load.store, load.show, named):
            (found.rated if run.workload in rated else found.gated.runs).append(run)
    except (Died, StartError) as died:
        found.died = found.gated.died = died
    return found


def footprints(lab: Lab, contenders: Sequence[Contender]) -> dict[str, Footprint]:
    """What each arm occupies."""
    return {one.arm: Footprint.of_way(lab, one.way) for one in contenders}

"""One run of a workload on a topology, and its proof."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun, TransferError
from disagglab.hosts import energy
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine, require_meaning
from disagglab.results.records import Run
from disagglab.serving.death import Died
from disagglab.serving.topology import Topology


def measure(
    engine: LoadEngine, topology: Topology, workload: Workload, seed: int, number: int, shape: KvShape
) -> Run:
    """One run with its proof of path. A run that breaks a rule comes back with ``invalid`` set, never
    dropped; if a server or the router has died, that is the reason.
    """
    begun = time.monotonic()
    run = _proved(engine, topology, workload, seed, number, shape)
    return dataclasses.replace(run, took_s=time.monotonic() - begun)


def _proved(
    engine: LoadEngine, topology: Topology, workload: Workload, seed: int, number: int, shape: KvShape
) -> Run:
    run: Run | None = None
    try:
        before = ledger.read(topology)
        used = _energy(topology)
        run = engine.run(topology, workload, seed, number)
        run = dataclasses.replace(run, energy_j=energy.between(used, _energy(topology)) if used else None)
        after = ledger.settle(topology, before, len(run.sent))
        run = dataclasses.replace(run, readings=(before, after))
        require_meaning(run)
        sent = run.sent
        if workload.shared_prefix_tokens:
            sent = ledger.with_shared_prefix(
                topology, before, after, sent, workload.shared_prefix_tokens, workload.most_under_way
            )
        book = ledger.prove(topology, before, after, sent, shape, topology.version)
        ledger.require_served(topology.name, book, run.e2e_s)
        return dataclasses.replace(run, ledger=book)
    except (InvalidRun, TransferError) as error:
        if run is None:
            run = Run(topology.name, workload, seed, number, "", 0.0, None, (), (), (), (), ())
        return dataclasses.replace(run, invalid=_reason(topology, error))


def _energy(topology: Topology) -> Mapping[str, float]:
    """The energy counters of the servers' GPUs, J by node."""
    return energy.of_nodes(
        (server.plan.node, server.process.host) for server in (*topology.servers, *topology.followers)
    )


def _reason(topology: Topology, error: InvalidRun | TransferError) -> str:
    """Why a run does not count: the root, where what was seen follows from a death."""
    try:
        topology.require_alive()
    except Died as died:
        return str(died)
    return str(error)

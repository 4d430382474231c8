"""The shared pair beside servers of their own: what does it cost that all topologies use the same processes?

Only with ``--dedicated``. The comparison servers carry a KV connector even when they play single or
replicated. Here the same workload runs on servers started without any connector, and the difference is
reported, not asserted: the two kinds of server cannot run in turns within one minute, so drift of the machine
is part of it.
"""

from __future__ import annotations

import statistics

import pytest

from disagglab.config.schema import Lab
from disagglab.experiments.comparison import Comparison, run_rounds
from disagglab.hosts.weights import Model
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.topology import REPLICATED, SINGLE, Deployment, running
from disagglab.stats.metric import METRICS


@pytest.mark.dedicated
def test_servers_without_a_connector(
    live: Session,
    lab: Lab,
    weights: Model,
    deployment: Deployment,
    engine: LoadEngine,
    shape: KvShape,
    store: Store,
    record: Recorder,
) -> None:
    """Single and replicated on the shared pair, then on servers without a connector: every run valid, both
    recorded.

    The shared pair is stopped in between, since two labs on the same cores would measure each other.
    """
    chat = lab.workload("chat")
    line = live.progress("dedicated servers")
    plain = Deployment(deployment.hosts, lab, weights, connector=False)
    found = {}

    def measure(servers: Deployment) -> Comparison:
        topologies = [servers.topology(name) for name in (SINGLE, REPLICATED)]
        return run_rounds(engine, topologies, [chat], live.rounds, store, shape, line.show)

    with live.uncaptured():
        found["shared pair"] = measure(deployment)
        deployment.stop()
        with running([plain], lambda _: live.progress("servers without connector")):
            found["dedicated"] = measure(plain)
    for comparison in found.values():
        assert not comparison.invalid(), comparison.invalid()[0].invalid
    for arm in (SINGLE, REPLICATED):
        for metric, of in METRICS.items():
            medians = {}
            for label, comparison in found.items():
                values = comparison.values(chat.name, arm, metric)
                if values:
                    medians[label] = statistics.median(values)
                    record.numbers(f"{metric}, chat, {label}", values, of.unit, arm=arm)
            if len(medians) == len(found):
                ratio = medians["shared pair"] / medians["dedicated"]
                record.numbers(
                    f"{metric}, chat, shared pair / dedicated", [ratio], "ratio", arm=arm, what="medians"
                )

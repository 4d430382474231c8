"""The gate itself is tested: an arm that was made slower by a known share has to be found out.

The slowed arm is single behind a proxy that stretches the time of every answer (slowproxy.py): same
server, same router, same prompts. The oracle is the factor of the proxy, which the verdict does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from disagglab.address import parted, url_of
from disagglab.agent.port import accepts
from disagglab.config.schema import Lab
from disagglab.experiments.comparison import Comparison, run_rounds
from disagglab.hosts.host import Host
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.remote import RemoteHost
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.paths import ROOT
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.topology import SINGLE, Topology
from disagglab.stats.metric import METRICS
from disagglab.stats.verdict import Verdict, judge

FACTOR = 1.2
ROUNDS = 4  # the fewest that are made; then a verdict that is still open goes on
MOST_ROUNDS = 24  # a log-ratio may then spread by 0.2 from round to round
METRIC, MARGIN = "e2e_p50", 0.05
SLOWED = "single-slowed"
WORKLOAD = "one-user"
READY_DEADLINE_S, POLL_S = 30.0, 0.05


def program_on(host: Host) -> PurePosixPath:
    """The proxy as it lies on a host: beside this file, or in the folder that provision fills."""
    here = Path(__file__).with_name("slowproxy.py")
    folder = PurePosixPath(host.folder) if isinstance(host, RemoteHost) else PurePosixPath(ROOT)
    return folder / here.relative_to(ROOT).as_posix()


@pytest.fixture
def slowed(hosts: Hosts, single: Topology, lab: Lab) -> Iterator[Topology]:
    """Single, with every answer stretched by FACTOR."""
    address = lab.controller.address
    host = hosts.controller
    port = host.reserve_port(address)
    upstream, upstream_port = parted(single.router.url)
    argv = [
        host.suite_python,
        str(program_on(host)),
        address,
        str(port),
        upstream,
        str(upstream_port),
        str(FACTOR),
    ]
    process = host.start("slowproxy", argv, {}, lab.controller.cpus, [port])
    try:
        process.await_that(
            lambda: accepts(address, port),
            READY_DEADLINE_S,
            lambda alive: AssertionError(
                f"the proxy {'does not listen' if alive else 'ended'}: {process.log.read_text()[-500:]}"
            ),
            POLL_S,
        )
        router = dataclasses.replace(single.router, name=SLOWED, url=url_of(address, port))
        yield dataclasses.replace(single, name=SLOWED, router=router)
    finally:
        process.stop()


def verdict_on(found: Comparison) -> Verdict:
    """Slowed against single, as it may be asked for after every round."""
    pairs = found.pairs(WORKLOAD, SINGLE, SLOWED, METRIC)
    return judge(pairs, METRICS[METRIC].better, MARGIN, "any time")


def test_a_slowdown_of_a_fifth_is_caught(
    live: Session,
    engine: LoadEngine,
    single: Topology,
    slowed: Topology,
    lab: Lab,
    shape: KvShape,
    store: Store,
    record: Recorder,
) -> None:
    """An arm whose answers take 1.2 times as long is called worse; the interval holds the injected factor.

    Fault injection for the instrument. How many rounds it takes is a measure of the machine's noise. A run is
    one request: with one user the median of several tells no more for its time.
    """
    if live.short:
        pytest.skip("SHORT: half a minute and more, by the noise of the machine")
    found = run_rounds(
        engine,
        [single, slowed],
        [lab.workload(WORKLOAD).of_length(1)],
        ROUNDS,
        store,
        shape,
        live.progress("slowed arm").show,
        cap=max(MOST_ROUNDS, live.max_rounds),
        open_workloads=lambda so_far: {WORKLOAD} if verdict_on(so_far).outcome == "undecided" else set(),
    )
    assert not found.invalid(), found.invalid()[0].invalid
    verdict = verdict_on(found)
    record.numbers(
        "slowed / single, end to end",
        [1 + verdict.effect],
        "ratio",
        what="geometric mean",
        note=f"{verdict.outcome} in {verdict.rounds} rounds; injected {FACTOR}; 95 % CI {1 + verdict.low:.3f}"
        f" to {1 + verdict.high:.3f}; sign-flip p {verdict.p_sign_flip:.3g}",
    )
    assert verdict.outcome == "worse", f"+{FACTOR - 1:.0%} was called {verdict.outcome}: {verdict}"
    assert verdict.low < FACTOR - 1 < verdict.high, f"injected {FACTOR}: {verdict}"

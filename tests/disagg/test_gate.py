"""The gate itself is tested: an arm that was made slower by a known share has to be found out.

The slowed arm is single behind a proxy that stretches the time of every answer (slowproxy.py): same
server, same router, same prompts. The oracle is the factor of the proxy, which the verdict does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

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
ROUNDS = 6  # planned; a verdict that is still open then goes on to --max-rounds
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
    upstream, _, upstream_port = single.router.url.removeprefix("http://").rpartition(":")
    argv = [
        host.suite_python,
        str(program_on(host)),
        address,
        str(port),
        upstream,
        upstream_port,
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
        router = dataclasses.replace(single.router, name=SLOWED, url=f"http://{address}:{port}")
        yield dataclasses.replace(single, name=SLOWED, router=router)
    finally:
        process.stop()


def verdict_on(found: Comparison) -> Verdict:
    """Slowed against single."""
    return judge(found.pairs(WORKLOAD, SINGLE, SLOWED, METRIC), METRICS[METRIC].better, MARGIN)


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

    Fault injection for the instrument. How many rounds it takes is a measure of the machine's noise.
    """
    if live.max_rounds <= ROUNDS:
        pytest.skip("NO-CAP: asked for with --max-rounds N; a noisy machine takes 10 to 40 rounds of 8 s")
    found = run_rounds(
        engine,
        [single, slowed],
        [lab.workload(WORKLOAD)],
        ROUNDS,
        store,
        shape,
        live.progress("slowed arm").show,
        cap=live.max_rounds,
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

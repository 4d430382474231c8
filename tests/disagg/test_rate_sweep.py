"""Open-loop arrivals at several rates: up to which rate does each topology keep its promises?

A closed loop waits for answers before it asks again, so it can never show overload. Here requests arrive at
times that were drawn beforehand, the same for every topology, whether or not earlier ones have been answered.
The oracle for "on time" is the trace file; for "good" the [slo] of the lab file; good requests are divided by
those *sent*, so a dropped or late one counts against the topology.
"""

from __future__ import annotations

import pytest

from disagglab.config.arrivals import arrivals
from disagglab.config.schema import Lab
from disagglab.experiments import sweep as rates
from disagglab.experiments.sweep import ATTAINMENT, Sweep, knee
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.pytest_plugin.session import Session
from disagglab.results import open_loop
from disagglab.results.metrics import figures
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.topology import REPLICATED, SINGLE, Topology

pytestmark = pytest.mark.lab_has("slo", "own_cores")

ELSEWHERE_S = 0.1  # in router and HTTP, for each request; in sweeps of the embedded lab up to 0.022 was seen
LATE_S = 0.5  # a request that left the client later than this after its time was held back


@pytest.fixture(scope="module")
def sweep(
    live: Session,
    lab: Lab,
    engine: LoadEngine,
    single: Topology,
    replicated: Topology,
    disaggregated: Topology,
    shape: KvShape,
    store: Store,
) -> Sweep:
    """Capacity first, then every rate on every arm, in mirrored order."""
    arms = (single, replicated, disaggregated)
    line = live.progress("rate sweep")
    with live.uncaptured():
        return rates.sweep(
            engine, *arms, lab.workload("rate-sweep"), shape, store, line.show, short=live.short
        )


def test_requests_are_sent_when_they_are_due(sweep: Sweep) -> None:
    """No request waits in the client for an earlier answer, not even where the servers fall behind.

    Otherwise the overload would hide in the client ("coordinated omission").
    """
    for arm, runs in sweep.runs.items():
        for rate, run in runs.items():
            due = [one.arrival_s for one in arrivals(run.workload, run.seed)]
            late = [sent - at for sent, at in zip(run.start_s, due, strict=True)]
            spread = max(late) - min(late)
            assert spread < LATE_S, f"{arm} at {rate:.2f} requests/s: sent up to {spread:.2f} s late"


def test_client_and_servers_agree_on_the_number_in_system(sweep: Sweep, record: Recorder) -> None:
    """Client and servers say the same of the mean number in system; the client's is larger by what router and
    HTTP take.

    Two accounts of one run by Little's law: sum of end-to-end times / duration. Of disaggregated serving the
    servers' is prefill's part and decode's. A client with much more in system holds requests that no server
    has seen: then the queue is in the client or in the router, and the latencies are theirs.
    """
    for arm, runs in sweep.runs.items():
        for rate, run in runs.items():
            assert run.ledger is not None
            assert run.ledger.served_s is not None
            spent = sum(run.e2e_s)
            elsewhere_s = (spent - run.ledger.served_s) / len(run.e2e_s)
            record.numbers(
                f"mean number in system at {rate:.2f} requests/s",
                [spent / run.duration_s],
                "requests",
                arm=arm,
                command=run.command,
                note=f"by the servers {run.ledger.served_s / run.duration_s:.3f}; the difference is"
                f" {elsewhere_s * 1e3:.1f} ms a request in router and HTTP",
            )
            assert 0 <= elsewhere_s < ELSEWHERE_S, (
                f"{arm} at {rate:.2f} requests/s: by the client {spent / run.duration_s:.2f} requests were in"
                f" system, by the servers {run.ledger.served_s / run.duration_s:.2f}: {elsewhere_s:.3f} s of"
                " each request passed elsewhere"
            )


def test_goodput_against_offered_rate(sweep: Sweep, lab: Lab, record: Recorder) -> None:
    """Share of good requests at each rate, the rate that each topology keeps, and where it falls behind.

    One run a point: the sweep shows where the knee lies, it does not judge small differences.
    """
    assert lab.slo is not None
    note = f"SLO: TTFT {lab.slo.ttft_s:g} s, TPOT {lab.slo.tpot_s:g} s; good / sent"
    record.numbers(
        "capacity, closed loop", [sweep.capacity], "requests/s", arm=REPLICATED, note="rates are shares of it"
    )
    attainment, ttft = {}, {}
    for arm, runs in sweep.runs.items():
        rates = sorted(runs)
        found = {rate: figures(runs[rate], lab.slo) for rate in rates}
        for rate in rates:
            run, share = runs[rate], found[rate]["slo_attainment"]
            assert share is not None
            queue = open_loop.of(run)
            assert queue is not None
            record.numbers(
                f"SLO attainment at {rate:.2f} requests/s",
                [share],
                "share of sent",
                arm=arm,
                command=run.command,
                note=queue.said,
            )
            if queue.ttft_p50_s is not None:
                record.numbers(
                    f"median TTFT behind the warm-up at {rate:.2f} requests/s",
                    [queue.ttft_p50_s],
                    "s",
                    arm=arm,
                    note=f"of all requests {found[rate]['ttft_p50']:.3g} s; {queue.said}",
                )
        attainment[arm] = (rates, [found[rate]["slo_attainment"] or 0.0 for rate in rates])
        ttft[arm] = (rates, [found[rate]["ttft_p50"] or 0.0 for rate in rates])
        best = knee(runs, lab.slo)
        if best is not None:
            record.numbers(
                f"highest of the rates with {ATTAINMENT:.0%} good that it keeps up with",
                [best],
                "requests/s",
                arm=arm,
                note=note,
            )
    record.plot(
        "Good requests against offered rate", "offered requests/s", "good / sent", attainment, caption=note
    )
    record.plot(
        "TTFT against offered rate",
        "offered requests/s",
        "median TTFT, s",
        ttft,
        caption="Open loop; one run a point; the same arrivals for every topology.",
    )
    assert all(set(runs) == set(sweep.runs[SINGLE]) for runs in sweep.runs.values()), "rates differ"
    most = max(sweep.runs[SINGLE])
    assert any(knee(runs, lab.slo) != most for runs in sweep.runs.values()), (
        f"every topology keeps {most:.2f} requests/s, {most / sweep.capacity:.0%} of what a closed loop got"
        " through: the sweep did not reach the knee; raise rate_shares in workloads/rate-sweep.toml"
    )

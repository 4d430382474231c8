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
from disagglab.results.metrics import figures, kept_rate, saturated
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.topology import REPLICATED, SINGLE, Topology

pytestmark = pytest.mark.lab_has("slo", "own_cores")

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
            kept = kept_rate(run)
            state = "too short to tell" if kept is None else "saturated" if saturated(run) else "keeps up"
            record.numbers(
                f"SLO attainment at {rate:.2f} requests/s",
                [share],
                "share of sent",
                arm=arm,
                command=run.command,
                note=f"{len(run.ttft_s)} requests; {state}"
                + (f", completions / arrivals {kept:.2f}" if kept is not None else ""),
            )
        attainment[arm] = (rates, [found[rate]["slo_attainment"] or 0.0 for rate in rates])
        ttft[arm] = (rates, [found[rate]["ttft_p50"] or 0.0 for rate in rates])
        best = knee(runs, lab.slo)
        if best is not None:
            record.numbers(
                f"highest of the rates with {ATTAINMENT:.0%} good and no growing queue",
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
    assert any(saturated(runs[most]) or knee(runs, lab.slo) != most for runs in sweep.runs.values()), (
        f"every topology keeps {most:.2f} requests/s, {most / sweep.capacity:.0%} of what a closed loop got"
        " through: the sweep did not reach the knee; raise rate_shares in workloads/rate-sweep.toml"
    )

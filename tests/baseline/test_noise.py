"""Equal runs, one after another: what differs between them is noise, and a comparison has to live with it.

One server answers the one-user workload many times, one request a run. Nothing else changes. Then the series
is cut into two arms in the ways in which a comparison could order its runs; both arms are the same, so
whatever lies between them is an error of that order. The oracle is the kernel: its account of the servers'
CPU time cannot exceed the wall time on the cores that they have.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import pytest

from disagglab.config.schema import Lab
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.measure.run import measure
from disagglab.pytest_plugin.session import Session
from disagglab.results.metrics import figures
from disagglab.results.recorder import Recorder
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.topology import Topology
from disagglab.stats.series import autocorrelation, design_errors

pytestmark = pytest.mark.lab_has("own_cores")

SEED = 24_000
RUNS = 40
PAIRS = 6  # of which a design's error is told
METRICS = ("ttft_p50", "tpot_p50", "itl_p50", "e2e_p50")
KERNEL_SLACK_S = 0.5  # CPU time is charged in ticks, and read before and after the wall time


@dataclass(frozen=True)
class Series:
    """The runs, and the CPU seconds of the server's processes in each."""

    runs: list[Run]
    cpu_s: list[float]

    def logs(self, metric: str) -> list[float]:
        """Logarithms of a figure, run by run."""
        return [math.log(figures(run)[metric] or math.nan) for run in self.runs]


@pytest.fixture(scope="module")
def series(
    live: Session, engine: LoadEngine, single: Topology, lab: Lab, shape: KvShape, store: Store
) -> Series:
    """Equal runs of one request, after two that do not count."""
    if live.short:
        pytest.skip("SHORT: 40 runs of some seconds")
    workload = lab.workload("one-user").of_length(1)
    line = live.progress("equal runs")
    runs, cpu_s = [], []
    with live.uncaptured():
        for number in range(-2, RUNS):
            line.show(f"run {max(0, number + 1)} of {RUNS}")
            before = sum(server.cpu_s() for server in single.servers)
            run = measure(engine, single, workload, SEED + number, number, shape)
            store.add_run(run)
            assert run.invalid is None, run.invalid
            if number >= 0:
                runs.append(run)
                cpu_s.append(sum(server.cpu_s() for server in single.servers) - before)
        line.done(f"{RUNS} runs")
    return Series(runs, cpu_s)


def test_the_kernel_agrees_with_the_clock(series: Series, lab: Lab, record: Recorder) -> None:
    """The server's processes used no more CPU time than its cores had in the time that a run took."""
    cores = len(lab.prefill[0].cpus)
    record.numbers("CPU time of the server", series.cpu_s, "s", note=f"{cores or 'all'} cores")
    for run, cpu_s in zip(series.runs, series.cpu_s, strict=True):
        assert run.took_s is not None
        assert cpu_s > 0
        if cores:
            assert cpu_s <= cores * run.took_s + KERNEL_SLACK_S, f"{cpu_s:.2f} s CPU in {run.took_s:.2f} s"


def test_equal_runs_differ(series: Series, record: Recorder) -> None:
    """How far, by metric; and how alike neighbours are, which is what makes few rounds of many many."""
    for metric in METRICS:
        logs = series.logs(metric)
        assert statistics.stdev(logs) > 0, f"{metric}: {RUNS} runs on a real machine are all equal"
        record.numbers(
            f"{metric} of equal runs",
            [math.exp(value) for value in logs],
            "s",
            note=f"standard deviation {100 * statistics.stdev(logs):.1f} %; neighbours correlated"
            f" {autocorrelation(logs):+.2f}",
        )
    record.plot(
        "Equal runs, one after another",
        "run",
        "s",
        {
            metric: (list(range(1, RUNS + 1)), [math.exp(value) for value in series.logs(metric)])
            for metric in ("ttft_p50", "e2e_p50")
        },
        style="points",
        caption="One server, one request a run, nothing else: what differs is noise.",
    )


def test_what_each_order_of_two_arms_would_err(series: Series, record: Recorder) -> None:
    """Two arms that are the same seem to differ by so much, by the order of their runs.

    Pairs close in time share what the machine does at that time. The longer one arm waits for the other, the
    more of the machine's weather is in their difference.
    """
    for metric in METRICS:
        errors = design_errors(series.logs(metric), PAIRS)
        assert all(0 < error < math.inf for error in errors.values())
        for design, error in errors.items():
            record.numbers(
                f"{metric}: {PAIRS} pairs of equal arms, {design}",
                [error],
                "ratio - 1",
                what="root mean square",
            )

"""What the connector did in a run is read from its counters, server by server."""

from __future__ import annotations

import dataclasses

import pytest

from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.measure import transfer_stats
from disagglab.results.records import Ledger, Reading, Run, Snapshot
from disagglab.serving.prometheus import PROCESS_START

WORKLOAD = Workload(name="w", prompt_tokens=8, output_tokens=2, requests=2, concurrency=1)
BOOK = Ledger({}, {}, {}, 4 * 2**20, 2, 0.004, 0, 0, 0, 0, 0, 0)


def reading(descriptors: float, post_s: float) -> Reading:
    """A prefill server that counts nothing, and a decode server with these counters."""

    def snapshot(name: str, share: float) -> Snapshot:
        samples: tuple[tuple[str, frozenset[tuple[str, str]], float], ...] = (
            (PROCESS_START, frozenset(), 1.0),
            (transfer_stats.DESCRIPTORS, frozenset(), share * descriptors),
            (transfer_stats.POST_TIME, frozenset(), share * post_s),
        )
        return Snapshot(name, "http://x/metrics", samples)

    return Reading({"a": snapshot("a", 0.0), "b": snapshot("b", 1.0)}, {})


RUN = Run("disaggregated", WORKLOAD, 1, 0, "", 1.0, None, (), (), (), (), (), ledger=BOOK)


def test_totals_and_what_follows_from_them() -> None:
    found = transfer_stats.of(dataclasses.replace(RUN, readings=(reading(10, 0.5), reading(74, 0.501))))
    assert (found.transfers, found.bytes, found.descriptors) == (2, 4 * 2**20, 64)
    assert found.post_s == pytest.approx(0.001)
    assert found.descriptors_per_mib == 16
    assert found.gb_per_s == pytest.approx(4 * 2**20 / 0.004 / 1e9)


def test_a_run_without_transfer_is_refused() -> None:
    with pytest.raises(InvalidRun, match="no transfer was counted"):
        transfer_stats.of(RUN)
    still = dataclasses.replace(BOOK, transfers=0)
    with pytest.raises(InvalidRun, match="no transfer was counted"):
        transfer_stats.of(dataclasses.replace(RUN, ledger=still, readings=(reading(1, 1), reading(1, 1))))


GAPS = ((0.01,) * 60,) * 2
DONE = dataclasses.replace(
    RUN,
    readings=(reading(10, 0.5), reading(74, 0.501)),
    ttft_s=(0.02, 0.03),
    e2e_s=(0.5, 0.5),
    itl_s=GAPS,
    output_tokens=(61, 61),
    duration_s=2.0,
)


def test_figures_run_by_run() -> None:
    found = transfer_stats.series([DONE, DONE])
    assert found.keys() == transfer_stats.UNITS.keys()
    assert found[transfer_stats.TIME] == pytest.approx([0.002, 0.002])
    assert found["posting"] == pytest.approx([0.0005, 0.0005])
    assert found["transfer / TTFT"] == pytest.approx([0.08, 0.08])
    assert found["TTFT p50"] == pytest.approx([0.025, 0.025])
    assert found[transfer_stats.THROUGHPUT] == [61, 61]
    assert found[transfer_stats.ITL] == pytest.approx([0.01, 0.01])


def test_a_p99_of_too_few_gaps_is_left_out() -> None:
    few = dataclasses.replace(DONE, itl_s=((0.01,) * 49,) * 2)
    assert transfer_stats.ITL not in transfer_stats.series([few, few])
    assert transfer_stats.ITL not in transfer_stats.series([DONE, few])


def test_a_missing_figure_names_topology_and_workload() -> None:
    timeless = dataclasses.replace(DONE, ledger=dataclasses.replace(BOOK, transfer_s=0.0))
    with pytest.raises(InvalidRun, match="disaggregated: a run of w has no figure 'bandwidth'"):
        transfer_stats.series([DONE, timeless])

"""What the connector did in a run is read from its counters, server by server."""

from __future__ import annotations

import dataclasses

import pytest

from disagglab import moved
from disagglab.errors import InvalidRun
from disagglab.ledger import Ledger, Reading
from disagglab.load import Run
from disagglab.metrics import PROCESS_START, Snapshot
from disagglab.workload import Workload

WORKLOAD = Workload(name="w", prompt_tokens=8, output_tokens=2, requests=2, concurrency=1)
BOOK = Ledger({}, {}, {}, 4 * 2**20, 2, 0.004, 0, 0, 0, 0, 0, 0)


def reading(descriptors: float, post_s: float) -> Reading:
    """A prefill server that counts nothing, and a decode server with these counters."""

    def snapshot(name: str, share: float) -> Snapshot:
        started = (PROCESS_START, frozenset(), 1.0)
        samples = (
            started,
            (moved.DESCRIPTORS, frozenset(), share * descriptors),
            (moved.POST_TIME, frozenset(), share * post_s),
        )
        return Snapshot(name, "http://x/metrics", samples)

    return Reading({"a": snapshot("a", 0.0), "b": snapshot("b", 1.0)}, {})


RUN = Run("disaggregated", WORKLOAD, 1, 0, "", 1.0, None, (), (), (), (), (), ledger=BOOK)


def test_totals_and_what_follows_from_them() -> None:
    found = moved.of(dataclasses.replace(RUN, readings=(reading(10, 0.5), reading(74, 0.501))))
    assert (found.transfers, found.bytes, found.descriptors) == (2, 4 * 2**20, 64)
    assert found.post_s == pytest.approx(0.001)
    assert found.descriptors_per_mib == 16
    assert found.gb_per_s == pytest.approx(4 * 2**20 / 0.004 / 1e9)


def test_a_run_without_transfer_is_refused() -> None:
    with pytest.raises(InvalidRun, match="no transfer was counted"):
        moved.of(RUN)
    still = dataclasses.replace(BOOK, transfers=0)
    with pytest.raises(InvalidRun, match="no transfer was counted"):
        moved.of(dataclasses.replace(RUN, ledger=still, readings=(reading(1, 1), reading(1, 1))))

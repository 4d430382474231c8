"""The trace of transfers: what the engine's looks allow, logged once a transfer and read back."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.errors import InvalidRun
from disagglab.serving import transfer_log
from disagglab.serving.transfer_log import Traced


def agent_class(states: list[str], times: list[float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A NIXL agent whose transfers pass through ``states``; the clock reads ``times``, one a call."""

    class Agent:
        def transfer(self, handle: object) -> str:
            return "PROC"

        def check_xfer_state(self, handle: object) -> str:
            return states.pop(0)

        def get_xfer_telemetry(self, handle: object) -> SimpleNamespace:
            return SimpleNamespace(totalBytes=4096, descCount=3)

    monkeypatch.setattr(time, "perf_counter", lambda: times.pop(0))
    transfer_log.watch(Agent)
    return Agent


def test_a_transfer_is_logged_step_by_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = [10.0, 10.002, 10.004, 10.010]  # asked for, posted, looked at, found done
    agent = agent_class(["PROC", "DONE"], times, monkeypatch)()
    handle = object()
    with caplog.at_level(logging.INFO, logger="vllm.disagglab"):
        agent.transfer(handle)
        assert [agent.check_xfer_state(handle) for _ in range(2)] == ["PROC", "DONE"]
    (one,) = transfer_log.read(caplog.messages)
    assert (one.bytes, one.descriptors, one.looks) == (4096, 3, 2)
    assert [one.posted_s, one.pending_s, one.done_s] == pytest.approx([0.002, 0.004, 0.010])
    assert one.unseen_s == pytest.approx(0.006)


def test_a_failed_transfer_is_not_logged_and_a_strange_handle_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = agent_class(["ERR", "DONE"], [1.0, 1.1, 1.2], monkeypatch)()
    handle = object()
    with caplog.at_level(logging.INFO, logger="vllm.disagglab"):
        agent.transfer(handle)
        assert agent.check_xfer_state(handle) == "ERR"
        assert agent.check_xfer_state(object()) == "DONE"
    assert transfer_log.read(caplog.messages) == []


def test_watching_twice_logs_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kind = agent_class(["DONE"], [1.0, 1.1, 1.2], monkeypatch)
    transfer_log.watch(kind)
    agent, handle = kind(), object()
    with caplog.at_level(logging.INFO, logger="vllm.disagglab"):
        agent.transfer(handle)
        agent.check_xfer_state(handle)
    assert len(transfer_log.read(caplog.messages)) == 1


def test_the_end_lies_after_the_posting_where_no_look_found_it_under_way() -> None:
    assert Traced(1, 1, posted_s=0.004, pending_s=0.0, done_s=0.005, looks=1).unseen_s == pytest.approx(0.001)


def test_a_line_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a line of a transfer"):
        transfer_log.read([transfer_log.MARK + '{"bytes": 1'])
    assert transfer_log.read(["INFO something else"]) == []


def traced(size: int) -> Traced:
    """A transfer that is told by its bytes."""
    return Traced(size, 1, posted_s=0.1, pending_s=0.0, done_s=0.2, looks=1)


def test_transfers_are_told_apart_by_the_order_of_the_runs() -> None:
    """Two servers that decode, three runs of equal requests; one run asked the first server alone."""
    logged = {"a": [], "b": [traced(1), traced(2), traced(3), traced(4)], "c": [traced(5), traced(6)]}
    counted = [{"a": 0, "b": 1, "c": 1}, {"a": 0, "b": 2, "c": 0}, {"a": 0, "b": 1, "c": 1}]
    found = transfer_log.by_run(logged, counted)
    assert [[one.bytes for one in run] for run in found] == [[1, 5], [2, 3], [4, 6]]


@pytest.mark.parametrize(("lines", "transfers"), [(1, 2), (3, 2), (0, 1), (1, 0)])
def test_a_transfer_too_many_or_too_few_is_an_error(lines: int, transfers: int) -> None:
    logged = {"b": [traced(1)] * lines}
    with pytest.raises(InvalidRun, match=f"b: {lines} transfers were logged, {transfers} were counted"):
        transfer_log.by_run(logged, [{"b": transfers}])
    if not lines:
        with pytest.raises(InvalidRun, match="b: 0 transfers were logged"):
            transfer_log.by_run({}, [{"b": transfers}])

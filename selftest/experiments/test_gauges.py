"""A worker's own gauges and counters, from scrapes that are made up: the last one stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.errors import InvalidRun
from disagglab.experiments import gauges
from disagglab.measure.ledger import FINISHED, RUNNING, WAITING
from disagglab.results.records import Snapshot


def worker(*scrapes: dict[str, float]) -> Any:
    """A worker that exposes one scrape after another; an empty one: it does not answer."""
    left = list(scrapes)

    def metrics() -> Snapshot:
        values = left.pop(0) if len(left) > 1 else left[0]
        if not values:
            raise InvalidRun("no metrics")
        return Snapshot("a", "u", tuple((name, frozenset(), value) for name, value in values.items()))

    plan, process = SimpleNamespace(process_name="dynamo-a"), SimpleNamespace(log=Path("a.log"))
    return SimpleNamespace(metrics=metrics, plan=plan, process=process, url="http://a")


def holding(running: float, waiting_: float = 0.0) -> dict[str, float]:
    return {RUNNING: running, WAITING: waiting_}


@pytest.fixture(autouse=True)
def asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait takes any time; its clock moves with each sleep."""
    now = [0.0]
    monkeypatch.setattr("disagglab.waiting.time.monotonic", lambda: now[0])
    monkeypatch.setattr("disagglab.waiting.time.sleep", lambda s: now.__setitem__(0, now[0] + s))


def test_requests_in_hand_are_those_that_run_and_those_that_wait() -> None:
    assert gauges.running(worker(holding(2, 3))) == 5


def test_what_does_not_answer_has_finished_nothing() -> None:
    assert gauges.finished(worker({FINISHED: 7})) == 7
    assert gauges.finished(worker({})) == 0


def test_idle_is_waited_for_and_a_request_of_nobody_is_an_error() -> None:
    gauges.await_idle(worker(holding(2), holding(0, 1), holding(0)))
    with pytest.raises(InvalidRun, match=r"dynamo-a runs a request of nobody; see a\.log"):
        gauges.await_idle(worker(holding(0, 1)))


def test_requests_are_waited_for_and_too_few_are_an_error() -> None:
    gauges.await_running(worker(holding(0), holding(1, 1)), 2)
    with pytest.raises(InvalidRun, match=r"dynamo-a runs 1 requests, 2 were addressed to it"):
        gauges.await_running(worker(holding(1)), 2)

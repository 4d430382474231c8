"""The one life of a service: ready or ended, with a message that says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagglab.errors import StartError
from disagglab.serving.service import Service, await_that

NotedProcess = Callable[..., Any]


class Store(Service):
    """A service that is ready when told."""

    name = "store"
    command = "store --name lab"

    process: Any

    def __init__(self, process: Any, ready: bool = False) -> None:
        self.process = process
        self.ready = ready
        self.asked = 0

    def is_ready(self) -> bool:
        self.asked += 1
        return self.ready

    def lacks(self) -> str:
        return "no key"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with one line, of the process ``store``."""
    path = tmp_path / "store.log"
    path.write_text("cannot reach etcd\n")
    return path


def test_what_is_ready_is_handed_out_and_runs_on(log: Path, noted_process: NotedProcess) -> None:
    process = noted_process(log, lives=True)
    store = Store(process, ready=True)
    assert store.brought_up(60.0) is store
    assert process.was_ended == []


def test_what_does_not_come_up_is_ended_and_the_message_says_what_lacks(
    log: Path, noted_process: NotedProcess
) -> None:
    process = noted_process(log, lives=True)
    expected = r"(?s)^store is not ready after 0.6 s; no key; command: store --name lab\n.*cannot reach etcd"
    with pytest.raises(StartError, match=expected):
        Store(process).brought_up(0.6)
    assert process.was_ended == ["stop"]


def test_nobody_waits_for_a_process_that_has_ended(log: Path, noted_process: NotedProcess) -> None:
    store = Store(noted_process(log, lives=False))
    with pytest.raises(StartError, match=r"(?s)^store ended; no key; command: store.*cannot reach etcd"):
        store.await_ready(60.0)
    assert store.asked == 1


def test_a_further_condition_is_waited_for_in_the_same_way(log: Path, noted_process: NotedProcess) -> None:
    store = Store(noted_process(log, lives=True), ready=True)
    with pytest.raises(StartError, match=r"^store is not ready after 0.3 s; command"):
        await_that(store, lambda: False, 0.3)
    assert store.asked == 0


def test_its_ends_are_those_of_its_process(log: Path, noted_process: NotedProcess) -> None:
    process = noted_process(log, lives=True)
    store = Store(process)
    store.ask_to_stop()
    store.kill()
    store.stop()
    assert process.was_ended == ["ask", "kill", "stop"]

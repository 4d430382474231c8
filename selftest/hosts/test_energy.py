"""Energy counters of GPUs: sums by node from made counters, and the reader on any machine."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import testinfra

from disagglab.config.schema import NodeSection
from disagglab.hosts import energy


def node(name: str, host: str, *gpus: int) -> NodeSection:
    return NodeSection(name=name, host=host, address="127.0.0.1", role="prefill", gpus=list(gpus))


class Told:
    """A host whose program prints this, and how often it was asked."""

    def __init__(self, text: str, rc: int = 0) -> None:
        self.asked = 0
        self._answer = SimpleNamespace(rc=rc, stdout=text)

    def run(self, *_: Any) -> Any:
        self.asked += 1
        return self._answer


def host(name: str, facts: Told) -> Any:
    return SimpleNamespace(name=name, facts=facts, suite_python="python3")


def test_the_program_answers_on_any_machine() -> None:
    """With or without a driver it prints a list; each counter is a number or None."""
    found = energy.read(testinfra.get_host("local://"), sys.executable)
    assert all(one is None or one >= 0 for one in found)
    answer = testinfra.get_host("local://").run("%s -c %s", sys.executable, energy.ENERGY_PROGRAM)
    assert answer.rc == 0, answer.stderr
    assert len(energy.parse(answer.stdout)) == len(found)


def test_a_python_that_is_not_there_reads_nothing() -> None:
    assert energy.read(testinfra.get_host("local://"), "/no/such/python") == ()


def test_nodes_are_summed_over_their_gpus() -> None:
    """Two nodes of one host, which is asked once; another host's node beside them."""
    first = Told('{"joules": [10.0, 20.5, 30.0, 40.0], "error": ""}')
    second = Told('{"joules": [7.0], "error": ""}')
    here, there = host("here", first), host("there", second)
    nodes = [(node("a", "here", 0, 1), here), (node("b", "here", 3), here), (node("c", "there", 0), there)]
    assert energy.of_nodes(nodes) == {"a": 30.5, "b": 40.0, "c": 7.0}
    assert (first.asked, second.asked) == (1, 1)


def test_a_node_that_is_not_told_in_full_is_left_out() -> None:
    """NOT_SUPPORTED on one of its GPUs, or no such GPU."""
    here = host("here", Told('{"joules": [10.0, null], "error": "GPU 1: NVML error 3"}'))
    nodes = [(node("a", "here", 0), here), (node("b", "here", 0, 1), here), (node("c", "here", 2), here)]
    assert energy.of_nodes(nodes) == {"a": 10.0}


def test_a_node_without_gpus_asks_nothing() -> None:
    facts = Told("", rc=127)
    assert energy.of_nodes([(node("a", "here"), host("here", facts))]) == {}
    assert facts.asked == 0


def test_what_was_taken_between_two_readings() -> None:
    """A counter that fell, as after a reload of the driver, and one that was not read again tell nothing."""
    before = {"a": 100.0, "b": 50.0, "c": 1.0}
    assert energy.between(before, {"a": 103.5, "b": 2.0}) == {"a": 3.5}
    assert energy.between(before, {"b": 2.0}) is None
    assert energy.between({}, {}) is None


def test_the_command_without_a_counter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says why, and ends with 1."""
    monkeypatch.setattr(energy, "WINDOW_S", 0.0)
    monkeypatch.setattr(energy, "ENERGY_PROGRAM", 'print(\'{"joules": [], "error": "no library"}\')')
    assert energy.main() == 1
    assert capsys.readouterr().out.endswith("no library\n")


def test_the_command_with_two_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A made counter of 1 J/s, beside one that is not told."""
    program = "import json, time; print(json.dumps({'joules': [time.monotonic(), None], 'error': 'some'}))"
    monkeypatch.setattr(energy, "WINDOW_S", 0.2)
    monkeypatch.setattr(energy, "ENERGY_PROGRAM", program)
    assert energy.main() == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("GPU 0: 0.")
    assert first.endswith(" W")
    assert second == "GPU 1: not said by its driver"

"""A run asks all parts of a server for their energy, and says which of them has died.

Servers, engine and counters are stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.hosts import energy
from disagglab.measure import ledger
from disagglab.measure.run import measure
from disagglab.serving.topology import Topology

WORKLOAD = Workload(name="p", prompt_tokens=8, output_tokens=2, concurrency=1, requests=1)


def part(name: str) -> Any:
    """A part of a server: a node with a host, which lives."""
    return SimpleNamespace(
        name=name,
        plan=SimpleNamespace(node=name),
        process=SimpleNamespace(host=f"host of {name}"),
        require_alive=lambda: None,
    )


def refusing(*_: Any) -> Any:
    """An engine whose every run breaks a rule."""
    raise InvalidRun("the client was late")


def test_energy_is_that_of_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of ranks on hosts that are asked nothing: without them a server over two hosts would seem to take
    half of what it does.
    """
    asked: list[tuple[str, str]] = []

    def of_nodes(nodes: Iterable[tuple[str, str]]) -> dict[str, float]:
        asked.extend(nodes)
        return {}

    monkeypatch.setattr(energy, "of_nodes", of_nodes)
    monkeypatch.setattr(ledger, "read", lambda _: None)
    monkeypatch.setattr("disagglab.serving.death.require_alive", lambda _: None)
    router: Any = SimpleNamespace(process=None)
    over = Topology("sharded", "sharded", "0.31.0", router, (part("a"),), ranks=2, followers=(part("b"),))
    engine: Any = SimpleNamespace(run=refusing)
    shape: Any = None
    run = measure(engine, over, WORKLOAD, 1, 0, shape)
    assert asked == [("a", "host of a"), ("b", "host of b")]
    assert run.invalid == "the client was late"

"""The rate sweep: which rates are offered to whom in which order, and where the knee lies.

Oracle: made-up runs that keep up, fall behind, or miss the objective, at rates that are known.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import SloSection
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import sweep
from disagglab.experiments.sweep import SEED, knee
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.topology import TOPOLOGIES

LAB = load_lab("embedded")
WORKLOAD = LAB.workload("rate-sweep")
SLO = SloSection(ttft_s=1.0, tpot_s=0.1)
ONE, OTHER, APART = (SimpleNamespace(name=name, kind=name) for name in TOPOLOGIES)
ARMS: tuple[Any, Any, Any] = (ONE, OTHER, APART)
NONE: Any = None


def run(name: str, workload: Workload, seed: int, ttft_s: float = 0.1, e2e_s: float = 0.2) -> Run:
    """Twenty requests, one a second, of two tokens each, all answered alike."""
    n = 20
    return Run(
        name, workload, seed, 0, "vllm bench serve", 40.0, None, (ttft_s,) * n, (e2e_s,) * n, ((0.1,),) * n,
        (8,) * n, (2,) * n, tuple(map(float, range(n))), ("main",) * n,
    )  # fmt: skip


def opened(**times: float) -> Run:
    return run("single", WORKLOAD.at_rate(1.0), 1, **times)


def late() -> Run:
    """Every answer is later than the one before by more than its place: the queue grows."""
    slow = opened()
    return replace(slow, e2e_s=tuple(0.2 + number / 5 for number in range(20)))


def test_the_knee_is_the_last_rate_that_was_kept() -> None:
    assert knee({1.0: opened(), 2.0: opened(), 3.0: opened(ttft_s=1.5, e2e_s=1.6)}, SLO) == 2.0
    assert knee({1.0: opened(), 3.0: opened(), 2.0: opened(ttft_s=1.5, e2e_s=1.6)}, SLO) == 1.0, (
        "a rate above one that was not kept does not count"
    )
    assert knee({1.0: opened(ttft_s=1.5, e2e_s=1.6)}, SLO) is None


def test_a_growing_queue_is_beyond_the_knee() -> None:
    """Even where every request is still good; and a run that is too short to tell is not kept."""
    patient = SloSection(ttft_s=10.0, tpot_s=10.0)
    assert knee({1.0: opened(), 2.0: late()}, patient) == 1.0
    assert knee({1.0: opened(), 2.0: opened(e2e_s=9.0)}, patient) == 1.0


@pytest.mark.parametrize("short", [False, True])
def test_every_rate_is_offered_to_every_arm(
    short: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shares of the capacity that replicated serving showed; mirrored; one seed a rate; all runs stored."""
    seen: list[tuple[str, float | None, int]] = []

    def measure(engine: Any, topology: Any, workload: Workload, seed: int, *rest: Any) -> Run:
        seen.append((topology.name, workload.rate_per_s, seed))
        return run(topology.name, workload, seed)

    monkeypatch.setattr(sweep, "measure", measure)
    store = Store.create(tmp_path, "run")
    found = sweep.sweep(NONE, *ARMS, WORKLOAD, NONE, store, lambda _: None, short)
    shares = WORKLOAD.rate_shares[::2] if short else WORKLOAD.rate_shares
    rates = [share * WORKLOAD.requests / 40.0 for share in shares]
    assert found.capacity == WORKLOAD.requests / 40.0
    assert seen[:4] == [*((name, None, SEED) for name in TOPOLOGIES), ("replicated", None, SEED + 1)]
    assert seen[4:7] == [(name, rates[0], SEED + 2) for name in TOPOLOGIES]
    assert seen[7:10] == [(name, rates[1], SEED + 3) for name in reversed(TOPOLOGIES)]
    assert {arm: list(runs) for arm, runs in found.runs.items()} == dict.fromkeys(TOPOLOGIES, rates)
    assert len(list((store.folder / "runs").glob("*.json"))) == len(seen)


def test_a_run_that_breaks_a_rule_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = replace(run("single", WORKLOAD, SEED), invalid="no proof")
    monkeypatch.setattr(sweep, "measure", lambda *_: broken)
    store = Store.create(tmp_path, "run")
    with pytest.raises(InvalidRun, match="no proof"):
        sweep.sweep(NONE, *ARMS, WORKLOAD, NONE, store, lambda _: None)
    assert len(list((store.folder / "runs").glob("*.json"))) == 1, "it is kept"

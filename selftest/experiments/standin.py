"""Servers of ways that are not there: what starts, ends and is measured is noted, and runs are made up."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.errors import StartError
from disagglab.experiments import campaign, rounds, searching
from disagglab.experiments.dry_run import model_of
from disagglab.experiments.rounds import WARM_UP_ROUND
from disagglab.experiments.turns import Load
from disagglab.kv.shape import KvShape, Layer
from disagglab.progress import ProgressLine
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving import fleet
from disagglab.serving.death import Death, Died
from disagglab.serving.fleet import Fleet
from disagglab.serving.topology import Topology
from selftest.experiments.made import made_run

LAB = load_lab("embedded-ways")
WAYS = {one.arm: one for one in LAB.ways}


class Standin:
    """A deployment that is not there: servers ``a`` and ``b``; of a sharded way ``a`` alone."""

    def __init__(self, scene: Scene, number: int, model: Any, connector: bool, tag: str) -> None:
        self.scene, self.tag, self.alive = scene, tag, False
        self.served_name = f"{model.name}-{number}"
        self.servers = tuple(map(self._server, "ab" if connector else "a"))
        self._made: dict[str, Topology] = {}

    def _server(self, name: str) -> Any:
        plan = SimpleNamespace(
            process_name=f"vllm-{name}{self.tag}",
            command=f"serve {name}{self.tag}",
            served_name=self.served_name,
        )
        return SimpleNamespace(name=name, plan=plan, require_alive=self._require_alive, metrics=lambda: None)

    def _require_alive(self) -> None:
        if not self.alive:
            died = Death(self.tag, f"vllm-a{self.tag} died", "", "memory", "less of it", Path("log"))
            raise Died(died)

    def start(self, _: ProgressLine) -> None:
        self.scene.log.append(f"start {self.tag}")
        if any(part in self.tag for part in self.scene.fails):
            raise StartError(f"{self.tag} does not come up\nlikely cause: memory\nlast lines of its log")
        self.alive = True

    def stop(self) -> None:
        self.scene.log.append(f"stop {self.tag}")
        self.alive = False

    def give_back_ports(self) -> None:
        """It has none."""

    def topology(self, kind: str) -> Topology:
        if kind not in self._made:
            router: Any = SimpleNamespace(
                url=f"http://{kind}{self.tag}", command=f"route {kind}{self.tag}", process=self
            )
            servers: Any = self.servers[:1] if kind == "single" else self.servers
            roles = (servers[:1], servers[1:]) if kind == "disaggregated" else ((), ())
            self._made[kind] = Topology(kind + self.tag, kind, "0.31.0", router, servers, *roles)
        return self._made[kind]


class Scene:
    """A fleet of stand-ins, and made runs. ``log``: what was done in order, as ``start TAG``, ``stop TAG``,
    ``warm ARM REQUESTS`` and ``run ARM WORKLOAD ROUND SEED``.

    ``fails``: parts of tags of deployments that do not come up; ``kills``: beginnings of entries of runs of
    which the servers die; ``wrong``: of those that are invalid while servers live.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, resident: int, lab: Lab = LAB) -> None:
        self.log: list[str] = []
        self.shown: list[str] = []
        self.fails: set[str] = set()
        self.kills: set[str] = set()
        self.wrong: set[str] = set()
        self._deployments: list[Standin] = []
        none: Any = None
        monkeypatch.setattr(fleet, "Deployment", self._deployment)
        monkeypatch.setattr("disagglab.serving.death.require_alive", lambda process: process._require_alive())
        for module in (rounds, searching, campaign):
            monkeypatch.setattr(module, "measure", self._measure)
        self.fleet = Fleet(
            none, lab, model_of(lab), resident, lambda what: ProgressLine(what, stream=io.StringIO())
        )
        self.store = Store.create(folder, f"run-{len(list(folder.iterdir()))}")
        shape = KvShape((Layer(4, 64, 64),), "bfloat16")
        self.load = Load(self.fleet, none, shape, self.store, self.shown.append)

    def _deployment(self, _hosts: Any, _lab: Lab, model: Any, connector: bool = True, tag: str = "") -> Any:
        self._deployments.append(Standin(self, len(self._deployments), model, connector, tag))
        return self._deployments[-1]

    def _measure(
        self, _engine: Any, topology: Topology, workload: Workload, seed: int, number: int, _shape: Any
    ) -> Run:
        topology.require_alive()
        warms = number == WARM_UP_ROUND
        entry = f"warm {topology.name} {workload.requests}"
        if not warms:
            entry = f"run {topology.name} {workload.name} {number} {seed}"
        self.log.append(entry)
        invalid = "the client was late" if any(map(entry.startswith, self.wrong)) else None
        if any(map(entry.startswith, self.kills)):
            (owner,) = (one for one in self._deployments if one.servers[0] is topology.servers[0])
            owner.alive, invalid = False, "a server died"
        return made_run(topology.name, workload, number, seed=seed, invalid=invalid)

    def entries(self, *words: str) -> list[str]:
        """What of the log begins with one of these words."""
        return [entry for entry in self.log if entry.split()[0] in words]

    @property
    def tags(self) -> list[str]:
        """Of the deployments that run now."""
        return [one.tag for one in self.fleet]

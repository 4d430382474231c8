"""What one pytest session on a lab holds: the lab, the run's folder, the claims made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import pytest

from disagglab.config.arms import Arms
from disagglab.config.schema import GateSection, Lab
from disagglab.config.way_section import WaySection
from disagglab.experiments.comparison import Comparison
from disagglab.hosts.hosts import Hosts
from disagglab.measure.bench import LOAD
from disagglab.progress import ProgressLine
from disagglab.pytest_plugin.causes import Causes
from disagglab.results.report import Claim, Module, lesson_html
from disagglab.results.resume import Earlier
from disagglab.results.run_folder import Store
from disagglab.serving import death
from disagglab.serving.death import Death
from disagglab.serving.topology import Deployment
from disagglab.stats.rule import ANY_TIME, FIXED, ORDER_DRAWN, Rule


@dataclass
class Session:
    """The live part of a pytest session. ``terminal``: the real standard error, whatever pytest captures.

    ``budget_s``: of the comparison, s; None where ``rounds`` (and ``max_rounds``) were given in its place.
    """

    lab: Lab
    store: Store
    run_id: str
    short: bool
    rounds: int
    budget_s: float | None
    max_rounds: int
    dedicated: bool
    against: str
    endings: int
    ways: tuple[WaySection, ...]
    arms: Arms
    terminal: TextIO
    uncaptured: Callable[[], contextlib.AbstractContextManager[None]]
    modules: dict[str, Module] = field(default_factory=dict)
    comparison: Comparison | None = None
    earlier: Earlier = field(default_factory=Earlier)
    unfit: str = ""  # why the run's folder must not be kept as it is
    hosts: Hosts | None = None
    deployments: list[Deployment] = field(default_factory=list)
    routed: tuple[str, ...] = ()  # kinds of topologies that the selected tests ask for

    def __post_init__(self) -> None:
        self.causes = Causes(self._deaths)

    def _deaths(self) -> list[Death]:
        roles = {f"vllm-{node.name}": node.role for node in self.lab.nodes}
        died = self.hosts.died() if self.hosts else []
        found = (death.of(process, roles.get(process.name.partition("@")[0], "")) for process in died)
        return [one for one in found if one is not None]

    @property
    def rule(self) -> Rule:
        """What the verdicts of the comparison hold for: a number of rounds that was fixed before any of them
        was seen, or else every look.
        """
        if self.budget_s is not None:
            return ORDER_DRAWN if self.earlier.order_drawn else ANY_TIME
        return ANY_TIME if self.max_rounds or self.earlier.sessions else FIXED

    def is_shared(self, process: str) -> bool:
        """Whether all tests of servers share this process: the lab's servers, routers, load engine."""
        return process == LOAD or any(process in one.process_names for one in self.deployments)

    def require_arms(self, *wanted: str) -> None:
        """Skip the test that asks where one of these arms is left out of the comparison."""
        reason = self.arms.skip_reason(*wanted)
        if reason:
            pytest.skip(reason)

    def require_gate(self, gate: GateSection) -> None:
        """Skip the test that asks where an arm that a gate needs is not in the comparison."""
        self.require_arms(*self.arms.lacking(gate))

    def progress(self, what: str, usual_s: float | None = None) -> ProgressLine:
        """A progress line on the terminal; ``usual_s``: how long that takes mostly, shown beside the time."""
        return ProgressLine(what, usual_s, self.terminal)

    def add_claim(self, module: str, readme: Path, claim: Claim) -> None:
        """Note how a test ended, under its learning module."""
        if module not in self.modules:
            self.modules[module] = Module(module, lesson_html(readme) if readme.is_file() else "")
        self.modules[module].tests.append(claim)

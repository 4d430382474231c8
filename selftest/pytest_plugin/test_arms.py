"""Which routers a session's comparison starts, and how its tests are skipped for lack of an arm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.arms import OWN, Arms
from disagglab.pytest_plugin.fixtures import kept_arms
from disagglab.pytest_plugin.session import Session
from disagglab.serving.router import Router
from disagglab.serving.topology import Topology


class Servers:
    """A deployment whose routers are noted when they are started."""

    def __init__(self) -> None:
        self.routers: list[str] = []

    def topology(self, name: str) -> Topology:
        if name not in self.routers:
            self.routers.append(name)
        process: Any = None
        return Topology(name, name, "0.31.0", Router(name, "http://r", ("router",), process), ())


def measured(arms: Arms) -> tuple[list[str], list[str]]:
    """The arms of a comparison, and the routers that were started for it."""
    servers: Any = Servers()
    live: Any = SimpleNamespace(arms=arms, store=SimpleNamespace(commands={}))
    return [one.name for one in kept_arms(live, servers)], servers.routers


def test_all_arms_and_three_routers_by_default() -> None:
    """The twin of single shares its router."""
    assert measured(Arms()) == (list(OWN), ["single", "replicated", "disaggregated"])


def test_no_router_is_started_for_an_arm_that_is_left_out() -> None:
    """Neither it nor its twin takes a turn."""
    kept = ("replicated", "disaggregated")
    assert measured(Arms(kept, ("single", "single-again"))) == (list(kept), list(kept))


def test_a_test_that_wants_an_arm_that_is_left_out_is_skipped() -> None:
    """By code; others go on."""
    live: Any = SimpleNamespace(arms=Arms(("replicated", "disaggregated"), ("single", "single-again")))
    Session.require_arms(live, "replicated", "disaggregated")
    with pytest.raises(pytest.skip.Exception, match=r"^ARM-LEFT-OUT: single by --arm or --without$"):
        Session.require_arms(live, "single")

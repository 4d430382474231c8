"""Which routers a session's comparison starts, and how its tests are skipped for lack of an arm."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.arms import OWN, Arms
from disagglab.pytest_plugin.fixtures import kept_arms
from disagglab.pytest_plugin.plugin import routed
from disagglab.pytest_plugin.session import Session
from disagglab.serving.router import Router
from disagglab.serving.topology import TOPOLOGIES, Topology

ASKED = ("single", "disaggregated")  # what the session's tests ask for


class Servers:
    """A deployment whose routers are noted when they are started."""

    def __init__(self) -> None:
        self.routers: list[str] = []

    def topology(self, name: str, along: Sequence[str]) -> Topology:
        assert along == ASKED
        if name not in self.routers:
            self.routers.append(name)
        process: Any = None
        return Topology(name, name, "0.31.0", Router(name, "http://r", ("router",), process), ())


def measured(arms: Arms) -> tuple[list[str], list[str]]:
    """The arms of a comparison, and the routers that were started for it."""
    servers: Any = Servers()
    live: Any = SimpleNamespace(arms=arms, store=SimpleNamespace(commands={}), routed=ASKED)
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


def item(*fixtures: str, skipped: bool = False) -> Any:
    """As much of a test as tells which routers it needs."""
    return SimpleNamespace(
        fixturenames=fixtures, get_closest_marker=lambda name: name if skipped and name == "skip" else None
    )


@pytest.mark.parametrize(
    ("items", "arms", "expected"),
    [
        ([], OWN, ()),
        ([item("lab", "shape")], OWN, ()),
        ([item("deployment", "disaggregated"), item("single")], OWN, ("single", "disaggregated")),
        ([item("single"), item("replicated", skipped=True)], OWN, ("single",)),
        ([item("comparison")], OWN, ("single", "replicated", "disaggregated")),
        ([item("comparison")], ("replicated", "disaggregated"), ("replicated", "disaggregated")),
        ([item("comparison"), item("single")], ("replicated", "disaggregated"), TOPOLOGIES),
        ([item("comparison", skipped=True)], OWN, ()),
    ],
)
def test_routers_are_started_for_what_the_selected_tests_ask_for(
    items: list[Any], arms: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    """By fixtures, and by the arms of a comparison among them; a test that is skipped asks for none."""
    assert routed(items, arms) == expected

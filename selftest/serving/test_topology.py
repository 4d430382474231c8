"""Servers that were started are ended: after the block, and where one of them does not come up.

Hosts are those that take notes (hosts/recording.py); servers are stand-ins that note their own end.
"""

from __future__ import annotations

from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.errors import StartError
from disagglab.experiments.dry_run import model_of
from disagglab.hosts.recording import RecordingHosts
from disagglab.serving import boot
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, TOPOLOGIES, Deployment, running


class Standin:
    """A server or router that was started. ``fails``: names of those whose end fails."""

    def __init__(self, name: str, ended: list[str], fails: frozenset[str] = frozenset()) -> None:
        self.name, self._ended, self._fails = name, ended, fails
        self.process = self
        self.looked_at = self.is_router = False
        self.asked = -1  # how many had ended when it was asked to end

    def has_died(self) -> bool:
        """Nobody could tell a death from an end afterwards, so it is asked before."""
        self.looked_at = True
        return False

    def require_release(self, _: str) -> None:
        """It is of the release that is asked for."""

    def ask_to_stop(self) -> None:
        assert self.looked_at
        self.asked = len(self._ended)

    def stop(self) -> None:
        assert self.looked_at or self.is_router
        self._ended.append(self.name)
        if self.name in self._fails:
            raise StartError(f"{self.name} still lives")


class Stage:
    """Two deployments of the embedded lab: its own, and one beside it. What is ended is noted in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[str] = []
        self.routers: list[str] = []
        self.servers: list[Any] = []
        self.cannot_start, self.never_ready = "", ""
        self.ends_badly: frozenset[str] = frozenset()
        self.waited = 0
        lab = load_lab("embedded")
        hosts = RecordingHosts(lab)
        hosts.open()
        self.own = Deployment(hosts, lab, model_of(lab))
        self.beside = Deployment(hosts, lab, model_of(lab), tag="@push")
        monkeypatch.setattr("disagglab.serving.topology.VllmServer.start", self._start)
        monkeypatch.setattr("disagglab.serving.topology.launch_router", self._route)
        monkeypatch.setattr(boot, "wait_ready", self._wait)

    def _start(self, _host: Any, _lab: Any, plan: Any, _ports: Any) -> Any:
        name = f"{plan.node.name}{plan.tag}"
        if name == self.cannot_start:
            raise StartError(f"{name} cannot be executed")
        server: Any = Standin(name, self.ended, self.ends_badly)
        server.plan = plan
        self.servers.append(server)
        return server

    def _route(self, _host: Any, _lab: Any, label: str, **_: Any) -> Any:
        self.routers.append(f"launched {label}")
        router = Standin(f"router {label}", self.ended, self.ends_badly)
        router.is_router = True
        router.await_ready = lambda _: self._await(label)  # type: ignore[attr-defined]
        return router

    def _await(self, label: str) -> None:
        if label == self.never_ready:
            raise StartError(f"router-{label} is not ready")
        self.routers.append(f"ready {label}")

    def _wait(self, servers: Any, *_: Any) -> None:
        self.waited += 1
        if self.never_ready in [server.name for server in servers]:
            raise StartError(f"{self.never_ready} is not ready")

    def run(self) -> Any:
        """Both, as the session's fixture has them."""
        nobody: Any = None
        return running([self.own, self.beside], lambda _: nobody)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """No server is started."""
    return Stage(monkeypatch)


def test_all_are_ended_after_the_block_the_last_deployment_first(stage: Stage) -> None:
    with stage.run():
        stage.own.topology(SINGLE)
        stage.own.topology(DISAGGREGATED)
        assert stage.ended == []
    assert stage.ended == ["a@push", "b@push", "router single", "router disaggregated", "a", "b"]
    assert stage.own.servers == stage.beside.servers == ()


def test_all_of_a_deployment_are_asked_to_end_before_one_is_waited_for(stage: Stage) -> None:
    with stage.run():
        single: Any = stage.own.topology(SINGLE).router
    assert {server.name: server.asked for server in stage.servers} == {
        "a@push": 0,
        "b@push": 0,
        "a": 2,
        "b": 2,
    }
    assert single.asked == 2


def test_a_second_server_that_cannot_start_leaves_none_of_the_first(stage: Stage) -> None:
    stage.cannot_start = "b"
    with pytest.raises(StartError, match="b cannot be executed"), stage.run():
        pytest.fail("the block was entered")
    assert stage.ended == ["a"]
    assert stage.waited == 0


def test_a_ways_server_that_cannot_start_leaves_none_of_the_labs_own(stage: Stage) -> None:
    stage.cannot_start = "b@push"
    with pytest.raises(StartError, match="b@push cannot be executed"), stage.run():
        pytest.fail("the block was entered")
    assert stage.ended == ["a@push", "a", "b"]


def test_servers_that_are_not_ready_are_ended_with_all_others(stage: Stage) -> None:
    stage.never_ready = "a@push"
    with pytest.raises(StartError, match="a@push is not ready"), stage.run():
        pytest.fail("the block was entered")
    assert stage.ended == ["a@push", "b@push", "a", "b"]


def test_one_that_does_not_end_keeps_no_other_from_its_end(stage: Stage) -> None:
    stage.ends_badly = frozenset({"router single", "a"})
    with pytest.raises(StartError, match="still lives"), stage.run():
        stage.own.topology(SINGLE)
    assert stage.ended == ["a@push", "b@push", "router single", "a", "b"]


def test_routers_that_a_session_needs_are_started_together(stage: Stage) -> None:
    """All are launched before the first is waited for; asked for again, none is started."""
    with stage.run():
        asked = stage.own.topology(REPLICATED, TOPOLOGIES)
        assert stage.routers == [
            *(f"launched {name}" for name in (REPLICATED, SINGLE, DISAGGREGATED)),
            *(f"ready {name}" for name in (REPLICATED, SINGLE, DISAGGREGATED)),
        ]
        assert asked.kind == REPLICATED
        for name in TOPOLOGIES:
            assert stage.own.topology(name, TOPOLOGIES).kind == name
        assert len(stage.routers) == 6
    assert sorted(stage.ended[2:5]) == [f"router {name}" for name in sorted(TOPOLOGIES)]


def test_who_needs_one_router_starts_one(stage: Stage) -> None:
    with stage.run():
        stage.own.topology(SINGLE)
        stage.own.topology(SINGLE, [SINGLE])
        assert stage.routers == ["launched single", "ready single"]


def test_a_router_that_does_not_come_up_is_an_error_of_those_who_ask_for_it(stage: Stage) -> None:
    """It is ended; the one that was asked for is handed out. Asked for, it is started again."""
    stage.never_ready = REPLICATED
    with stage.run():
        assert stage.own.topology(SINGLE, TOPOLOGIES).kind == SINGLE
        assert stage.ended == ["router replicated"]
        with pytest.raises(StartError, match="router-replicated is not ready"):
            stage.own.topology(REPLICATED, TOPOLOGIES)
        assert stage.ended == ["router replicated"] * 2
        assert stage.own.topology(DISAGGREGATED, TOPOLOGIES).kind == DISAGGREGATED
        assert [one for one in stage.routers if "ready" in one] == ["ready single", "ready disaggregated"]


def test_where_the_router_that_is_asked_for_fails_none_is_left(stage: Stage) -> None:
    stage.never_ready = SINGLE
    with stage.run():
        with pytest.raises(StartError, match="router-single is not ready"):
            stage.own.topology(SINGLE, TOPOLOGIES)
        assert sorted(stage.ended) == [f"router {name}" for name in sorted(TOPOLOGIES)]
        stage.ended.clear()
    assert stage.ended == ["a@push", "b@push", "a", "b"]

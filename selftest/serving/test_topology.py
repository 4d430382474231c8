"""Servers that were started are ended: after the block, and where one of them does not come up.

Hosts are those that take notes (hosts/recording.py); servers are stand-ins that note their own end.
"""

from __future__ import annotations

from typing import Any

import pytest

from disagglab.config import way
from disagglab.config.labs import load_lab
from disagglab.errors import StartError
from disagglab.experiments.dry_run import model_of
from disagglab.hosts.recording import NoteTaker, RecordingHosts
from disagglab.serving import boot
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, TOPOLOGIES, Deployment, running


class Standin:
    """A server or router that was started. ``fails``: names of those whose end fails."""

    def __init__(self, name: str, ended: list[str], fails: frozenset[str] = frozenset()) -> None:
        self.name, self._ended, self._fails = name, ended, fails
        self.process = self
        self.looked_at = self.is_router = False
        self.alive = True
        self.asked = -1  # how many had ended when it was asked to end

    def require_alive(self) -> None:
        """As a server's own does, without a supervisor to ask."""
        if not self.alive:
            raise StartError(f"{self.name} has died")

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
        self.alive = False
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
        self.awaited: list[str] = []
        self.watched: list[str] = []
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

    def _wait(self, servers: Any, _lab: Any, _line: Any, followers: Any = ()) -> None:
        self.waited += 1
        self.awaited = [server.name for server in servers]
        self.watched = [server.name for server in followers]
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


class Across(Stage):
    """One server over two hosts, ``a`` on alpha with HTTP, ``b`` on beta without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        lab = load_lab("two-hosts")
        self.hosts = RecordingHosts(lab)
        self.hosts.open()
        self.over = Deployment(self.hosts, way.sharded(lab), model_of(lab), connector=False, tag="@sharded")

    def start(self) -> Deployment:
        """It, started."""
        nobody: Any = None
        return self.over.start(nobody)


@pytest.fixture
def across(monkeypatch: pytest.MonkeyPatch) -> Across:
    """No server is started."""
    return Across(monkeypatch)


def names(servers: Any) -> list[str]:
    """Of servers, in their order."""
    return [server.name for server in servers]


def test_parts_on_other_hosts_start_first(across: Across) -> None:
    """The leader waits for them; it alone is a server that is asked, and its readiness is waited for."""
    over = across.start()
    assert names(across.servers) == ["b@sharded", "a@sharded"]
    assert (names(over.servers), names(over.followers)) == (["a@sharded"], ["b@sharded"])
    assert across.awaited == ["a@sharded"]
    assert across.watched == ["b@sharded"]


def test_parts_of_a_server_meet_at_one_port(across: Across) -> None:
    """Each has it on its command line; it is no port that either listens on for HTTP on the leader's host."""
    across.start()
    found = {}
    for server in across.servers:
        argv = list(server.plan.argv)
        found[server.plan.node.name] = {
            key: argv[argv.index(f"--{key}") + 1]
            for key in ("master-addr", "master-port", "node-rank", "port")
        }
        assert ("--headless" in argv) is (server.plan.node.name == "b")
    assert {key: (found["a"][key], found["b"][key]) for key in ("node-rank", "master-addr")} == {
        "node-rank": ("0", "1"),
        "master-addr": ("198.18.9.1", "198.18.9.1"),
    }
    assert found["a"]["master-port"] == found["b"]["master-port"] != found["a"]["port"]


def test_the_meeting_port_is_free_on_both_addresses_of_the_leader(
    across: Across, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have 21100 to 21102 of the control address, and 21103 and 21104 of the data address: the lowest
    that both have free is 21105. All that was looked at is given back with the rest.
    """
    taken = {"198.18.1.2": {21100, 21101, 21102}, "198.18.9.1": {21104, 21103}, "198.18.2.2": set()}
    taken["198.18.9.2"] = set()
    given_back: list[tuple[str, int]] = []

    def reserve(_host: Any, address: str) -> int:
        port = next(n for n in range(21100, 21200) if n not in taken[address])
        taken[address].add(port)
        return port

    before = {address: set(ports) for address, ports in taken.items()}
    monkeypatch.setattr(NoteTaker, "reserve_port", reserve)
    monkeypatch.setattr(NoteTaker, "give_back_port", lambda _host, *one: given_back.append(one))
    over = across.start()
    (leader,) = over.servers
    argv = list(leader.plan.argv)
    assert argv[argv.index("--master-port") + 1] == "21105"
    over.stop()
    over.give_back_ports()
    assert sorted(given_back) == sorted(
        (address, port) for address, ports in taken.items() for port in ports - before[address]
    )


def test_a_part_without_http_is_ended_as_well(across: Across) -> None:
    """Leader, follower and router; nothing is left to be ended a second time."""
    over = across.start()
    over.topology("sharded")
    over.stop()
    assert sorted(across.ended) == ["a@sharded", "b@sharded", "router sharded-dedicated@sharded"]
    assert over.servers == over.followers == ()
    over.stop()
    assert len(across.ended) == 3


def test_a_leader_that_cannot_start_leaves_no_follower(across: Across) -> None:
    across.cannot_start = "a@sharded"
    with pytest.raises(StartError, match="a@sharded cannot be executed"):
        across.start()
    across.over.stop()
    assert across.ended == ["b@sharded"]


def test_a_deployment_lives_while_all_of_it_does(across: Across) -> None:
    """Before its start it does not; a dead leader, follower or router is enough to end that."""
    over = across.over
    assert not over.alive
    across.start()
    router: Any = over.topology("sharded").router
    assert over.alive
    for part in (*across.servers, router):
        part.alive = False
        assert not over.alive
        part.alive = True
    assert over.alive
    over.stop()
    assert not over.alive


def test_a_topology_has_all_parts_and_asks_the_leader(across: Across) -> None:
    """Two ranks, one server; its commands are those of both parts and the router."""
    over = across.start()
    topology = over.topology("sharded")
    assert (topology.kind, topology.ranks, topology.cycle) == ("sharded", 2, 1)
    assert (names(topology.servers), names(topology.followers)) == (["a@sharded"], ["b@sharded"])
    topology.router.command = "router"  # type: ignore[misc]
    assert [("--headless" in command) for command in topology.commands] == [False, True, False]


def test_a_dead_follower_is_no_living_topology(across: Across, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the rest of a server does not count, and the reason is the part that died."""
    monkeypatch.setattr("disagglab.serving.death.require_alive", lambda process: process.require_alive())
    topology = across.start().topology("sharded")
    topology.require_alive()
    across.servers[0].alive = False
    with pytest.raises(StartError, match="b@sharded has died"):
        topology.require_alive()


def test_the_same_lab_on_one_host_has_no_followers(stage: Stage) -> None:
    """Negative control: one server over two cores is started as any other."""
    lab = way.sharded(stage.own.lab)
    nobody: Any = None
    over = Deployment(stage.own.hosts, lab, model_of(lab), connector=False, tag="@sharded").start(nobody)
    assert (names(over.servers), over.followers) == (["a-b@sharded"], ())
    assert "--master-port" not in stage.servers[-1].plan.argv

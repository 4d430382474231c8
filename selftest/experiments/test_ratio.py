"""Labs with any number of prefill and decode nodes: files, ports, routes, ledgers, predictions.

Oracles: counters that two prefill and three decode servers leave when a router deals six requests in turn,
with one number changed at a time; and capacities worked out by hand from round speeds.
"""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.agent.supervisor import Process
from disagglab.config import inherit
from disagglab.config.checks import ports_needed
from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import ConfigError, InvalidRun, TransferError
from disagglab.experiments import dry_run
from disagglab.hosts import facts, link_counters
from disagglab.hosts.recording import RecordingHosts
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, Layer
from disagglab.measure import ledger, transfer
from disagglab.paths import LABS
from disagglab.predict import breakeven, simulation
from disagglab.predict.breakeven import Cluster, Point, Prefill, Speeds, Step
from disagglab.results.records import Ledger, Reading, Sent, Snapshot
from disagglab.serving import openai, prometheus, topology
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, Deployment, Topology

SHARED = inherit.read(LABS / "one-to-two.toml").table
GATED = tomllib.loads((LABS / "embedded.toml").read_text())
VERSION = "0.31.0"


def ratio_lab(prefill: int, decode: int, **changes: Any) -> dict[str, Any]:
    """A lab file of so many GPU nodes."""
    raw: dict[str, Any] = copy.deepcopy(GATED)
    roles = ["prefill"] * prefill + ["decode"] * decode
    raw["node"] = [
        {"name": f"n{number}", "address": "127.0.0.1", "role": role, "gpus": [number]}
        for number, role in enumerate(roles)
    ]
    return {**raw, **changes}


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("one-to-two", "1P2D"),
        ("two-to-one", "2P1D"),
        ("four-h200-1p2d", "1P2D"),
        ("four-h200-2p1d", "2P1D"),
        ("four-h200-2p2d", "2P2D"),
    ],
)
def test_shipped_ratios(name: str, ratio: str) -> None:
    """The labs have the ratio that their names say."""
    assert load_lab(name).ratio == ratio


def test_labs_of_one_host_differ_in_their_nodes_alone() -> None:
    """What is compared between ratios is the ratio: all other settings, gates included, are equal. Only four
    GPUs are ranks that 32 heads can be divided among.
    """
    labs = [load_lab(f"four-h200-{ratio}") for ratio in ("1p2d", "2p1d", "2p2d")]
    own = {"name", "label", "file", "nodes", "ways"}
    beside: dict[str, Any] = {"memory": {"kv_beside_gib"}}  # of a way's servers beside the lab's own
    first, *others = (lab.model_dump(exclude=dict.fromkeys(own, True) | beside) for lab in labs)
    assert others == [first, first]


def test_cores_are_shared_where_both_nodes_say_so() -> None:
    """The lab with shared cores is accepted, and knows that its figures mean nothing."""
    lab = parse_lab(SHARED, "my.toml")
    assert lab.shared == "cores"
    assert [node.cpus for node in lab.decode] == [[1], [1]]
    assert not load_lab("embedded").shared


@pytest.mark.parametrize("silent", [1, 2])
def test_a_core_is_not_shared_with_a_node_that_did_not_ask(silent: int) -> None:
    """One node's word is not enough: the other may be one whose figures count."""
    raw = copy.deepcopy(SHARED)
    del raw["node"][silent]["share_cpus"]
    with pytest.raises(ConfigError, match="share_cpus = true on both") as caught:
        parse_lab(raw, "my.toml")
    assert [problem.key for problem in caught.value.problems] == ["node[2].cpus"]


def test_a_gpu_is_shared_by_a_key_of_its_own() -> None:
    """The key of cores does not lend a GPU; with its own on both nodes the lab's figures mean nothing."""
    raw = ratio_lab(1, 1)
    for node in raw["node"]:
        node.update(gpus=[0], share_cpus=True)
    with pytest.raises(
        ConfigError, match=r"gpu 0 of local belongs to n0 already(.|\n)*share_gpus = true on both"
    ):
        parse_lab(raw, "my.toml")
    assert load_lab("one-gpu").shared == "GPUs"


def test_shared_cores_bear_no_verdict() -> None:
    """A gate on servers that measure each other is refused."""
    with pytest.raises(ConfigError, match="a verdict means nothing") as caught:
        parse_lab({**SHARED, "gate": GATED["gate"][:3]}, "my.toml")
    assert [problem.key for problem in caught.value.problems] == ["gate"]


def test_ports_grow_with_the_nodes() -> None:
    """Three a server, ten for routers, six for routing: a range that suffices 1P1D is refused for 2P2D."""
    assert [ports_needed(nodes) for nodes in (2, 3, 4)] == [22, 25, 28]
    with pytest.raises(ConfigError, match="holds 27 ports, this lab needs 28"):
        parse_lab(ratio_lab(2, 2, ports={"first": 21000, "last": 21026}), "my.toml")


@pytest.mark.parametrize("name", ["one-to-two", "two-to-one", "four-h200-2p1d", "four-h200-2p2d"])
def test_the_plan_routes_to_every_node(name: str) -> None:
    """The router gets each prefill and each decode server once; replicated is all nodes, single the first."""
    lab = load_lab(name)
    hosts = RecordingHosts(lab)
    hosts.open()
    (stage,) = dry_run.deploy(hosts, lab)
    deployed = stage.deployment
    urls = {
        role: [s.url for s in deployed.servers if s.plan.node.role == role] for role in ("prefill", "decode")
    }
    assert {role: len(found) for role, found in urls.items()} == {
        "prefill": len(lab.prefill), "decode": len(lab.decode),
    }  # fmt: skip
    ports = [server.plan.port for server in deployed.servers]
    assert len(set(ports)) == len(lab.nodes)
    single, replicated, split = stage.topologies
    assert [s.name for s in single.servers] == [lab.prefill[0].name]
    assert [s.name for s in replicated.servers] == [node.name for node in lab.nodes]
    for role, found in urls.items():
        argv = split.router.argv
        assert [argv[i + 1] for i, word in enumerate(argv) if word == f"--{role}"] == found
    assert (split.prefill, split.decode) == (
        deployed.servers[: len(lab.prefill)],
        deployed.servers[len(lab.prefill) :],
    )


def server(name: str, role: str) -> Any:
    """As much of a server as topologies and ledgers look at."""
    node = SimpleNamespace(role=role)
    return SimpleNamespace(name=name, url=f"http://{name}", plan=SimpleNamespace(connector=True, node=node))


P, Q = server("p", "prefill"), server("q", "prefill")
A, B, C = (server(name, "decode") for name in "abc")
ROUTER: Any = None
SPLIT = Topology(DISAGGREGATED, DISAGGREGATED, VERSION, ROUTER, (P, Q, A, B, C), (P, Q), (A, B, C))


@pytest.mark.parametrize(
    ("prefill", "decode", "cycle"), [(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (2, 3, 6), (4, 6, 12)]
)
def test_a_router_comes_back_to_a_pair(prefill: int, decode: int, cycle: int) -> None:
    """By counting: the k-th request goes to prefill k mod P and decode k mod D."""
    split = Topology("d", DISAGGREGATED, VERSION, ROUTER, (), (P,) * prefill, (A,) * decode)
    dealt = [(k % prefill, k % decode) for k in range(2 * cycle)]
    assert split.cycle == cycle
    assert len(set(dealt)) == cycle
    assert dealt[:cycle] == dealt[cycle:]
    assert Topology("r", REPLICATED, VERSION, ROUTER, (P, A, B)).cycle == 3


PORTS = ((1, 2), (3, 4), (5, 6))


def test_a_deployment_routes_by_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers take the part of their node, in the order of the lab file."""
    asked: list[dict[str, Any]] = []

    def start(_host: Any, _lab: Any, label: str, **roles: Any) -> Any:
        assert roles.pop("ports") in PORTS
        asked.append(roles)
        process = SimpleNamespace(name=f"router-{label}")
        return SimpleNamespace(process=process, stop=lambda: None, await_ready=lambda _: None)

    monkeypatch.setattr(topology, "launch_router", start)
    hosts: Any = SimpleNamespace(controller=None, router_ports=list(PORTS))
    lab = load_lab("four-h200-2p2d")
    model: Any = SimpleNamespace(name="m")
    deployed = Deployment(hosts, lab, model)
    deployed.servers = (P, A, Q, B)
    kinds = {kind: deployed.topology(kind) for kind in (SINGLE, REPLICATED, DISAGGREGATED)}
    assert asked == [{"workers": (P,)}, {"workers": (P, A, Q, B)}, {"prefill": (P, Q), "decode": (A, B)}]
    assert [len(one.servers) for one in kinds.values()] == [1, 4, 4]
    assert deployed.process_names == {f"router-{kind}" for kind in kinds}


SHAPE = KvShape((Layer(3, 64, 64),) * 30, "bfloat16")
BLOCK_BYTES = 128 * 23_040
SENT = [Sent(300, 8)] * 6  # 3 blocks each; prefill servers get 3 requests each, decode servers 2
COUNTERS = (
    ledger.BYTES, ledger.TRANSFERS, ledger.TRANSFER_TIME, ledger.FAILED, ledger.FAILED_NOTIFICATIONS,
    ledger.EXPIRED, ledger.FINISHED, ledger.PROMPT_TOKENS, ledger.GENERATED, ledger.SERVED,
)  # fmt: skip
SOURCES = ("external_kv_transfer", "local_compute", "local_cache_hit")


def counted(role: str, requests: int, moves: bool) -> dict[str, float]:
    """What a server counts after so many of the requests."""
    found = dict.fromkeys((*COUNTERS, *SOURCES), 0.0)
    prefill = role == "prefill"
    found[ledger.FINISHED] = requests
    found[ledger.PROMPT_TOKENS] = 300 * requests
    found[ledger.GENERATED] = requests * (1 if prefill else 8)
    found["local_compute" if prefill else "external_kv_transfer"] = 300 * requests
    if moves:
        found |= {
            ledger.TRANSFERS: requests,
            ledger.BYTES: 3 * BLOCK_BYTES * requests,
            ledger.TRANSFER_TIME: 0.01,
        }
    return found


def snapshot(name: str, counters: Mapping[str, float]) -> Snapshot:
    """A scrape with these counters."""
    rows: list[tuple[str, frozenset[tuple[str, str]], float]] = [
        (prometheus.PROCESS_START, frozenset(), 1.0),
        (ledger.CACHE_CONFIG, frozenset({("block_size", "128")}), 1.0),
    ]
    for key, value in counters.items():
        source = frozenset({("source", key)}) if key in SOURCES else frozenset()
        rows.append((ledger.BY_SOURCE if key in SOURCES else key, source, value))
    return Snapshot(name, f"http://{name}/metrics", tuple(rows))


def proved(shares: Mapping[str, int], mover: str = "decode", **changes: float) -> Ledger:
    """The ledger of servers with these shares; ``changes``: added to counters, as ``a__TRANSFERS``."""
    grown = {
        s.name: counted(s.plan.node.role, shares[s.name], s.plan.node.role == mover) for s in SPLIT.servers
    }
    for key, value in changes.items():
        name, _, counter = key.partition("__")
        grown[name][getattr(ledger, counter)] += value
    processes = {name: Process(100, 1) for name in grown}
    before = Reading({name: snapshot(name, dict.fromkeys(grown[name], 0.0)) for name in grown}, processes)
    after = Reading({name: snapshot(name, found) for name, found in grown.items()}, processes)
    return ledger.prove(SPLIT, before, after, SENT, SHAPE, VERSION)


EVEN = {"p": 3, "q": 3, "a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize(("mover", "by"), [("decode", {"a", "b", "c"}), ("prefill", {"p", "q"})])
def test_even_shares_are_believed(mover: str, by: set[str]) -> None:
    """Each server's bytes are told, whether decode reads them or prefill writes them."""
    book = proved(EVEN, mover)
    assert book.kv_bytes == 6 * 3 * BLOCK_BYTES
    assert {name for name, moved in book.kv_bytes_by.items() if moved} == by
    assert all(book.transfers_by[name] == EVEN[name] for name in by)


@pytest.mark.parametrize(
    "shares",
    [
        {**EVEN, "p": 4, "q": 2},
        {**EVEN, "p": 6, "q": 0},
        {**EVEN, "a": 3, "c": 1},
        {**EVEN, "a": 3, "b": 3, "c": 0},
    ],
)
def test_a_role_that_is_not_dealt_in_turn_is_caught(shares: dict[str, int]) -> None:
    """Sums are right, yet a node had two requests more than another of its role, or none."""
    with pytest.raises(InvalidRun, match="did not alternate"):
        proved(shares)


def test_a_transfer_of_a_request_that_another_server_finished_is_caught() -> None:
    """Six transfers and six requests, but not on the same servers."""
    with pytest.raises(
        TransferError, match="transfers by a, which finished as many requests: expected 2, got 3"
    ):
        proved(EVEN, a__TRANSFERS=1, b__TRANSFERS=-1)


def test_a_transfer_asks_the_pair_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the first of each role; what goes wrong names the pair."""
    asked: list[str] = []

    def prefill(url: str, _: Any) -> None:
        asked.append(url)

    def decode(url: str, _: Any, __: Any) -> None:
        asked.append(url)

    def prove(split: Topology, *_: Any) -> str:
        return split.name

    monkeypatch.setattr(openai, "prefill", prefill)
    monkeypatch.setattr(openai, "decode", decode)
    monkeypatch.setattr(ledger, "read", lambda _: None)
    monkeypatch.setattr(ledger, "settle", lambda *_: None)
    monkeypatch.setattr(ledger, "prove", prove)
    monkeypatch.setattr(Topology, "served_name", "m")
    lab: Lab = load_lab("embedded")
    told: list[Any] = [
        transfer.transfer(SPLIT, 300, 0, lab, SHAPE, 128),
        transfer.transfer(SPLIT, 300, 0, lab, SHAPE, 128, prefill=Q, decode=C),
    ]
    assert asked == ["http://p", "http://a", "http://q", "http://c"]
    assert told == ["disaggregated, p to a", "disaggregated, q to c"]


DEV = "data0: {0} 1 0 0 0 0 0 0 50 9 0 0 0 0\ndata1: 7000 1 0 0 0 0 0 0 60 9 0 0 0 0\n"


def place(name: str, host: str, interface: str | None) -> tuple[Any, NodeSection]:
    """A decode node on a host whose first interface received 1,000 B."""
    found = SimpleNamespace(name=host, facts=None, read_text=lambda _: DEV.format(1000))
    return found, NodeSection(name=name, address="192.0.2.1", role="decode", cpus=[0], interface=interface)


def test_the_wire_of_several_nodes_is_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link once, whoever shares it; a node without one leaves the sum unknown."""
    monkeypatch.setattr(facts, "network", lambda *_: {"MTU": "1500"})
    two_hosts = link_counters.read_all([place("a", "h", "data0"), place("b", "i", "data0")])
    assert two_hosts is not None
    assert (two_hosts.node, two_hosts.received, two_hosts.sent) == ("a + b", 2000, 100)
    two_links = link_counters.read_all([place("a", "h", "data0"), place("b", "h", "data1")])
    assert two_links is not None
    assert two_links.received == 8000
    one_link = link_counters.read_all([place("a", "h", "data0"), place("b", "h", "data0")])
    assert one_link is not None
    assert one_link.received == 1000
    assert link_counters.read_all([place("a", "h", "data0"), place("b", "i", None)]) is None


LAYOUT = layout(KvShape((Layer(kv_heads=1, key_dim=500, value_dim=0),), "float16"), 16)  # 1,000 B a token
# 400 tokens: 0.5 s of prefill, and 400,000 B: 0.004 s; a decode step costs a sequence 0.01 s
ROUND = Speeds(Prefill(0.1, 0.001), Step(0.1, 0.01), link_bytes_per_s=1e8)


def of_four(prefill: int, speeds: Speeds = ROUND) -> Cluster:
    """Four nodes."""
    return Cluster(speeds, LAYOUT, VERSION, 0, prefill, 4 - prefill)


def test_capacity_is_that_of_the_busier_role() -> None:
    """0.5 s of prefill on P nodes, and 2 s of decode on D: requests/s by hand."""
    found = [breakeven.disaggregated_capacity_per_s(of_four(prefill), 400, 200) for prefill in (1, 2, 3)]
    assert found == pytest.approx([1.5, 1.0, 0.5])


@pytest.mark.parametrize(("prefill", "links"), [(1, 1), (2, 2), (3, 1)])
def test_a_transfer_uses_a_link_at_both_ends(prefill: int, links: int) -> None:
    """A node has one link: three that read from one, or one that reads from three, share it."""
    slow = Speeds(ROUND.prefill, ROUND.step, link_bytes_per_s=1e5)  # 4 s a transfer
    cluster = of_four(prefill, slow)
    assert cluster.links == links
    assert breakeven.disaggregated_capacity_per_s(cluster, 400, 10) == pytest.approx(links / 4)
    assert math.isinf(breakeven.disaggregated(cluster, Point(400, 10, 0.26 * links)).e2e_s)


def test_two_pairs_serve_two_requests_as_if_each_were_alone() -> None:
    """Two requests at once on 2P2D meet nowhere: not on prefill, not on a link, not on decode."""
    point = Point(400, 10, 1.0)
    alone = simulation.disaggregated(of_four(2), point, [0.0])
    both = simulation.disaggregated(of_four(2), point, [0.0, 0.001])
    assert both.e2e_s == pytest.approx(alone.e2e_s)

"""Ways of a lab change what they say and nothing else; what cannot be is refused with its key."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from disagglab.config import inherit, way
from disagglab.config.labs import load_lab, on_workloads, parse_lab
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError
from disagglab.experiments import dry_run
from disagglab.paths import LABS

RAW = inherit.read(LABS / "two-h200-stock.toml").table


def lab_with(**changes: Any) -> Lab:
    """The two-h200-stock lab with one way ``v``."""
    row = {"name": "v", "what": "something", "expects": "something", **changes}
    return parse_lab({**RAW, "way": [row]}, "lab.toml")


def test_a_way_changes_its_keys_and_keeps_the_others() -> None:
    lab = lab_with(
        transport={"extra": {"num_threads": 1}, "env": {"UCX_A": "1"}},
        args={"block-size": 64},
        env={"B": "2"},
    )
    changed = way.changed(lab, lab.ways[0])
    assert changed.transport.extra == {"num_threads": 1}
    assert changed.transport.kv_buffer_device == lab.transport.kv_buffer_device
    assert changed.transport.variables["UCX_A"] == "1"
    assert changed.vllm.args == {**lab.vllm.args, "block-size": 64}
    assert changed.vllm.env == {**lab.vllm.env, "B": "2"}
    assert changed.nodes == lab.nodes
    assert changed.vllm.version == lab.vllm.version
    assert lab.transport.extra == {}


def test_tables_of_the_transport_are_merged_key_by_key() -> None:
    raw = {**RAW, "transport": {**RAW["transport"], "env": {"UCX_A": "1", "UCX_B": "1"}}}
    row = {"name": "v", "what": "w", "expects": "e", "transport": {"env": {"UCX_B": "2"}}}
    lab = parse_lab({**raw, "way": [row]}, "lab.toml")
    assert way.changed(lab, lab.ways[0]).transport.env == {"UCX_A": "1", "UCX_B": "2"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "changes nothing"),
        ({"args": {"port": 1}}, "way[0].args.port"),
        ({"args": {"--block-size": 64}}, "written with dashes in front"),
        ({"args": {"gpu-memory-utilization": 0.9}}, "way[0].args.gpu-memory-utilization"),
        ({"transport": {"extra": {"kv_lease_duration": 9}}}, "write lease_s"),
        ({"transport": {"ucx_tls": ["sm"]}}, "way[0].transport.ucx_tls"),
        ({"transport": {"kv_bufer_device": "cpu"}}, "way[0].transport.kv_bufer_device"),
        ({"transport": {"lease_s": 1}}, "way[0].transport.lease_s"),
        ({"transport": {"connector": "MyConnector"}}, "way[0].transport.connector"),
        ({"name": "With Space", "args": {"a": 1}}, "way[0].name"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        lab_with(**changes)


def test_two_of_one_name_are_refused() -> None:
    row = {"name": "v", "what": "w", "expects": "e", "args": {"block-size": 64}}
    with pytest.raises(ConfigError, match="v is used twice"):
        parse_lab({**RAW, "way": [row, row]}, "lab.toml")


def test_an_unknown_way_is_refused_with_those_there_are() -> None:
    lab = lab_with(args={"block-size": 64})
    with pytest.raises(ConfigError, match="--way w: no such"):
        way.chosen(lab, ["w"])
    with pytest.raises(ConfigError, match="asked for twice"):
        way.chosen(lab, ["v", "v"])
    with pytest.raises(ConfigError, match=r"add \[\[way\]\]"):
        way.chosen(load_lab("one-to-two"), ["v"])


def test_servers_beside_each_other_share_a_gpu() -> None:
    lab = lab_with(args={"block-size": 64})
    assert way.beside(lab, 0) is lab
    shared = way.beside(lab, 2)
    assert shared.vllm.args["gpu-memory-utilization"] == 0.3
    assert lab.memory.kv_beside_gib is not None
    assert shared.vllm.args["kv-cache-memory-bytes"] == lab.memory.kv_beside_gib * 2**30
    without = lab.model_copy(update={"memory": lab.memory.model_copy(update={"kv_beside_gib": None})})
    with pytest.raises(ConfigError, match=r"memory\.kv_beside_gib"):
        way.beside(without, 1)
    cpu = load_lab("embedded")
    assert way.beside(cpu, 2) is cpu


def test_the_plan_shows_the_servers_of_a_way() -> None:
    lab = lab_with(transport={"extra": {"num_threads": 1}, "connector": "NixlPushConnector"})
    servers = [line for line in dry_run.lines(lab, ways=lab.ways) if " serve " in line and "kv_role" in line]
    assert len(servers) == 2 * len(lab.nodes)
    own = [line for line in servers if '"NixlConnector"' in line]
    changed = [line for line in servers if '"NixlPushConnector"' in line and '"num_threads": 1' in line]
    assert len(own) == len(changed) == len(lab.nodes)


@pytest.mark.parametrize("name", sorted(file.stem for file in Path("labs").glob("*.toml")))
def test_every_way_of_every_lab_can_be_planned(name: str) -> None:
    lab = load_lab(name)
    for one in lab.ways:
        text = "\n".join(dry_run.lines(way.beside(lab, 1), ways=[one]))
        for key, value in one.transport.get("extra", {}).items():
            assert f'"{key}": {json.dumps(value)}' in text
        for key, value in one.env.items():
            assert f"{key}={value}" in text


def test_a_comparison_may_be_kept_to_some_workloads() -> None:
    lab = load_lab("embedded")
    kept = on_workloads(lab, ["chat"]).gates
    assert kept
    assert {gate.workload for gate in kept} == {"chat"}
    assert on_workloads(lab, []).gates == lab.gates
    with pytest.raises(ConfigError, match="--workload documents: no gate names it"):
        on_workloads(lab, ["chat", "documents"])
    with pytest.raises(ConfigError, match=r"remove it: the lab file has no \[\[gate\]\]"):
        on_workloads(load_lab("one-to-two"), ["chat"])


def test_a_way_on_cpu_cannot_want_gpu_memory() -> None:
    raw = tomllib.loads(Path("labs/embedded.toml").read_text())
    row = {"name": "v", "what": "w", "expects": "e", "transport": {"kv_buffer_device": "cuda"}}
    with pytest.raises(ConfigError, match=r"way\[0\]\.transport\.kv_buffer_device"):
        parse_lab({**raw, "way": [row]}, "lab.toml")


def test_a_key_of_the_lab_itself_is_checked_alike() -> None:
    raw = {**RAW, "transport": {**RAW["transport"], "extra": {"kv_lease_duration": 9}}}
    with pytest.raises(ConfigError, match=r"transport\.extra\.kv_lease_duration: has a key of its own"):
        parse_lab(raw, "lab.toml")


def test_where_both_name_a_key_the_ways_value_counts() -> None:
    raw = {**RAW, "vllm": {**RAW["vllm"], "args": {"block-size": 16}, "env": {"A": "1"}}}
    row = {"name": "v", "what": "w", "expects": "e", "args": {"block-size": 64}, "env": {"A": "2"}}
    lab = parse_lab({**raw, "way": [row]}, "lab.toml")
    changed = way.changed(lab, lab.ways[0])
    assert (changed.vllm.args["block-size"], changed.vllm.env["A"]) == (64, "2")
    assert changed.block_size == 64


EMBEDDED = inherit.read(LABS / "embedded.toml").table
WORDS = {"what": "w", "expects": "e"}
SHARDED: dict[str, Any] = {"kind": "sharded", **WORDS}
TURNED = {"prefill": {"nodes": ["b"]}, "decode": {"nodes": ["a"]}}


def embedded(*rows: dict[str, Any], **changes: Any) -> Lab:
    """The embedded lab with these ways."""
    return parse_lab({**EMBEDDED, **changes, "way": [{**WORDS, **row} for row in rows]}, "lab.toml")


def on_hosts(*hosts: str, gpus: int = 0) -> list[dict[str, Any]]:
    """A node on each of these hosts, called n0, n1 …; the first prefills. Each has cores or so many GPUs."""
    return [
        {
            "name": f"n{number}",
            "host": host,
            "address": f"198.18.1.{number + 1}",
            "data_address": f"198.18.9.{number + 1}",
            "interface": f"data{number}",
            "role": "decode" if number else "prefill",
            **({"gpus": list(range(gpus))} if gpus else {"cpus": [number]}),
        }
        for number, host in enumerate(hosts)
    ]


def across(*hosts: str, gpus: int = 0) -> Lab:
    """A lab with a node on each of these hosts, and a sharded way without a name."""
    sections = [{"name": name} for name in dict.fromkeys(hosts)]
    raw = {**EMBEDDED, "node": on_hosts(*hosts, gpus=gpus), "host": sections, "way": [SHARDED]}
    return parse_lab(raw, "lab.toml")


def test_roles_may_be_turned() -> None:
    """b prefills and a decodes; cores and addresses stay where they are, and so does the order of nodes."""
    lab = embedded({"name": "turned", **TURNED})
    found = way.nodes_of(lab.nodes, lab.ways[0])
    assert [(node.name, node.role, node.cpus) for node in found] == [
        ("a", "decode", [0]),
        ("b", "prefill", [1]),
    ]
    assert [(node.name, node.role) for node in lab.nodes] == [("a", "prefill"), ("b", "decode")]


def test_options_of_a_role_are_of_its_nodes_alone() -> None:
    """They go before the way's, which go before the lab's: 2048 of the role, 256 of the way, 128 and 32."""
    row = {
        "name": "v",
        "args": {"max-num-batched-tokens": 256},
        "prefill": {"args": {"max-num-batched-tokens": 2048}, "env": {"A": "1"}},
    }
    vllm = {**EMBEDDED["vllm"], "args": {"max-num-batched-tokens": 128, "max-num-seqs": 32}}
    lab = embedded(row, vllm=vllm)
    changed = way.changed(lab, lab.ways[0])
    a, b = ({**changed.vllm.args, **node.args} for node in changed.nodes)
    assert a == {"max-num-batched-tokens": 2048, "max-num-seqs": 32}
    assert b == {"max-num-batched-tokens": 256, "max-num-seqs": 32}
    assert [node.env for node in changed.nodes] == [{"A": "1"}, {}]


def test_a_role_takes_the_nodes_that_it_names() -> None:
    """n2 is given to prefill, by name; the others keep the lab's roles."""
    raw = {**EMBEDDED, "node": on_hosts("local", "local", "local")}
    one = parse_lab({**raw, "way": [{**WORDS, "name": "v", "prefill": {"nodes": ["n2"]}}]}, "lab.toml")
    found = way.nodes_of(one.nodes, one.ways[0])
    assert [node.role for node in found] == ["prefill", "decode", "prefill"]


def test_nodes_without_a_role_are_left_out_where_both_are_named() -> None:
    """Of three nodes two are named: one prefills, one decodes, n1 is idle."""
    roles = {"prefill": {"nodes": ["n2"]}, "decode": {"nodes": ["n0"]}}
    raw = {**EMBEDDED, "node": on_hosts("local", "local", "local")}
    lab = parse_lab({**raw, "way": [{**WORDS, "name": "v", **roles}]}, "lab.toml")
    found = way.changed(lab, lab.ways[0])
    assert [(node.name, node.role) for node in found.nodes] == [("n0", "decode"), ("n2", "prefill")]


def test_one_server_over_the_cores_of_a_host() -> None:
    """Two ranks, each bound to the cores of a node, ranks apart by a bar; one node is left, which stands for
    both. No start on several hosts.
    """
    lab = embedded(SHARDED)
    found = way.changed(lab, lab.ways[0])
    (node,) = found.nodes
    assert (node.name, node.role, node.cpus, node.gpus) == ("a-b", "prefill", [0, 1], [])
    assert node.env == {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert node.args == {}
    assert found.vllm.args == {**lab.vllm.args, "tensor-parallel-size": 2}
    assert (way.ranks(found), way.ranks(lab)) == (2, 1)


def test_several_cores_of_a_node_are_one_rank() -> None:
    nodes = [{**node, "cpus": [4 * number, 4 * number + 1]} for number, node in enumerate(EMBEDDED["node"])]
    (node,) = way.changed(lab := embedded(SHARDED, node=nodes), lab.ways[0]).nodes
    assert node.env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|4,5"


def test_one_server_over_the_gpus_of_a_host() -> None:
    """Its ranks are the GPUs of all nodes, and cores are not bound for them."""
    raw = {**RAW, "way": [SHARDED]}
    lab = parse_lab(raw, "lab.toml")
    found = way.changed(lab, lab.ways[0])
    (node,) = found.nodes
    gpus = [gpu for one in lab.nodes for gpu in one.gpus]
    assert node.gpus == gpus
    assert len(gpus) > 1
    assert "VLLM_CPU_OMP_THREADS_BIND" not in node.env
    assert way.ranks(found) == len(gpus)


def test_a_node_may_have_several_gpus() -> None:
    assert way.ranks(way.sharded(across("alpha", "beta", gpus=4))) == 8


def test_one_server_over_two_hosts() -> None:
    """vLLM's own start on several hosts: both are told the leader's data address, the second has no HTTP."""
    lab = across("alpha", "beta")
    first, second = way.changed(lab, lab.ways[0]).nodes
    both = {"nnodes": 2, "master-addr": "198.18.9.1", "distributed-executor-backend": "mp"}
    assert first.args == {**both, "node-rank": 0}
    assert second.args == {**both, "node-rank": 1, "headless": True}
    assert (first.host, second.host) == ("alpha", "beta")
    assert first.env == {
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_HOST_IP": "198.18.9.1",
        "GLOO_SOCKET_IFNAME": "data0",
        "NCCL_SOCKET_IFNAME": "data0",
    }
    assert second.env["VLLM_HOST_IP"] == "198.18.9.2"
    assert second.env["GLOO_SOCKET_IFNAME"] == "data1"
    assert way.ranks(way.changed(lab, lab.ways[0])) == 2


def test_nodes_of_a_host_are_one_part_of_a_server_over_hosts() -> None:
    """Four nodes on two hosts, given in turns: two parts of two ranks each."""
    lab = across("alpha", "beta", "alpha", "beta")
    first, second = way.sharded(lab).nodes
    assert (first.name, first.cpus, first.env["VLLM_CPU_OMP_THREADS_BIND"]) == ("n0-n2", [0, 2], "0|2")
    assert (second.name, second.cpus, second.args["node-rank"]) == ("n1-n3", [1, 3], 1)
    assert (way.ranks(way.sharded(lab)), first.args["nnodes"]) == (4, 2)


def test_an_environment_of_a_node_goes_before_what_sharding_sets() -> None:
    nodes = [{**node, "env": {"VLLM_CPU_OMP_THREADS_BIND": "7"}} for node in EMBEDDED["node"][:1]]
    lab = embedded(SHARDED, node=[*nodes, *EMBEDDED["node"][1:]])
    assert way.sharded(lab).nodes[0].env["VLLM_CPU_OMP_THREADS_BIND"] == "7"


@pytest.mark.parametrize(
    ("row", "shared"),
    [
        ({"kind": "single", "name": "v", "args": {"max-num-seqs": 8}}, True),
        ({"kind": "replicated", "name": "v", "args": {"max-num-seqs": 8}}, True),
        ({"kind": "disaggregated", "name": "w", "args": {"max-num-seqs": 8}}, True),
        ({"kind": "disaggregated", "name": "v", "args": {"max-num-seqs": 9}}, False),
        ({"kind": "disaggregated", "name": "v", "args": {"max-num-seqs": 8}, "env": {"A": "1"}}, False),
        ({"kind": "sharded", "name": "v", "args": {"max-num-seqs": 8}}, False),
        ({"name": "v", "args": {"max-num-seqs": 8}, "transport": {"lease_s": 60}}, False),
        ({"name": "v", "args": {"max-num-seqs": 8}, "decode": {"args": {"async-scheduling": False}}}, False),
        ({"name": "v", "args": {"max-num-seqs": 8}, **TURNED}, False),
    ],
)  # fmt: skip
def test_ways_share_servers_whose_commands_are_the_same(row: dict[str, Any], shared: bool) -> None:
    """Beside replicated servers of at most 8 sequences."""
    lab = embedded({"kind": "replicated", "name": "own", "args": {"max-num-seqs": 8}}, row)
    one, other = (way.start_key(lab, each) for each in lab.ways)
    assert (one == other) is shared
    assert one != way.start_key(lab, None)


def test_a_way_that_says_what_the_lab_says_is_played_by_its_servers() -> None:
    lab = embedded({"name": "v", "args": {"enforce-eager": True}})
    assert way.start_key(lab, lab.ways[0]) == way.start_key(lab, None)
    assert way.starts(lab, lab.ways) == 0


def test_starts_are_counted_by_servers_and_not_by_ways() -> None:
    """Three kinds of one setting are one start; sharded is another; the lab's own is none."""
    kinds = ("single", "replicated", "disaggregated", "sharded")
    rows = [{"kind": kind, "name": "v", "args": {"max-num-seqs": 8}} for kind in kinds]
    lab = embedded(*rows, {"kind": "single", "name": "own", "args": {"enforce-eager": True}})
    assert way.starts(lab, lab.ways) == 2
    assert way.starts(lab, lab.ways[:3]) == 1
    assert way.starts(lab, ()) == 0


def test_the_lab_sharded_is_another_start_than_the_lab() -> None:
    """Also where a server of one node and one over it have the same options: their parts are told apart."""
    lab = embedded(SHARDED)
    assert way.start_key(lab, lab.ways[0]) != way.start_key(lab, None)


@pytest.mark.parametrize(
    ("row", "tag", "arm"),
    [
        ({"name": "push", "args": {"a": 1}}, "@push", "disaggregated@push"),
        ({"kind": "replicated", "name": "push", "args": {"a": 1}}, "@replicated-push", "replicated@push"),
        ({"kind": "sharded", "name": "push"}, "@sharded-push", "sharded@push"),
        ({"kind": "sharded"}, "@sharded", "sharded"),
    ],
)
def test_the_processes_of_ways_are_told_apart(row: dict[str, Any], tag: str, arm: str) -> None:
    (one,) = embedded(row).ways
    assert (way.tag(one), one.arm) == (tag, arm)


def test_a_name_stands_for_every_kind_of_it() -> None:
    """A bare name for all ways that have it, an arm for one; in the order asked for."""
    rows = [{"kind": kind, "name": "v", "args": {"max-num-seqs": 8}} for kind in ("single", "replicated")]
    lab = embedded(*rows, SHARDED)
    assert [one.arm for one in way.chosen(lab, ["v"])] == ["single@v", "replicated@v"]
    assert [one.arm for one in way.chosen(lab, ["sharded", "replicated@v"])] == ["sharded", "replicated@v"]
    with pytest.raises(ConfigError, match="--way replicated@v: asked for twice"):
        way.chosen(lab, ["v", "replicated@v"])
    with pytest.raises(ConfigError, match="use one of v, sharded"):
        way.chosen(lab, ["disaggregated@v"])

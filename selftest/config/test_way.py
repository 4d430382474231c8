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

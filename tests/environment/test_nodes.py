"""Facts of every node, as tests: what the later figures stand on.

The oracle is the node itself (kernel, package metadata); the expectation is the lab file. A fact that has no
expectation is recorded, so that the report can say what a figure was measured on.
"""

from __future__ import annotations

import shutil

import pytest

from disagglab.config.checks import ports_needed
from disagglab.config.schema import Lab
from disagglab.hosts import clock, facts, gpu
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import cache_folder
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store

GIB = 2**30
SMALLEST_MTU = 1500  # bytes; RoCE wants 4200 or more
FREE_DISK_GIB = (
    2  # a run's logs and per-request results stay below 0.1 GiB; the converted model takes 0.3 GiB
)


def test_cores_of_each_node_exist(hosts: Hosts, lab: Lab) -> None:
    """Every core that the lab file gives to a node is one that this account may use.

    A server bound to a core that does not exist would run unbound, and two servers on one core would measure
    each other. Look at the instruction sets in the report: bf16 without avx512_bf16 or amx_bf16 is emulated.
    """
    for node in lab.nodes:
        allowed = set(hosts.of(node).about["cores"])
        assert set(node.cpus) <= allowed, f"{node.name}: cores {node.cpus}, allowed are {sorted(allowed)}"


def test_memory_is_above_the_floor(hosts: Hosts, lab: Lab) -> None:
    """MemAvailable covers the lab's floor for all servers of this host together."""
    for host in hosts.all:
        available = facts.memory(host.facts)["available"]
        need = lab.memory.floor_gib * GIB * len(lab.nodes_on(host.name))
        assert available >= need, (
            f"{host.name}: {available / GIB:.1f} GiB available, {need / GIB:.1f} GiB wanted"
        )


def test_versions_are_those_of_the_lab(hosts: Hosts, lab: Lab) -> None:
    """vLLM and the router are the versions that the lab file names; NIXL is installed."""
    for node in lab.nodes:
        found = facts.versions(hosts.of(node).facts, hosts.python_of(node, lab.vllm.version))
        assert found["vllm"].partition("+")[0] == lab.vllm.version, f"{node.name}: {found}"
        assert "nixl-cu13" in found or "nixl" in found, f"{node.name}: no NIXL among {sorted(found)}"
    controller = hosts.controller
    ours = facts.versions(controller.facts, controller.suite_python)
    assert ours["vllm-router"] == lab.router.version


@pytest.mark.lab_has("gpus")
def test_gpus_of_each_node_exist(hosts: Hosts, lab: Lab) -> None:
    """Every GPU that the lab file gives to a node answers nvidia-smi."""
    for node in lab.nodes:
        found = gpu.read_gpus(hosts.of(node).facts)
        assert all(number < len(found) for number in node.gpus), (
            f"{node.name}: GPUs {node.gpus}, the host has {len(found)}"
        )


def test_data_address_is_on_an_interface(hosts: Hosts, lab: Lab) -> None:
    """The address of each node belongs to an interface of its host; its MTU is no less than Ethernet's."""
    for node in lab.nodes:
        found = facts.network(hosts.of(node).facts, node.kv_address)
        assert int(found["MTU"]) >= SMALLEST_MTU, f"{node.name}: {found}"


def test_enough_ports_are_free(hosts: Hosts, lab: Lab) -> None:
    """The lab's port range holds enough ports that nobody uses.

    A port is reserved here the way a server's is: bound, never listening, so that no other program can take
    it.
    """
    count = ports_needed(len(lab.nodes))
    for node in lab.nodes:
        reserved = hosts.of(node).call("free_ports", node.address, count)
        assert len(set(reserved)) == count, node.name


def test_disk_has_room(store: Store) -> None:
    """Reports and model cache each have room for a run."""
    for folder in (store.folder, cache_folder()):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        assert free >= FREE_DISK_GIB * GIB, (
            f"{folder}: {free / GIB:.1f} GiB free, {FREE_DISK_GIB} wanted; df -h {folder}"
        )


def test_clock_of_each_host_agrees_with_ours(hosts: Hosts, lab: Lab, record: Recorder) -> None:
    """A host's clock is within half a second of ours, asking time included.

    NTP promises that two clocks are close, and not that one lies within a round trip of the other. No figure
    compares them; logs of two hosts are read side by side, and with clocks a second apart causes come after
    effects. What asking took is the width of the interval, so a slow answer can leave it open.
    """
    limit_s = clock.MOST_OFFSET_S
    for host in hosts.all:
        offset = clock.read(host.facts)
        limits = [offset.low_s, offset.mean_s, offset.high_s]
        record.numbers("clock offset", limits, "s", what="limits and mean", arm=host.name, command=clock.ASK)
        mend = {"no": "timedatectl there: is a time service running?", "unknown": "run it again"}
        found = offset.within(limit_s)
        assert found == "yes", (
            f"{host.name}: clock is {offset} off, at most {limit_s:g} s are wanted; {mend[found]}"
        )

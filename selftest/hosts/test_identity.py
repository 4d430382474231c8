"""What tells one lab from another, and what does not.

Oracle: the survey that a session on four H200 recorded (reports/reference), with one fact changed at a time;
and facts of RDMA devices as their reader words them.
"""

from __future__ import annotations

import copy
import json
import tomllib
from typing import Any

import pytest

from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.schema import Lab
from disagglab.hosts import identity, rdma
from disagglab.hosts.facts import title_of
from disagglab.paths import REPORTS

FOUR = REPORTS / "reference" / "four-h200-2p2d" / "run.json"
HOST, NODE = "host local", "node gpu3 (decode)"
LINK = {"address": "192.168.100.10", "interface": "eth0", "MTU": "9000", "speed": "200000 Mbit/s"}


@pytest.fixture
def lab() -> Lab:
    """The lab of the session."""
    meta = json.loads(FOUR.read_text())
    return parse_lab(tomllib.loads(meta["lab_file"]), "lab_file")


@pytest.fixture
def survey() -> dict[str, dict[str, str]]:
    """What it recorded; with the kernel and a data link, which it did not see."""
    facts: dict[str, dict[str, str]] = json.loads(FOUR.read_text())["facts"]
    facts[HOST]["kernel"] = "6.18.44"
    facts[NODE].update(LINK)
    return facts


def changed(survey: Any, title: str, **facts: str) -> Any:
    """The survey with some facts of a host or node changed."""
    other = copy.deepcopy(survey)
    other[title].update({key.replace("_", " "): value for key, value in facts.items()})
    return other


@pytest.mark.parametrize(
    ("title", "facts"),
    [
        (HOST, {"memory": "1007.6 GiB"}),
        (HOST, {"kernel": "6.18.45"}),
        (HOST, {"torch": "2.13.0"}),
        (HOST, {"GPUDirect RDMA": "absent: no NVIDIA driver is loaded (/sys/module/nvidia)"}),
        (NODE, {"CPU": "AMD EPYC 9654"}),
        (NODE, {"cores of the machine": "128"}),
        (NODE, {"GPU 3 name": "NVIDIA H100 80GB HBM3"}),
        (NODE, {"GPU 3 memory": "81559 MiB"}),
        (NODE, {"GPU 3 driver": "590.48.01"}),
        (NODE, {"interface": "lo"}),
        (NODE, {"MTU": "1500"}),
        (NODE, {"speed": "100000 Mbit/s"}),
    ],
)
def test_another_lab_is_another(
    lab: Lab, survey: dict[str, dict[str, str]], title: str, facts: dict[str, str]
) -> None:
    """CPU, cores, memory, GPU, driver, data link, kernel or packages of one node make the difference."""
    assert identity.of(lab, changed(survey, title, **facts)) != identity.of(lab, survey)


@pytest.mark.parametrize(
    ("title", "facts"),
    [
        (HOST, {"host name": "other"}),
        (HOST, {"memory": "503.9 GiB"}),
        (HOST, {"memory available before the servers": "480.1 GiB"}),
        (HOST, {"GPUDirect RDMA": "present: GPU_DIRECT_RDMA_SUPPORTED is 1, by the module nvidia_peermem"}),
        (NODE, {"address": "192.168.100.11"}),
        (NODE, {"cores of the node": "0, 1"}),
        (NODE, {"mlx5_0 PCIe": "0000:01:00.0, 2.5 GT/s x4 = 8.0 Gbit/s"}),
    ],
)
def test_what_swings_makes_no_other_lab(
    lab: Lab, survey: dict[str, dict[str, str]], title: str, facts: dict[str, str]
) -> None:
    """Names, addresses, free memory, speeds of the moment, and what the lab file asks are left out."""
    assert identity.of(lab, changed(survey, title, **facts)) == identity.of(lab, survey)


def test_an_equal_card_in_another_slot_is_no_other_lab(lab: Lab, survey: dict[str, dict[str, str]]) -> None:
    """A node that takes GPU 5 where it took GPU 3 has the same identity, if the cards are equal."""
    nodes = tuple(node.model_copy(update={"gpus": [5]}) if node.gpus == [3] else node for node in lab.nodes)
    moved = {key.replace("GPU 3 ", "GPU 5 "): value for key, value in survey[NODE].items()}
    other = lab.model_copy(update={"nodes": nodes})
    assert "GPU 5 name" in moved
    assert identity.of(other, {**survey, NODE: moved}) == identity.of(lab, survey)


def test_a_node_that_was_not_surveyed_is_an_error(lab: Lab, survey: dict[str, dict[str, str]]) -> None:
    """An identity never leaves a node out silently."""
    del survey[NODE]
    with pytest.raises(LookupError, match=r"node gpu3 \(decode\) was not surveyed"):
        identity.of(lab, survey)


def device(**changes: str) -> str:
    """What the reader of RDMA devices prints of one."""
    block = {"device": "rocep1s0f0", "fw_ver": "28.45.4028", "state": "4: ACTIVE", "phys_state": "5: LinkUp"}
    block |= {"rate": "200 Gb/sec (4X HDR)", "link_layer": "Ethernet", "mtu.enp1s0f0np0": "9000"}
    block |= {"pcie": "0000:01:00.0", "current_link_speed": "32.0 GT/s PCIe", "current_link_width": "4"}
    return "\n".join(f"{key}={value}" for key, value in (block | changes).items())


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"rate": "100 Gb/sec (4X EDR)"}, False),
        ({"mtu.enp1s0f0np0": "1500"}, False),
        ({"fw_ver": "28.46.1000"}, False),
        ({"link_layer": "InfiniBand"}, False),
        ({"current_link_speed": "2.5 GT/s PCIe"}, True),
    ],
)
def test_rdma_devices_count_by_what_they_are(changes: dict[str, str], same: bool) -> None:
    """Rate, MTU, firmware and link layer of a node's devices; not the PCIe speed of the moment."""
    lab = load_lab("spark")
    nodes = tuple(node.model_copy(update={"rdma": ["rocep1s0f0"]}) for node in lab.nodes)
    lab = lab.model_copy(update={"nodes": nodes})

    def of(text: str) -> dict[str, dict[str, str]]:
        facts = rdma.facts_of(rdma.parse_devices(text), ["rocep1s0f0"], "192.168.100.10")
        return identity.of(lab, {title_of(node): facts for node in lab.nodes})

    assert (of(device(**changes)) == of(device())) is same

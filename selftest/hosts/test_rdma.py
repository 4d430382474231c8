"""RDMA devices as the kernel shows them: read from a tree of files, grouped into ports, GIDs by type.

No part of this was read off a DGX Spark by this project. The tree below has the shape of its ConnectX-7 as
others have published it: names, firmware, states, rates and GID rows from output of `ibv_devinfo`, `ibstat`
and `show_gids`, PCIe speed and width from `lspci` and NVIDIA's dgx-spark-playbooks. GUIDs are made up, and
`phys_port_name` is inferred from the interface names (np0, np1). Formats are those of the kernel's
Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import testinfra

from disagglab.hosts import rdma
from disagglab.hosts.rdma import Device, Gid, Netdev, PcieLink, Port

LINK_LOCAL = "fe80:0000:0000:0000:0211:22ff:fe33:4455"
MAPPED = "0000:0000:0000:0000:0000:ffff:c0a8:640a"  # 192.168.100.10
SECOND = "0000:0000:0000:0000:0000:ffff:c0a8:c80a"  # 192.168.200.10
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"
CARD = "0011:2203:0033:4455"
V1, V2 = "IB/RoCE v1", "RoCE v2"
GEN5_X4 = 32 * 4 * 128 / 130  # Gbit/s

# As `ibstat` printed it on a Dell Pro Max with GB10, shortened (geerlingguy/sbc-reviews, issue 92). A port
# without a cable says 40 there, a rate that nobody agreed on.
IBSTAT = """CA 'roceP2p1s0f0'
\tCA type: MT4129
\tNumber of ports: 1
\tFirmware version: 28.45.4028
\tPort 1:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 200
\t\tLink layer: Ethernet
"""


def write_device(
    root: Path, name: str, domain: str, function: int, address: str, gids: Mapping[int, tuple[str, str]]
) -> Path:
    """One device of the tree; an address of "" makes its port one without a cable."""
    pci = root / "devices" / f"{domain}:01:00.{function}"
    netdev = pci / "net" / f"en{name.removeprefix('roce')}np{function}"
    device, port = root / name, root / name / "ports" / "1"
    files = {
        device / "fw_ver": "28.45.4028",
        device / "sys_image_guid": CARD,
        port / "state": "4: ACTIVE" if address else "1: DOWN",
        port / "phys_state": "5: LinkUp" if address else "3: Disabled",
        port / "rate": "200 Gb/sec (4X HDR)" if address else "40 Gb/sec (4X QDR)",
        port / "link_layer": "Ethernet",
        pci / "current_link_speed": "32.0 GT/s PCIe",
        pci / "current_link_width": "4",
        pci / "max_link_speed": "32.0 GT/s PCIe",
        pci / "max_link_width": "4",
        pci / "numa_node": "-1",
        netdev / "mtu": "9000",
        netdev / "phys_port_name": f"p{function}",
    }
    for row in range(8):
        text, kind = gids.get(row, (EMPTY, ""))
        files[port / "gids" / str(row)] = text
        if kind:
            files[port / "gid_attrs" / "types" / str(row)] = kind
            files[port / "gid_attrs" / "ndevs" / str(row)] = netdev.name
        else:  # reading the type of an empty row fails, as reading a folder does
            (port / "gid_attrs" / "types" / str(row)).mkdir(parents=True)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (device / "device").symlink_to(pci)
    return device


@pytest.fixture
def spark(tmp_path: Path) -> dict[str, Device]:
    """Four devices of one card, of which two have a cable, read by the real program."""
    root = tmp_path / "infiniband"
    rows = {0: (LINK_LOCAL, V1), 1: (LINK_LOCAL, V2), 2: (MAPPED, V1), 3: (MAPPED, V2)}
    write_device(root, "rocep1s0f0", "0000", 0, "192.168.100.10", rows)
    write_device(root, "rocep1s0f1", "0000", 1, "", {0: (LINK_LOCAL, V1), 1: (LINK_LOCAL, V2)})
    # another order of the same kinds, as seen where addresses were set at another time
    rows = {0: (LINK_LOCAL, V1), 1: (LINK_LOCAL, V2), 4: (SECOND, V1), 5: (SECOND, V2)}
    write_device(root, "roceP2p1s0f0", "0002", 0, "192.168.200.10", rows)
    write_device(root, "roceP2p1s0f1", "0002", 1, "", {0: (LINK_LOCAL, V1), 1: (LINK_LOCAL, V2)})
    (root / "not-a-device").mkdir()
    return rdma.read(testinfra.get_host("local://"), str(root))


def test_every_device_is_read_in_one_command(spark: dict[str, Device]) -> None:
    """Names, port, PCIe, interface and the rows of the GID table that can be read; a stray folder is none."""
    assert sorted(spark) == ["roceP2p1s0f0", "roceP2p1s0f1", "rocep1s0f0", "rocep1s0f1"]
    device = spark["roceP2p1s0f0"]
    assert device == Device(
        name="roceP2p1s0f0",
        card=CARD,
        firmware="28.45.4028",
        state="ACTIVE",
        phys_state="LinkUp",
        rate="200 Gb/sec (4X HDR)",
        link_layer="Ethernet",
        pcie=PcieLink("0002:01:00.0", 32.0, 4, 32.0, 4, None),
        netdevs=(Netdev("enP2p1s0f0np0", 9000, "p0"),),
        gids=(
            Gid(0, LINK_LOCAL, V1, "enP2p1s0f0np0"),
            Gid(1, LINK_LOCAL, V2, "enP2p1s0f0np0"),
            Gid(4, SECOND, V1, "enP2p1s0f0np0"),
            Gid(5, SECOND, V2, "enP2p1s0f0np0"),
        ),
    )


def test_a_host_without_rdma_has_no_device(tmp_path: Path) -> None:
    """Neither a missing folder nor an empty one is an error."""
    host = testinfra.get_host("local://")
    assert rdma.read(host, str(tmp_path / "missing")) == {}
    assert rdma.read(host, str(tmp_path)) == {}


@pytest.mark.parametrize(("device", "address", "index"), [(0, "192.168.100.10", 3), (1, "192.168.200.10", 5)])
def test_the_gid_is_found_by_type_and_address(
    spark: dict[str, Device], device: int, address: str, index: int
) -> None:
    """The row is another on each device; the v1 row of the same address is not taken."""
    devices = rdma.named(spark, ["rocep1s0f0", "roceP2p1s0f0"])
    found, gid = rdma.roce_v2_gid(devices, address)
    assert (found, gid.index, gid.type, gid.address) == (devices[device], index, V2, address)


def test_a_missing_gid_names_what_is_there(spark: dict[str, Device]) -> None:
    """An address without a row, and one that has only a v1 row."""
    devices = rdma.named(spark, ["rocep1s0f0"])
    with pytest.raises(LookupError, match=r"no RoCE v2 GID for 10\.0\.0\.1.*index 3 192\.168\.100\.10"):
        rdma.roce_v2_gid(devices, "10.0.0.1")
    old = replace(devices[0], gids=devices[0].gids[:3])
    with pytest.raises(LookupError, match="IB/RoCE v1"):
        rdma.roce_v2_gid([old], "192.168.100.10")


def test_link_local_rows_are_no_addresses(spark: dict[str, Device]) -> None:
    """A port whose interface has no address has RoCE v2 rows all the same."""
    assert [gid.index for gid in rdma.roce_v2_addresses(spark["rocep1s0f0"])] == [3]
    assert rdma.roce_v2_addresses(spark["rocep1s0f1"]) == ()


def test_a_missing_device_names_those_that_there_are(spark: dict[str, Device]) -> None:
    """The message holds both."""
    with pytest.raises(LookupError, match=r"no RDMA device mlx5_0 .*roceP2p1s0f0, roceP2p1s0f1, rocep1s0f0"):
        rdma.named(spark, ["rocep1s0f0", "mlx5_0"])


def test_two_halves_are_one_port(spark: dict[str, Device]) -> None:
    """Same card and socket, two PCIe addresses: one cable of 200 Gbit/s, twice 126 Gbit/s of PCIe."""
    (port,) = rdma.ports_of(spark, ["rocep1s0f0"])  # the other half is found though it is not named
    assert [half.name for half in port.halves] == ["rocep1s0f0", "roceP2p1s0f0"]
    assert port.active
    assert port.rate_gbit_s == 200
    assert port.pcie_gbit_s == pytest.approx(2 * GEN5_X4) == pytest.approx(252.06, abs=0.01)
    assert port.ceiling_gbit_s == 200
    assert "2 of 2 halves active" in str(port)


def test_one_half_alone_is_bound_by_its_pcie_link(spark: dict[str, Device]) -> None:
    """With a half that is down, or not used, the cable's rate cannot be had."""
    half = spark["rocep1s0f0"]
    assert Port(CARD, "p0", (half,)).ceiling_gbit_s == pytest.approx(126.03, abs=0.01)
    port = Port(CARD, "p0", (half, replace(spark["roceP2p1s0f0"], state="DOWN")))
    assert not port.active
    assert port.ceiling_gbit_s == pytest.approx(GEN5_X4)
    assert "1 of 2 halves active" in str(port)


def test_the_rate_of_a_port_that_is_down_counts_for_nothing(spark: dict[str, Device]) -> None:
    """It says 40 Gb/sec and carries none of it."""
    (port,) = rdma.ports_of(spark, ["rocep1s0f1"])
    assert spark["rocep1s0f1"].rate == "40 Gb/sec (4X QDR)"
    assert (port.active, port.rate_gbit_s, port.ceiling_gbit_s) == (False, 0, 0)


def test_devices_of_different_cards_are_different_ports(spark: dict[str, Device]) -> None:
    """A second card with the same socket name; devices whose card is not known are each their own."""
    one, two = spark["rocep1s0f0"], spark["roceP2p1s0f0"]
    assert len(rdma.ports([one, replace(two, card="0011:2203:0033:4466")])) == 2
    assert len(rdma.ports([replace(one, card=""), replace(two, card="")])) == 2


def test_without_the_drivers_name_the_pcie_function_is_the_socket(spark: dict[str, Device]) -> None:
    """Halves still find each other, and sockets are still kept apart."""
    bare = {name: replace(device, netdevs=()) for name, device in spark.items()}
    assert [len(port.halves) for port in rdma.ports(bare.values())] == [2, 2]


@pytest.mark.parametrize(
    ("speed", "width", "gbit_s"),
    [(32.0, 4, 126.03), (32.0, 16, 504.12), (16.0, 4, 63.02), (8.0, 8, 63.02), (5.0, 1, 4.0), (2.5, 4, 8.0)],
)
def test_pcie_rate_follows_from_speed_and_width(speed: float, width: int, gbit_s: float) -> None:
    """128b/130b from generation 3 on, 8b/10b before."""
    assert rdma.pcie_gbit_s(speed, width) == pytest.approx(gbit_s, abs=0.005)


@pytest.mark.parametrize(("speed", "width"), [(None, 4), (32.0, None), (64.0, 4)])
def test_a_pcie_link_that_is_not_known_has_no_rate(speed: float | None, width: int | None) -> None:
    """Nothing is made up; the port's ceiling is then that of its cable."""
    assert rdma.pcie_gbit_s(speed, width) is None


def test_what_the_kernel_does_not_know_is_none() -> None:
    """As soft-RoCE and virtual machines show it: no PCIe device, or one of unknown speed and width 63."""
    text = (
        "device=rxe0\nstate=4: ACTIVE\nphys_state=5: LinkUp\nrate=2.5 Gb/sec (1X SDR)\nlink_layer=Ethernet\n"
        "device=mlx5_0\nstate=4: ACTIVE\nrate=100 Gb/sec (4X EDR)\nlink_layer=InfiniBand\npcie=0000:00:06.0\n"
        "current_link_speed=Unknown\ncurrent_link_width=63\nnuma_node=-1\nmtu.ib0.8001=2044\n"
    )
    found = rdma.parse_devices(text)
    assert found["rxe0"].pcie == PcieLink()
    assert found["rxe0"].port_name == "rxe0"
    assert found["rxe0"].rate_gbit_s == 2.5
    assert found["mlx5_0"].pcie == PcieLink("0000:00:06.0")
    assert found["mlx5_0"].netdevs == (Netdev("ib0.8001", 2044),)
    assert not found["mlx5_0"].is_roce
    assert rdma.ports([found["mlx5_0"]])[0].ceiling_gbit_s == 100


@pytest.mark.parametrize(
    ("mtu", "data"), [(9000, 4096), (4192, 4096), (4191, 2048), (1500, 1024), (1119, 512), (300, 0)]
)
def test_rdma_packets_fit_the_interface(mtu: int, data: int) -> None:
    """96 B of headers at most beside the data: 4,096 B from an MTU of 4,192 B on, 1,024 B at 1,500 B."""
    assert rdma.roce_mtu(mtu) == data


@pytest.mark.parametrize("key", ["state", "rate", "gids"])
def test_facts_say_what_is_missing(spark: dict[str, Device], key: str) -> None:
    """A named device that is absent, a missing GID and a down port are facts, and never an error."""
    lacking: dict[str, Any] = {key: () if key == "gids" else ""}
    broken = {**spark, "rocep1s0f0": replace(spark["rocep1s0f0"], **lacking)}
    found = rdma.facts_of(broken, ["rocep1s0f0", "mlx5_9"], "192.168.100.10")
    assert found["mlx5_9"].startswith("absent; there is: roceP2p1s0f0")
    assert found["rocep1s0f0 PCIe"].startswith("0000:01:00.0, 32 GT/s x4 = 126.0 Gbit/s")
    assert ("no RoCE v2 GID" in found["GID of the data address"]) == (key == "gids")


def test_facts_of_a_node(spark: dict[str, Device]) -> None:
    """One line each: state, rate, PCIe, interface, GIDs, and the port with both halves."""
    found = rdma.facts_of(spark, ["rocep1s0f0", "roceP2p1s0f0"], "192.168.100.10")
    assert found["rocep1s0f0"] == "ACTIVE, LinkUp, Ethernet, firmware 28.45.4028"
    assert found["rocep1s0f0 interface"] == "enp1s0f0np0 MTU 9000"
    assert found["GID of the data address"].startswith("rocep1s0f0 index 3 192.168.100.10 (RoCE v2,")
    ports = [text for title, text in found.items() if title.startswith("port p0")]
    assert len(ports) == 1
    assert ports[0].endswith("cable 200 Gbit/s, PCIe 252.1 Gbit/s, so 200.0 Gbit/s at most")


def test_facts_say_which_half_is_not_used(spark: dict[str, Device]) -> None:
    """A lab that names one half uses one half."""
    found = rdma.facts_of(spark, ["rocep1s0f0"], "192.168.100.10")
    assert found["port p0 of rocep1s0f0"].endswith("; not named in the lab file: roceP2p1s0f0")


def test_tools_are_asked_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ibstat's words are kept as they are; a tool that is not installed is left out."""
    tool = tmp_path / "ibstat"
    tool.write_text(f'#!/bin/sh\n[ "$1" = roceP2p1s0f0 ] || exit 1\ncat <<EOF\n{IBSTAT}EOF\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    host = testinfra.get_host("local://")
    found = rdma.read_tools(host, ["roceP2p1s0f0"])
    assert found["ibstat roceP2p1s0f0"].startswith("CA 'roceP2p1s0f0'; CA type: MT4129; Number of ports: 1")
    assert "State: Active" in found["ibstat roceP2p1s0f0"]
    assert rdma.node_facts(host, [], "192.168.100.10") == {}

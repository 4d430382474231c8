"""The link between the nodes: what it is made of, and what it carries before any KV cache is on it.

The oracles are the kernel's own files, and tools that know nothing of this suite (iperf3, ib_write_bw). Speed
is recorded and has no expectation, with one exception: a rail that is an order of magnitude below what its
cable and its PCIe link agree on is broken, and every later figure would measure that.
"""

from __future__ import annotations

import pytest

from disagglab.config.schema import Lab, NodeSection
from disagglab.hosts import facts, linkspeed, rdma
from disagglab.hosts.hosts import Hosts
from disagglab.results.recorder import Recorder

DURATION_S = 5  # of one measurement
# A ConnectX-7 of a DGX Spark that came up badly carries 8 to 25 Gbit/s on a rail of about 100, while state,
# rate, PCIe and error counters look as always (NVIDIA/dgx-spark-playbooks, connect-two-sparks).
DEGRADED_SHARE = 0.25


@pytest.fixture(scope="module")
def devices(hosts: Hosts, lab: Lab) -> dict[str, dict[str, rdma.Device]]:
    """RDMA devices of the hosts whose nodes name some, by host and name."""
    return {node.host: rdma.read(hosts.of(node).facts) for node in lab.nodes if node.rdma}


def _rdma_nodes(lab: Lab) -> list[NodeSection]:
    return [node for node in lab.nodes if node.rdma]


@pytest.mark.lab_has("rdma")
def test_rdma_devices_are_active_in_all_halves(devices: dict[str, dict[str, rdma.Device]], lab: Lab) -> None:
    """Every RDMA device that the lab file names is active, and so is the other half of its port.

    A card whose slot is too narrow for its cable has a second PCIe link: two devices, one cable, like two
    doors of one room. One door is enough to look alive, and half of the width is then silently missing. The
    report's facts say whether the lab names one half or both.
    """
    for node in _rdma_nodes(lab):
        for port in rdma.ports_of(devices[node.host], node.rdma):
            down = [str(half) for half in port.halves if not half.active]
            assert not down, f"{node.name}: {', '.join(down)}; port: {port}; look: ibstat, rdma link show"


@pytest.mark.lab_has("rdma")
def test_roce_v2_gid_of_the_data_address_exists(devices: dict[str, dict[str, rdma.Device]], lab: Lab) -> None:
    """One of a node's RDMA devices has a RoCE v2 GID for the node's data address.

    A GID table is a list of the addresses of a network card, each once for every protocol version. Its order
    follows the order in which addresses were set, so the same address is row 3 on one machine and row 5 on
    the next: it is looked up by type and address, as one looks up a name and not a line number.
    """
    for node in _rdma_nodes(lab):
        found = rdma.named(devices[node.host], node.rdma)
        if not any(device.is_roce for device in found):
            pytest.skip(f"NO-ROCE: {node.name} is on InfiniBand, where a peer is found by its LID")
        try:
            device, gid = rdma.roce_v2_gid(found, node.kv_address)
        except LookupError as error:
            pytest.fail(f"{node.name}: {error}; look: ip -brief address, show_gids")
        assert device.active, f"{node.name}: {gid} is on {device}, which carries nothing"


def test_mtu_is_the_same_on_all_nodes(hosts: Hosts, lab: Lab, record: Recorder) -> None:
    """The interfaces of all data addresses, and of all RDMA devices, have one MTU.

    A frame that the receiver's interface does not take is dropped without a word: small requests work, large
    transfers stall. An RDMA packet has 4,096 B of data only where the MTU is 4,192 B or more; at 1,500 B it
    has 1,024 B, four times as many packets.
    """
    found: dict[str, int] = {}
    for node in lab.nodes:
        host = hosts.of(node).facts
        if not host.exists("ip"):
            pytest.skip(f"NO-IPROUTE2: {node.host} has no ip command")
        link = facts.network(host, node.kv_address)
        found[f"{node.name} {link['interface']}"] = int(link["MTU"])
        for device in rdma.named(rdma.read(host), node.rdma) if node.rdma else ():
            found.update({f"{node.name} {netdev.name}": netdev.mtu for netdev in device.netdevs})
    for name, mtu in found.items():
        note = f"RDMA packets of {rdma.roce_mtu(mtu)} B" if any(node.rdma for node in lab.nodes) else ""
        record.numbers("MTU", [mtu], "B", arm=name, what="readings", command="ip address show", note=note)
    assert len(set(found.values())) == 1, f"MTUs differ: {found}; set one: ip link set INTERFACE mtu N"


@pytest.mark.lab_has("rdma")
def test_rate_and_pcie_of_each_port_are_known(
    devices: dict[str, dict[str, rdma.Device]], lab: Lab, record: Recorder
) -> None:
    """Every named port has a rate, and cable and PCIe links together say what it can carry at most.

    A chain is as strong as its weakest link: a cable of 200 Gbit/s behind one PCIe link of 126 Gbit/s carries
    126. Each half reports the rate of the whole cable, so rates of halves are not added; PCIe links are.
    """
    for node in _rdma_nodes(lab):
        for port in rdma.ports_of(devices[node.host], node.rdma):
            used = rdma.Port(port.card, port.name, tuple(h for h in port.halves if h.name in node.rdma))
            arm, note = f"{node.name} {'+'.join(half.name for half in used.halves)}", str(used)
            record.numbers("rate of the cable", [used.rate_gbit_s], "Gbit/s", arm=arm, what="readings")
            if used.pcie_gbit_s is not None:
                record.numbers(
                    "rate of PCIe", [used.pcie_gbit_s], "Gbit/s", arm=arm, what="readings", note=note
                )
            assert used.ceiling_gbit_s > 0, f"{node.name}: {used}; look: ethtool INTERFACE, lspci -vv"


@pytest.mark.lab_has("link")
def test_tcp_speed_between_the_nodes_is_measured(hosts: Hosts, lab: Lab, record: Recorder) -> None:
    """iperf3 moves data from the prefill node's data address to the decode node's; its speed is recorded.

    This is what the kernel's TCP makes of the link, with both CPUs at work: a budget for KV over TCP. RDMA is
    not bound by it.
    """
    prefill, decode = lab.prefill[0], lab.decode[0]
    for node in (prefill, decode):
        if not hosts.of(node).facts.exists("iperf3"):
            pytest.skip(f"NO-IPERF3: {node.host} has no iperf3 (apt-get install iperf3)")
    server = hosts.of(decode)
    speed = linkspeed.measure_iperf3(
        server,
        hosts.of(prefill),
        decode.kv_address,
        server.reserve_port(decode.kv_address),
        DURATION_S,
        client_address=prefill.kv_address,
        server_cpus=decode.cpus,
        client_cpus=prefill.cpus,
    )
    record.numbers(
        "raw TCP speed (iperf3)",
        [value / 8e9 for value in speed.values_bits_per_s],
        "GB/s",
        what="seconds",
        command=speed.command,
        note=f"{speed.bits_per_s / 1e9:.2f} Gbit/s arrived, {speed.retransmits} retransmits",
    )
    assert speed.bits_per_s > 0


@pytest.mark.lab_has("rdma", "rail")
def test_rdma_speed_between_the_nodes_is_measured(
    hosts: Hosts, devices: dict[str, dict[str, rdma.Device]], lab: Lab, record: Recorder
) -> None:
    """ib_write_bw writes from the prefill node's RDMA devices to the decode node's, all rails at once.

    A port can be active, at its full rate, on a full PCIe link, with clean error counters, and carry a tenth
    of it: only moving data shows that. It moves host memory, as KV does with kv_buffer_device = "cpu".
    """
    prefill, decode = lab.prefill[0], lab.decode[0]
    for node in (prefill, decode):
        if not hosts.of(node).facts.exists("ib_write_bw"):
            pytest.skip(f"NO-PERFTEST: {node.host} has no ib_write_bw (apt-get install perftest)")
    servers = rdma.named(devices[decode.host], decode.rdma)
    clients = rdma.named(devices[prefill.host], prefill.rdma)
    rails = linkspeed.rails(servers, decode.kv_address, clients, prefill.kv_address)
    if not rails:
        pytest.skip(
            f"NO-ROCE: no pair of {decode.rdma} and {prefill.rdma} has RoCE v2 addresses on both ends"
        )
    server = hosts.of(decode)
    speed = linkspeed.measure_ib_write_bw(
        server,
        hosts.of(prefill),
        rails,
        decode.kv_address,
        [server.reserve_port(decode.kv_address) for _ in rails],
        DURATION_S,
    )
    record.numbers(
        "raw RDMA speed (ib_write_bw)",
        [speed.bits_per_s / 8e9],
        "GB/s",
        arm="+".join(rail.client_device for rail in rails),
        what=f"runs of {DURATION_S} s",
        command=speed.command,
        note=", ".join(f"{value / 1e9:.1f} Gbit/s" for value in speed.values_bits_per_s),
    )
    used = [half for half in clients if half.name in {rail.client_device for rail in rails}]
    part = {
        half.name: port.ceiling_gbit_s / len(port.halves) for port in rdma.ports(used) for half in port.halves
    }
    for rail, value in zip(rails, speed.values_bits_per_s, strict=True):
        assert value / 1e9 >= DEGRADED_SHARE * part[rail.client_device], (
            f"{rail.client_device} carries {value / 1e9:.1f} Gbit/s, its part of cable and PCIe is"
            f" {part[rail.client_device]:.0f}; restart both hosts with the cable plugged in;"
            " docs/explanation/links.md"
        )

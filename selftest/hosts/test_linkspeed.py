"""Raw link speed: commands, what the tools print, and which figure becomes the budget.

The iperf3 text is what iperf 3.12 printed over the loopback interface of a small machine, shortened to the
keys that are read. The ib_write_bw text is the example of NVIDIA's dgx-spark-playbooks (connect-two-sparks,
performance_benchmarking_guide.md), shortened; none of it was measured by this project.
"""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disagglab.errors import InvalidRun, StartError
from disagglab.hosts import linkspeed
from disagglab.hosts.host import Host, local_host
from disagglab.hosts.linkspeed import LinkBudget, LinkSpeed, Rail
from disagglab.hosts.rdma import Device, Gid, PcieLink

ADDRESS = "127.0.0.1"
PORTS = (23600, 23699)  # not those of a lab, which may be running
needs_iperf3 = pytest.mark.skipif(shutil.which("iperf3") is None, reason="NO-IPERF3: iperf3 is not installed")

# iperf3 -c 127.0.0.1 -B 127.0.0.1 -p 23453 -t 2 -O 1 -P 2 -i 1 -J
IPERF3: dict[str, Any] = {
    "start": {"version": "iperf 3.12"},
    "intervals": [
        {"sum": {"seconds": 1.000609040260315, "bits_per_second": 34037018565.35261, "omitted": True}},
        {"sum": {"seconds": 1.000412940979004, "bits_per_second": 33917913263.69112, "omitted": False}},
        {"sum": {"seconds": 0.9991729855537415, "bits_per_second": 35208843021.8151, "omitted": False}},
    ],
    "end": {
        "sum_sent": {"bytes": 8638955520, "bits_per_second": 34563840891.08673, "retransmits": 0},
        "sum_received": {"bytes": 8632008704, "bits_per_second": 34525721592.6533},
    },
}
# iperf3 -c 127.0.0.1 -p 23452 -t 1 -J, with nobody there; it ended with status 0
REFUSED = """{
	"start":	{
		"connected":	[],
		"version":	"iperf 3.12"
	},
	"intervals":	[],
	"end":	{
	},
	"error":	"unable to connect to server: Connection refused"
}
"""
HEADER = """ WARNING: BW peak won't be measured in this run.
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF            Device         : rocep1s0f0
 Mtu             : 1024[B]
 Link type       : Ethernet
 GID index       : 3
---------------------------------------------------------------------------------------
 local address:  LID 0000 QPN 0x0129 PSN 0x57279d RKey 0x184300 VAddr 0x00ec99bedad000
 GID:            00:00:00:00:00:00:00:00:00:00:255:255:192:168:200:13
---------------------------------------------------------------------------------------
"""
ROWS = """ #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]    MsgRate[Mpps]
 65536      882805           0.00               92.57                0.176554
 65536      882791           0.00               92.56                0.176552
---------------------------------------------------------------------------------------
"""
# In the form of /proc/net/tcp, without its last columns: a listener on port 22, and a connection to it.
TCP_TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   1: 0100007F:0016 0100007F:C350 01 00000000:00000000 02:0006B6CE 00000000     0
"""
# Plays ib_write_bw: a server that listens as it does, a client that prints a result for GID index 3 alone.
# For sh this is a command, for Python a string: a first line cannot name a path with a space.
STANDIN = f"""#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@"
' '''
import socket, sys
options = sys.argv[1:]
port = int(options[options.index("-p") + 1])
if options[-1].count(".") == 3:
    socket.create_connection((options[-1], port)).close()
    sys.stdout.write({HEADER!r} + ({ROWS!r} if options[options.index("-x") + 1] == "3" else ""))
else:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", port))
    server.listen(1)
    server.accept()
"""


@pytest.fixture
def host(tmp_path: Path, state: Path) -> Iterator[Host]:
    """This machine, with ports of its own."""
    logs = tmp_path / "logs"
    logs.mkdir()
    local = local_host("run", PORTS, logs, sys.executable)
    yield local
    local.close()


def device(name: str, gids: tuple[Gid, ...], state: str = "ACTIVE") -> Device:
    """An RDMA device with these GIDs."""
    return Device(name, "card", "1", state, "LinkUp", "200 Gb/sec (4X HDR)", "Ethernet", PcieLink(), (), gids)


def gid(index: int, address: str, kind: str = "RoCE v2") -> Gid:
    """A row of a GID table."""
    return Gid(index, f"::ffff:{address}", kind, "enp1s0f0np0")


def test_iperf3_is_read_by_what_arrived() -> None:
    """The mean is the receiver's; the interval that was left out is no value."""
    found = linkspeed.parse_iperf3(json.dumps(IPERF3, indent="\t"))
    assert found == LinkSpeed("iperf3", 34525721592.6533, (33917913263.69112, 35208843021.8151), 0)


def test_text_around_the_json_is_no_harm() -> None:
    """A warning before it, another tool's line after it."""
    text = f"warning: Ignoring nonsense TCP MSS 0\n{json.dumps(IPERF3)}\niperf3: done\n"
    assert linkspeed.parse_iperf3(text).bits_per_s == pytest.approx(34.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (REFUSED, "unable to connect to server: Connection refused"),
        ("iperf3: command not found", "no JSON: iperf3: command not found"),
        ("", "no JSON: nothing"),
        ('{"start": {', "broken JSON"),
        ('{"intervals": [], "end": {}}', "'sum_received'"),
        (json.dumps({**IPERF3, "intervals": []}), "moved nothing"),
        (json.dumps(IPERF3).replace("34525721592.6533", "0"), "moved nothing: 0 bit/s"),
    ],
)
def test_an_iperf3_that_measured_nothing_is_invalid(text: str, why: str) -> None:
    """Its exit status is 0 in some of these cases, so its words decide."""
    with pytest.raises(InvalidRun, match=why):
        linkspeed.parse_iperf3(text)


def test_iperf3_commands_name_addresses_and_port() -> None:
    """The server takes one client on one address; the client comes from its own data address."""
    assert linkspeed.iperf3_server("10.0.0.2", 5201)[1:7] == ["-s", "-1", "-B", "10.0.0.2", "-p", "5201"]
    client = linkspeed.iperf3_client("10.0.0.2", 5201, 5, "10.0.0.1", streams=4)
    text = " ".join(client)
    assert text == "iperf3 -c 10.0.0.2 -p 5201 -t 5 -O 1 -B 10.0.0.1 -P 4 -i 1 -J"
    assert "-B" not in linkspeed.iperf3_client("10.0.0.2", 5201, 5)


def test_ib_write_bw_is_read_row_by_row() -> None:
    """The fourth column, in Gbit/s; the peak of 0.00 is none."""
    found = linkspeed.parse_ib_write_bw(HEADER + ROWS)
    assert found.tool == "ib_write_bw"
    assert found.values_bits_per_s == pytest.approx((92.57e9, 92.56e9))
    assert found.bits_per_s == pytest.approx(92.565e9)


@pytest.mark.parametrize(
    "text",
    [
        HEADER,  # what a wrong GID index leaves, with exit status 0
        HEADER + ROWS.partition("\n")[0] + "\n",
        HEADER + ROWS.replace("Gb/sec", "MB/sec"),
        HEADER + ROWS.replace("92.57", "0.00"),
        "Couldn't connect to 192.168.200.12:12000",
        "",
    ],
)
def test_an_ib_write_bw_without_a_result_is_invalid(text: str) -> None:
    """A header alone looks like success."""
    with pytest.raises(InvalidRun, match="no result"):
        linkspeed.parse_ib_write_bw(text)


def test_both_ends_of_ib_write_bw_get_the_same_options() -> None:
    """The client's command is the server's with the server's address behind it."""
    server = linkspeed.ib_write_bw("rocep1s0f0", 3, 12000, 5)
    assert " ".join(server) == "ib_write_bw -d rocep1s0f0 -x 3 -p 12000 -q 4 -D 5 -F --report_gbits"
    assert linkspeed.ib_write_bw("rocep1s0f0", 3, 12000, 5, "10.0.0.2") == [*server, "10.0.0.2"]
    assert linkspeed.ib_write_bw("rocep1s0f0", 3, 12000, 5, ipv6=True) == [*server, "--ipv6-addr"]
    client = linkspeed.ib_write_bw("rocep1s0f0", 3, 12000, 5, "fd00::2", ipv6=True)
    assert client == [*server, "--ipv6-addr", "fd00::2"]


def test_rails_are_pairs_with_addresses_on_both_ends() -> None:
    """The data address's GID is preferred; a device that is down, or has no address, makes no rail."""
    servers = [
        device("a0", (gid(2, "10.9.9.9"), gid(3, "10.0.0.2"))),
        device("a1", (gid(5, "10.0.1.2"),)),
        device("a2", (gid(1, "169.254.1.1"),)),
        device("a3", (gid(3, "10.0.3.2"),), state="DOWN"),
    ]
    clients = [
        device(f"b{i}", (gid(7, f"10.0.{i}.1", "IB/RoCE v1"), gid(8, f"10.0.{i}.1"))) for i in range(4)
    ]
    assert linkspeed.rails(servers, "10.0.0.2", clients, "10.0.0.1") == (
        Rail("a0", 3, "b0", 8),
        Rail("a1", 5, "b1", 8),
    )


@pytest.mark.parametrize(("port", "listening"), [(22, True), (50000, False), (2, False)])
def test_a_listening_port_is_seen_in_the_kernels_table(port: int, listening: bool) -> None:
    """Neither the port of a connection nor a part of a number counts."""
    assert linkspeed.listens(TCP_TABLE, port) == listening


def test_the_budget_is_the_fastest_that_was_measured() -> None:
    """A tool can only fall short of a link; the nominal rate stands in only where nothing was measured."""
    measured = [linkspeed.measured(LinkSpeed("iperf3", 40e9, (40e9,))), LinkBudget(11.5e9, "raw NIXL read")]
    assert linkspeed.choose_budget(measured, 200.0) == LinkBudget(11.5e9, "raw NIXL read")
    assert linkspeed.choose_budget(measured[:1], 200.0) == LinkBudget(5e9, "iperf3")
    assert linkspeed.choose_budget([], 100.0) == LinkBudget(12.5e9, "nominal [transport] link_gbit_s")
    assert linkspeed.choose_budget([], None) is None


def test_a_budget_tells_least_time_and_share() -> None:
    """1 GiB over 12.5 GB/s takes 85.9 ms at least; twice that is half of the budget."""
    budget = LinkBudget(12.5e9, "nominal")
    assert budget.least_s(2**30) == pytest.approx(0.0859, abs=1e-4)
    assert budget.share(2**30, 2 * 0.08589934592) == pytest.approx(0.5)


@needs_iperf3
def test_tcp_is_measured_between_two_owned_processes(host: Host) -> None:
    """On a port that the pool holds, which the server shares and nobody else gets; one value a second."""
    port = host.reserve_port(ADDRESS)
    found = linkspeed.measure_iperf3(host, host, ADDRESS, port, 1, client_address=ADDRESS)
    assert found.bits_per_s > 0
    assert len(found.values_bits_per_s) == 1
    assert found.command.startswith(f"iperf3 -c {ADDRESS} -p {port}")
    assert f"Server listening on {port}" in (host.logs / f"iperf3-server-{port}.log").read_text()


@needs_iperf3
def test_a_server_that_cannot_listen_is_a_start_error(host: Host) -> None:
    """An address of nobody's; the message holds the command and the tool's own words."""
    with pytest.raises(
        StartError, match=r"ended before it listened; command: iperf3 -s -1 -B 192\.0\.2\.1.*said: .*"
    ):
        linkspeed.measure_iperf3(host, host, "192.0.2.1", PORTS[0], 1)


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stands in for ib_write_bw, before any real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "ib_write_bw"
    tool.write_text(STANDIN)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.usefixtures("standin")
def test_rails_are_measured_together_and_added(host: Host) -> None:
    """Two rails, two servers, two clients: the speed is the sum, and both commands are told."""
    pairs = [Rail("rocep1s0f0", 3, "rocep1s0f0", 3), Rail("roceP2p1s0f0", 3, "roceP2p1s0f0", 3)]
    ports = [host.reserve_port(ADDRESS) for _ in pairs]
    found = linkspeed.measure_ib_write_bw(host, host, pairs, ADDRESS, ports, 1)
    assert found.values_bits_per_s == pytest.approx((92.565e9, 92.565e9))
    assert found.bits_per_s == pytest.approx(2 * 92.565e9)
    assert f"-d roceP2p1s0f0 -x 3 -p {ports[1]}" in found.command


@pytest.mark.usefixtures("standin")
def test_one_rail_without_a_result_spoils_the_sum(host: Host) -> None:
    """A wrong GID index on one of two rails is no half result."""
    good = Rail("rocep1s0f0", 3, "rocep1s0f0", 3)
    ports = [host.reserve_port(ADDRESS) for _ in range(2)]
    with pytest.raises(InvalidRun, match="no result"):
        linkspeed.measure_ib_write_bw(host, host, [good, replace(good, client_gid=1)], ADDRESS, ports, 1)

"""Raw speed of the link between two nodes, measured by the usual tools: the budget of KV transfers.

Commands and parsers are pure. Data flows as KV does: from the client, on the prefill node, to the server, on
the decode node.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from disagglab import waiting
from disagglab.address import is_ipv6
from disagglab.errors import InvalidRun, StartError
from disagglab.hosts.rdma import Device, roce_v2_addresses

if TYPE_CHECKING:
    from disagglab.hosts.host import Host, HostProcess

STREAMS = 8  # one TCP stream is bound by one core on either side, far below 100 Gbit/s
QUEUE_PAIRS = 4  # one message at a time would measure latency
OMITTED_S = 1  # TCP's slow start
START_LIMIT_S = 30.0  # from the start to the listening socket, on a busy machine
MARGIN_S = 60.0  # beyond the measured time: connecting, memory registration, printing
POLL_S = 0.05
TAIL_LINES = 5
LISTENING = "Server listening"  # in iperf3's output since 3.0
NEVER_LISTENED = "ended before it listened"
TCP_LISTEN = "0A"  # state of a socket in /proc/net/tcp


@dataclass(frozen=True)
class LinkSpeed:
    """What one tool measured. ``values_bits_per_s``: by interval or by pair of devices, as the tool says."""

    tool: str
    bits_per_s: float
    values_bits_per_s: tuple[float, ...]
    retransmits: int | None = None
    command: str = ""


@dataclass(frozen=True)
class LinkBudget:
    """What a link can carry, and who says so."""

    bytes_per_s: float
    source: str

    def least_s(self, count: int) -> float:
        """Seconds that ``count`` bytes take at least."""
        return count / self.bytes_per_s

    def share(self, count: int, seconds: float) -> float:
        """Share of the budget that a transfer of ``count`` bytes reached; above 1 the budget was too low."""
        return self.least_s(count) / seconds


@dataclass(frozen=True)
class Rail:
    """A pair of RDMA devices, one on each node, with the index of the GID that each uses."""

    server_device: str
    server_gid: int
    client_device: str
    client_gid: int


def measured(speed: LinkSpeed) -> LinkBudget:
    """A measured speed as a budget."""
    return LinkBudget(speed.bits_per_s / 8, speed.tool)


def nominal(link_gbit_s: float) -> LinkBudget:
    """The lab file's rate as a budget."""
    return LinkBudget(link_gbit_s * 1e9 / 8, "nominal [transport] link_gbit_s")


def choose_budget(budgets: Sequence[LinkBudget], link_gbit_s: float | None) -> LinkBudget | None:
    """The highest measured budget; without one the nominal rate; None if there is neither.

    A tool can only fall short of what a link carries, so the fastest of them has proved most.
    """
    if budgets:
        return max(budgets, key=lambda budget: budget.bytes_per_s)
    return None if link_gbit_s is None else nominal(link_gbit_s)


def rails(
    servers: Sequence[Device], server_address: str, clients: Sequence[Device], client_address: str
) -> tuple[Rail, ...]:
    """Pairs of active RoCE devices, first with first; one without a RoCE v2 address on both ends is left out.

    The addresses are the nodes' data addresses: their GIDs are preferred to others of the same device.
    """
    found = []
    for server, client in zip(servers, clients, strict=False):
        here, there = _gid(server, server_address), _gid(client, client_address)
        if server.active and client.active and here is not None and there is not None:
            found.append(Rail(server.name, here, client.name, there))
    return tuple(found)


def _gid(device: Device, address: str) -> int | None:
    gids = roce_v2_addresses(device)
    preferred = [gid for gid in gids if gid.address == address] or gids
    return preferred[0].index if preferred else None


def iperf3_server(address: str, port: int) -> list[str]:
    """A server on one address, which ends after one client."""
    return ["iperf3", "-s", "-1", "-B", address, "-p", str(port), "--forceflush"]


def iperf3_client(
    address: str, port: int, duration_s: int, client_address: str = "", streams: int = STREAMS
) -> list[str]:
    """A client that sends for ``duration_s`` after what is left out, and prints JSON.

    ``client_address``: where its connections come from; empty leaves it to the routing table.
    """
    argv = ["iperf3", "-c", address, "-p", str(port), "-t", str(duration_s), "-O", str(OMITTED_S)]
    bind = ["-B", client_address] if client_address else []
    return [*argv, *bind, "-P", str(streams), "-i", "1", "-J"]


def parse_iperf3(text: str) -> LinkSpeed:
    """What ``iperf3 -c … -J`` measured: mean of what arrived, and what was sent in each interval.

    Raises:
        InvalidRun: if it measured nothing. Its exit status does not tell: with -J it is 0 for a refused
            connection too (seen with iperf 3.12).
    """
    start = text.find("{")
    if start < 0:
        raise InvalidRun(f"iperf3 printed no JSON: {_tail(text)}")
    try:
        found: dict[str, Any] = json.JSONDecoder().raw_decode(text[start:])[0]
    except json.JSONDecodeError as error:
        raise InvalidRun(f"iperf3 printed broken JSON ({error}): {_tail(text)}") from error
    if "error" in found:
        raise InvalidRun(f"iperf3: {found['error']}")
    try:
        intervals = [row["sum"] for row in found["intervals"]]
        mean = float(found["end"]["sum_received"]["bits_per_second"])
        values = tuple(float(row["bits_per_second"]) for row in intervals if not row["omitted"])
        retransmits = found["end"]["sum_sent"].get("retransmits")
    except KeyError as error:
        raise InvalidRun(f"iperf3 printed no {error}: {_tail(text)}") from error
    if mean <= 0 or not values:
        raise InvalidRun(f"iperf3 moved nothing: {mean:g} bit/s in {len(values)} intervals")
    return LinkSpeed("iperf3", mean, values, retransmits)


def ib_write_bw(
    device: str, gid: int, port: int, duration_s: int, server: str = "", ipv6: bool = False
) -> list[str]:
    """Server of ib_write_bw, or client of the ``server`` with this address. ``ipv6``: whether that is IPv6.

    Without ``gid`` it would take a GID by its own rule; both ends want the same options. The server's control
    socket listens on all addresses; it has no portable option for one.
    """
    argv = ["ib_write_bw", "-d", device, "-x", str(gid), "-p", str(port), "-q", str(QUEUE_PAIRS)]
    argv += ["-D", str(duration_s), "-F", "--report_gbits"]
    return [*argv, *(["--ipv6-addr"] if ipv6 else []), *([server] if server else [])]


def parse_ib_write_bw(text: str) -> LinkSpeed:
    """What a client of ``ib_write_bw --report_gbits`` measured: mean and values of its result rows.

    Raises:
        InvalidRun: if there is no such row. With a wrong GID index it may print its header, no row, and end
            with status 0.
    """
    _, header, rows = text.partition("BW average[Gb/sec]")
    values = []
    for line in rows.splitlines()[1:] if header else []:
        cells = line.split()
        if len(cells) >= 4 and cells[0].isdigit() and cells[1].isdigit():
            values.append(float(cells[3]) * 1e9)
    if not values or min(values) <= 0:
        raise InvalidRun(f"ib_write_bw printed no result in Gb/sec; last lines: {_tail(text)}")
    return LinkSpeed("ib_write_bw", sum(values) / len(values), tuple(values))


def listens(table: str, port: int) -> bool:
    """Whether a socket of ``/proc/net/tcp`` or ``tcp6`` listens on a port."""
    return bool(re.search(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F:]+ {TCP_LISTEN} ", table, re.MULTILINE))


def measure_iperf3(
    server_host: Host,
    client_host: Host,
    address: str,
    port: int,
    duration_s: int,
    client_address: str = "",
    server_cpus: Sequence[int] = (),
    client_cpus: Sequence[int] = (),
) -> LinkSpeed:
    """Measure TCP from one host to another. ``address`` and ``port`` are the server's; the port is reserved.

    Raises:
        StartError: if the server does not come to listen.
        LabError: if the client does not end.
        InvalidRun: if it measured nothing.
    """
    argv = iperf3_server(address, port)
    server = server_host.start(f"iperf3-server-{port}", argv, {}, server_cpus, [port])
    try:
        _wait_until_it_listens(server, lambda: LISTENING in _said(server))
        argv = iperf3_client(address, port, duration_s, client_address)
        limit_s = duration_s + OMITTED_S + MARGIN_S
        lines = client_host.run(f"iperf3-client-{port}", argv, {}, limit_s, client_cpus)
    finally:
        server.stop()
    found = parse_iperf3("\n".join(lines))
    return LinkSpeed(
        found.tool, found.bits_per_s, found.values_bits_per_s, found.retransmits, shlex.join(argv)
    )


def measure_ib_write_bw(
    server_host: Host,
    client_host: Host,
    pairs: Sequence[Rail],
    address: str,
    ports: Sequence[int],
    duration_s: int,
) -> LinkSpeed:
    """Measure RDMA writes on all rails at once; the speed is their sum, the values are one for each.

    ``address``: the server's, for the tool's control connections; the GIDs decide which way the data goes.
    ``ports``: reserved ports of the server, one for each rail.

    Raises:
        StartError: if a server does not come to listen.
        InvalidRun: if a rail measured nothing.
    """
    processes: list[HostProcess] = []
    clients: list[HostProcess] = []
    try:
        for rail, port in zip(pairs, ports, strict=True):
            argv = ib_write_bw(rail.server_device, rail.server_gid, port, duration_s, ipv6=is_ipv6(address))
            processes.append(server_host.start(f"ib-write-bw-server-{port}", argv, {}, (), [port]))
        for server, port in zip(processes, ports, strict=True):
            # not by its log: it prints through a buffer, which a file sees when it ends
            _wait_until_it_listens(server, functools.partial(_port_listens, server_host, port))
        for rail, port in zip(pairs, ports, strict=True):
            end = (rail.client_device, rail.client_gid, port, duration_s)
            argv = ib_write_bw(*end, address, is_ipv6(address))
            clients.append(client_host.start(f"ib-write-bw-client-{port}", argv, {}))
            processes.append(clients[-1])
        waiting.last_answer(
            lambda: not any(client.alive for client in clients), duration_s + MARGIN_S, POLL_S
        )
    finally:
        for process in reversed(processes):
            process.stop()
    found = [parse_ib_write_bw(_said(client)) for client in clients]
    values = tuple(speed.bits_per_s for speed in found)
    commands = " & ".join(shlex.join(client.argv) for client in clients)
    return LinkSpeed("ib_write_bw", sum(values), values, command=commands)


def _wait_until_it_listens(server: HostProcess, listening: Callable[[], bool]) -> None:
    server.await_that(
        listening,
        START_LIMIT_S,
        lambda alive: StartError(
            f"{server.name} {f'does not listen after {START_LIMIT_S:g} s' if alive else NEVER_LISTENED};"
            f" command: {shlex.join(server.argv)}; it said: {_tail(_said(server))}"
        ),
        POLL_S,
    )


def _port_listens(host: Host, port: int) -> bool:
    tables = [path for path in ("/proc/net/tcp", "/proc/net/tcp6") if host.exists(path)]
    return any(listens(host.read_text(table), port) for table in tables)


def _said(process: HostProcess) -> str:
    return process.log.read_text(errors="replace") if process.log.exists() else ""


def _tail(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines()[-TAIL_LINES:]) or "nothing"

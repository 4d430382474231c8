"""Network namespaces: made with real ones where the user may, and gone with their holder."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagglab import netns
from disagglab.errors import StartError
from disagglab.host import LocalHost
from disagglab.lab import load_lab
from disagglab.port import holds, listening_sockets
from disagglab.section import NodeSection

MAY = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode == 0
needs_namespaces = pytest.mark.skipif(not MAY, reason="NAMESPACES: this user may not make network namespaces")
# Not those of the lab, which may be running.
NODES = tuple(
    NodeSection(
        name=name,
        address=f"198.18.{third}.2",
        data_address=f"198.18.109.{third - 100}",
        interface="data0",
        namespace=True,
        role=role,  # type: ignore[arg-type]
        cpus=[0],
    )
    for name, role, third in (("a", "prefill", 101), ("b", "decode", 102))
)


@pytest.fixture
def host(tmp_path: Path, state: Path) -> Iterator[LocalHost]:
    """A host with two nodes in namespaces."""
    made = LocalHost("selftest", load_lab("namespaces"), tmp_path)
    try:
        made.make_network(NODES)
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("address", "peer"),
    [("198.18.1.2", "198.18.1.1"), ("198.18.1.1", "198.18.1.2"), ("10.0.0.6", "10.0.0.5")],
)
def test_the_control_links_other_end(address: str, peer: str) -> None:
    """A /30 has two usable addresses; this machine takes the one that the node does not have."""
    assert netns.control_peer(NODES[0].model_copy(update={"address": address})) == peer


@pytest.mark.parametrize("address", ["198.18.1.0", "198.18.1.3"])
def test_addresses_that_no_host_can_have(address: str) -> None:
    """Network and broadcast address of the /30 are refused."""
    with pytest.raises(ValueError, match="not a usable address"):
        netns.control_peer(NODES[0].model_copy(update={"address": address}))


@needs_namespaces
def test_programs_run_where_the_address_is(host: LocalHost) -> None:
    """Each node has its two interfaces and addresses, and reaches the other over the data link alone."""
    for node in NODES:
        lines = host.run(f"show-{node.name}", ["ip", "-brief", "address"], {}, 10.0, node.address)
        shown = "\n".join(lines)
        assert f"{node.address}/30" in shown
        assert f"{node.data_address}/24" in shown
    route = host.run("route", ["ip", "route", "get", str(NODES[1].data_address)], {}, 10.0, NODES[0].address)
    assert "dev data0" in route[0]
    (sysfs,) = host.run("sys", ["ls", "-m", "/sys/class/net"], {}, 10.0, NODES[0].address)
    assert "data0" in sysfs, "UCX looks for interfaces there"


@needs_namespaces
def test_ports_are_reserved_inside(host: LocalHost) -> None:
    """A port of a node's address is taken in its namespace; this machine's own stays free."""
    port = host.reserve_port(NODES[0].address)
    assert host.reserve_port(NODES[0].address) == port + 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))


@needs_namespaces
def test_who_listens_is_seen_from_outside(host: LocalHost) -> None:
    """A socket that listens in a node's namespace is found there, and not in this machine's own."""
    pid = host.namespace_pid(NODES[0])
    assert pid is not None
    namespace = host.namespace_of(NODES[0].address)
    assert namespace is not None
    with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind((NODES[0].address, 0))
        server.listen()
        port = server.getsockname()[1]
        there = listening_sockets(pid, port)
        assert len(there) == 1
        assert holds(os.getpid(), there)
        assert not holds(pid, there)
        assert not listening_sockets(os.getpid(), port)


@needs_namespaces
def test_nothing_is_left(tmp_path: Path, state: Path) -> None:
    """After close there is no interface of ours in this machine, and no process."""
    made = LocalHost("selftest", load_lab("namespaces"), tmp_path)
    made.make_network(NODES)
    made.reserve_port(NODES[0].address)
    pids = [made.namespace_pid(node) for node in NODES]
    ours = [f"dl{pid}" for pid in pids]
    assert all(name in os.listdir("/sys/class/net") for name in ours)
    made.close()
    assert not [name for name in ours if name in os.listdir("/sys/class/net")]
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@needs_namespaces
def test_a_killed_holder_takes_its_network_along(host: LocalHost, tmp_path: Path) -> None:
    """SIGKILL of the process that holds a namespace removes its interfaces from this machine."""
    pid = host.namespace_pid(NODES[0])
    assert pid is not None
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    watch = ["timeout", "10", "sh", "-c", f"while [ -e /sys/class/net/dl{pid} ]; do sleep 0.05; done"]
    assert subprocess.run(watch).returncode == 0


def test_without_the_right_the_error_says_so(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that ends at once is an error with its last words and the mend."""
    monkeypatch.setattr(netns, "HOLD", ["sh", "-c", "echo unshare: Operation not permitted; exit 1"])
    made = LocalHost("selftest", load_lab("namespaces"), tmp_path)
    try:
        with pytest.raises(StartError, match=r"Operation not permitted.*run as root"):
            made.make_network(NODES)
    finally:
        made.close()

"""Made hosts: each a machine to itself, reached as any other, gone with the process that holds it.

Made for real where this user may. Oracles: what programs inside of them print, and psutil, sockets and
/sys/class/net outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from disagglab.agent import leftovers
from disagglab.config.madehosts import control_peer
from disagglab.config.schema import HostSection, NodeSection
from disagglab.errors import StartError
from disagglab.hosts import namespaces
from disagglab.hosts.host import Host, HostProcess, local_host
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Connection, target

if TYPE_CHECKING:
    from selftest.conftest import Standins

makes_hosts = pytest.mark.usefixtures("may_make_hosts")
TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
GREET = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("listening", flush=True)
    peer, address = server.accept()
    peer.sendall(address[0].encode())
"""
ASK = """
import socket, sys
print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).recv(99).decode())
"""
# sshd gives the account's home, whatever HOME is here
STATE_THERE = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local" / "state" / "disagglab"
PORTS = (20600, 20699)  # of no lab
CORE = min(os.sched_getaffinity(0))
ROLES = ("prefill", "decode")


def node_of(number: int) -> NodeSection:
    """A node whose control network no lab and no other test session uses: numbered by our pid."""
    network = 4 * os.getpid() % 16380 + number
    return NodeSection(
        name=f"n{number}",
        host=f"selftest-{os.getpid()}-{number}",
        address=f"198.19.{network // 64}.{network % 64 * 4 + 2}",
        data_address=f"198.18.109.{number + 1}",
        interface="data0",
        role=ROLES[number % 2],
        cpus=[CORE],
    )


NODES = (node_of(0), node_of(1))


class Pair:
    """Two made hosts. ``holders``: the processes that hold them; ``remote``: the hosts, connected."""

    def __init__(self, logs: Path) -> None:
        self.local: Host = local_host("selftest", PORTS, logs, "")
        self.holders: list[HostProcess] = []
        self.remote: list[RemoteHost] = []
        self.names: list[str] = []
        stock = self.local.start

        def start(name: str, *rest: Any, **options: Any) -> HostProcess:
            process = stock(name, *rest, **options)
            if name.startswith("made-host-") and not name.endswith("-addresses"):
                self.holders.append(process)
            return process

        self.local.start = start  # type: ignore[method-assign]
        self._logs = logs

    def make(self) -> Pair:
        """Make them, and connect."""
        sections = [HostSection(name=node.host, namespace=True, cpus=[CORE]) for node in NODES]
        namespaces.require_programs()
        found, self.names = namespaces.make(self.local, sections, {node.host: node for node in NODES})
        self.sections = list(found.values())
        for section in self.sections:
            self.remote.append(
                RemoteHost(section, Connection(target(section)), "selftest", PORTS, self._logs)
            )
        return self

    def inside(self, number: int) -> list[psutil.Process]:
        """Every process of a host, as seen from outside."""
        return psutil.Process(self.holders[number].pid).children(recursive=True)

    def interface(self, number: int) -> Path:
        """This machine's end of a host's control link."""
        return Path(f"/sys/class/net/dl{self.holders[number].pid}")

    def close(self) -> None:
        """End both."""
        for host in self.remote:
            host.disconnect()
        self.local.call("close", self.names)


def has(process: psutil.Process, argv: list[str]) -> bool:
    """Whether a process runs this very command; one that is just gone does not."""
    try:
        return process.cmdline() == argv
    except psutil.Error:
        return False


def traces(pair: Pair) -> list[Path]:
    """What hosts that were killed leave to their next session: state, leases, scratch folders."""
    found = [Path(holder.scratch) for holder in pair.holders]
    for node in NODES:
        state = STATE_THERE / node.host
        found += [Path(json.loads(path.read_text())["scratch"]) for path in state.glob("leases/*.json")]
        found.append(state)
    return found


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Pair]:
    """Two hosts, and no trace of them afterwards; their state lies in the account's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISAGGLAB_STATE", str(folder / "state"))
        made = Pair(folder)
        try:
            yield made.make()
        finally:
            made.close()
            patch.delenv("DISAGGLAB_STATE")
            for left in traces(made):
                shutil.rmtree(left, ignore_errors=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, may_make_hosts: None) -> Iterator[Pair]:
    """Two hosts for all tests; the last one ends them."""
    with making(tmp_path_factory.mktemp("made")) as made:
        yield made


@pytest.mark.parametrize(
    ("address", "peer"),
    [("198.18.1.2", "198.18.1.1"), ("198.18.1.1", "198.18.1.2"), ("10.0.0.6", "10.0.0.5")],
)
def test_the_control_links_other_end(address: str, peer: str) -> None:
    """A /30 has two usable addresses; this machine takes the one that the node does not have."""
    assert control_peer(NODES[0].model_copy(update={"address": address})) == peer


@pytest.mark.parametrize("address", ["198.18.1.0", "198.18.1.3"])
def test_addresses_that_no_host_can_have(address: str) -> None:
    """Network and broadcast address of the /30 are refused."""
    with pytest.raises(ValueError, match="not a usable address"):
        control_peer(NODES[0].model_copy(update={"address": address}))


@makes_hosts
def test_each_host_has_a_name_and_addresses_of_its_own(pair: Pair) -> None:
    """Name, control and data address, and interfaces in /sys, where UCX looks for them; nothing else's."""
    for node, host in zip(NODES, pair.remote, strict=True):
        assert host.about["hostname"] == node.host
        assert host.facts.check_output("uname -n") == node.host
        rows = json.loads(host.facts.check_output("ip -json address show"))
        shown = {row["ifname"]: [f"{a['local']}/{a['prefixlen']}" for a in row["addr_info"]] for row in rows}
        assert shown["data0"][0] == f"{node.data_address}/24"
        assert shown["control0"][0] == f"{node.address}/30"
        assert (
            set(host.facts.check_output("ls /sys/class/net").split())
            == set(shown)
            == {"lo", "control0", "data0"}
        )
    assert os.uname().nodename not in {node.host for node in NODES}


@makes_hosts
def test_each_host_shows_its_own_processes_alone(pair: Pair, standins: Standins) -> None:
    """Neither ours nor the other host's; a process has another pid inside than outside."""
    standins.start(["sleep", "7531"])
    here = [host.start(f"sleeper-{i}", ["sleep", str(7541 + i)], {}) for i, host in enumerate(pair.remote)]
    for number, host in enumerate(pair.remote):
        shown = host.facts.check_output("ps -e -o pid=,args=").splitlines()
        sleepers = [line.split() for line in shown if "sleep 75" in line and "supervisor" not in line]
        assert sleepers == [[str(here[number].pid), "sleep", str(7541 + number)]]
        assert not [line for line in shown if "pytest" in line]
        outside = [p.pid for p in pair.inside(number) if has(p, ["sleep", str(7541 + number)])]
        assert len(outside) == 1
        assert outside != [here[number].pid]
    for process in here:
        process.stop()


@makes_hosts
def test_shared_memory_does_not_join_hosts(pair: Pair, shared_file: Path) -> None:
    """A file in /dev/shm of one host is not there on the other, nor here, and the other way round."""
    shared_file.write_text("ours")
    first, second = pair.remote
    name = f"/dev/shm/{shared_file.name}"
    assert [first.exists(name), second.exists(name)] == [False, False]
    first.write_text(name, "theirs")
    assert first.exists(name)
    assert not second.exists(name)
    assert shared_file.read_text() == "ours"


@makes_hosts
def test_ports_are_reserved_inside(pair: Pair) -> None:
    """A port of a host is taken there; the same number is free on the other host and on this machine."""
    first, second = pair.remote
    port = first.reserve_port(NODES[0].address)
    assert first.reserve_port(NODES[0].address) == port + 1
    assert second.reserve_port(NODES[1].address) == port
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
    taken = ["python3", "-c", f"import socket; socket.socket().bind(('{NODES[0].address}', {port}))"]
    assert "in use" in first.facts.run(" ".join(["%s"] * 3), *taken).stderr


@makes_hosts
def test_the_data_link_joins_the_two(pair: Pair, standins: Standins) -> None:
    """A connection to the other's data address comes from the own one, over data0."""
    server, client = pair.remote
    argv = ["python3", "-c", GREET, str(NODES[0].data_address), "20601"]
    greeter = server.start("greeter", argv, {})
    standins.until(lambda: greeter.lines_so_far() == ["listening"], "it listens")
    assert client.run("ask", ["python3", "-c", ASK, str(NODES[0].data_address), "20601"], {}, 20.0) == [
        NODES[1].data_address
    ]
    assert "dev data0" in client.facts.check_output("ip route get %s", NODES[0].data_address)
    assert "data0" not in os.listdir("/sys/class/net")
    assert client.facts.run("ping -c 1 -W 1 %s", NODES[0].address).rc != 0, "control links join nobody but us"
    greeter.stop()


@makes_hosts
def test_a_host_is_on_its_cores(pair: Pair) -> None:
    """Whatever runs there runs on them, bound by nothing else."""
    for host in pair.remote:
        assert host.about["cores"] == [CORE]


@makes_hosts
def test_only_the_hosts_own_key_is_let_in(pair: Pair, tmp_path: Path) -> None:
    """Keys are made anew for each host: the other's opens nothing, and no file of the account does."""
    first, second = pair.sections
    with pytest.raises(StartError, match="does not let us in"):
        Connection(target(first.model_copy(update={"key_file": second.key_file})))
    with pytest.raises(StartError, match="host key is not known"):
        Connection(target(first.model_copy(update={"known_hosts": second.known_hosts})))
    assert os.stat(str(first.key_file)).st_mode & 0o077 == 0


def no_root(patch: pytest.MonkeyPatch) -> None:
    """As any user."""
    patch.setattr(os, "geteuid", lambda: 1000)


def no_sshd(patch: pytest.MonkeyPatch) -> None:
    """As on a machine without OpenSSH's server."""
    stock = shutil.which
    patch.setattr(shutil, "which", lambda name, path=None: None if name == "sshd" else stock(name, path=path))


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (no_root, r"need root: run as root, or use another lab"),
        (no_sshd, r"need openssh-server: apt-get install openssh-server"),
    ],
)
def test_what_is_lacking_is_said_before_anything_starts(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: Callable[..., None], message: str
) -> None:
    """Root, or a program: the message has the mend, and there is no process."""
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    lacking(monkeypatch)
    with pytest.raises(StartError, match=message):
        Pair(tmp_path).make()
    assert list(tmp_path.glob("*.log")) == []
    assert list(leftovers.folder().iterdir()) == []


def test_a_holder_that_cannot_be_shows_its_last_words(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container without the right, say: what unshare said, and where the log is."""
    monkeypatch.setattr(namespaces, "require_programs", lambda: None)
    monkeypatch.setattr(namespaces, "UNSHARE", ("sh", "-c", "echo unshare: Operation not permitted; exit 1"))
    made = Pair(tmp_path)
    with pytest.raises(StartError, match=r"network namespace.*Operation not permitted.*log: ") as caught:
        made.make()
    made.close()
    assert str(tmp_path) in str(caught.value)


@makes_hosts
def test_a_killed_holder_takes_its_host_along(pair: Pair, standins: Standins) -> None:
    """SIGKILL of it, or of its supervisor: processes and interfaces go; others stay.

    The last test of the pair, because it ends both.
    """
    bystander = standins.start(TREE)
    standins.told("grandchild")
    for host in pair.remote:
        host.start(f"standin-{host.name}", TREE, {})
    inside = [pair.inside(number) for number in (0, 1)]
    assert all(any(has(process, TREE) for process in tree) for tree in inside)
    assert pair.interface(0).exists()

    os.kill(pair.holders[0].pid, 9)

    standins.until(lambda: standins.gone(*inside[0]), "every process of the host has ended")
    standins.until(lambda: not pair.interface(0).exists(), "its interface is gone")
    assert not standins.gone(*inside[1][:2])
    assert pair.interface(1).exists()
    with pytest.raises(StartError, match="the connection is lost"):
        standins.until(lambda: not pair.remote[0].exists("/"), "the connection ends")
    assert pair.remote[1].exists("/")

    supervisor = psutil.Process(pair.holders[1].pid).parent()
    assert supervisor is not None
    supervisor.kill()

    standins.until(lambda: standins.gone(*inside[1]), "every process of the other host has ended")
    standins.until(lambda: not pair.interface(1).exists(), "its interface is gone, too")
    assert bystander.cmdline() == TREE

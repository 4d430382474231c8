"""A port of the pool belongs to the server it was handed out for, from reservation to the end of the session.

Oracle: the kernel, asked with plain sockets that know nothing of the pool. A server that the lab starts sets
SO_REUSEADDR, as uvicorn does; a stranger is one that does not, or one that lets the kernel choose.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagglab.agent.port import PortPool, accepts
from disagglab.errors import StartError

ADDRESS = "127.0.0.1"
# Below the ports that the kernel chooses from, above those of the shipped labs, and most likely not the ones
# that another run of these selftests uses at the same time.
FIRST = 22000 + os.getpid() % 100 * 100
RANGE = (FIRST, FIRST + 99)
IP_LOCAL_PORT_RANGE = 51  # of IPPROTO_IP, since Linux 6.3; narrows what bind(0) may choose for one socket

Make = Callable[..., PortPool]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes pools and closes them after the test."""
    pools: list[PortPool] = []

    def pool(first: int = RANGE[0], last: int = RANGE[1], address: str = ADDRESS) -> PortPool:
        pools.append(PortPool(address, first, last))
        return pools[-1]

    yield pool
    for each in pools:
        each.close()


def kernel_range() -> tuple[int, int]:
    """First and last port that the kernel chooses from."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)


def drawing(first: int, last: int, reuse: int) -> socket.socket:
    """A socket on a port of the kernel's choice, from ``first`` to ``last`` if it can be told."""
    stranger = socket.socket()
    try:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        with contextlib.suppress(OSError):
            stranger.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", last << 16 | first))
        stranger.bind((ADDRESS, 0))
    except OSError:
        stranger.close()
        raise
    return stranger


def test_two_pools_never_hand_out_the_same_port(make: Make) -> None:
    """Two sessions on one machine with the same lab file get along."""
    one, other = make(), make()
    ports = [pool.reserve() for _ in range(20) for pool in (one, other)]
    assert len(set(ports)) == len(ports)
    assert all(RANGE[0] <= port <= RANGE[1] for port in ports)


@pytest.mark.parametrize("address", [ADDRESS, "0.0.0.0"])
def test_a_plain_bind_on_a_reserved_port_is_refused(make: Make, address: str) -> None:
    """A stranger cannot take the port while the server it is meant for still starts."""
    port = make().reserve()
    with socket.socket() as stranger:
        with pytest.raises(OSError, match="in use") as caught:
            stranger.bind((address, port))
        assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("address", [ADDRESS, "0.0.0.0"])
def test_the_server_may_listen_on_its_reserved_port(make: Make, address: str) -> None:
    """SO_REUSEADDR lets the server in beside the holder; only then does a client get a connection."""
    pool = make()
    port, silent = pool.reserve(), pool.reserve()
    assert not accepts(ADDRESS, port), "a reserved port must not look like a server"
    assert pool.listening() == []

    with socket.create_server((address, port)) as server:  # it sets SO_REUSEADDR
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        with socket.create_connection((ADDRESS, port), timeout=5) as client, server.accept()[0] as connection:
            connection.sendall(b"hello")
            assert client.recv(5) == b"hello"
        assert accepts(ADDRESS, port)
        assert pool.listening() == [port]
        with pytest.raises(OSError, match="in use"):
            socket.create_server((ADDRESS, port))

    assert pool.listening() == []
    assert not accepts(ADDRESS, silent)


def test_a_server_may_start_again_on_its_port(make: Make) -> None:
    """A restarted server gets the port it had, though connections of the first one linger in the kernel."""
    port = make().reserve()
    for _ in range(2):
        with (
            socket.create_server((ADDRESS, port)) as server,
            socket.create_connection((ADDRESS, port), timeout=5),
        ):
            server.accept()[0].close()  # closed on this side first: TIME_WAIT stays on this port


@pytest.mark.parametrize("reuse", [0, 1])
def test_the_kernel_never_chooses_a_reserved_port(make: Make, reuse: int) -> None:
    """bind(0) until nothing is left draws every free port of a narrow range, and no reserved one.

    Before Linux 6.3 the draws come from the kernel's whole range; the claim is the same, the evidence weaker.
    """
    first = sum(kernel_range()) // 2
    last = first + 99
    pool = make(first, last)
    reserved = {pool.reserve() for _ in range(50)}
    drawn: list[int] = []
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # the range is used up
        for _ in range(2 * 100):
            drawn.append(stack.enter_context(drawing(first, last, reuse)).getsockname()[1])
    assert drawn, "nothing was drawn: the test shows nothing"
    assert reserved.isdisjoint(drawn)


def test_an_exhausted_range_names_the_key_of_the_lab_file(make: Make) -> None:
    """The message holds the range, what to change, and how to see who has the ports."""
    port = make().reserve()
    with pytest.raises(StartError, match=rf"between {port} and {port} .*\[ports\] in the lab file.*ss -tlnp"):
        make(port, port).reserve()


def test_an_address_that_is_not_local_names_the_lab_file(make: Make) -> None:
    """192.0.2.0/24 is reserved for documentation, so no machine has it."""
    with pytest.raises(StartError, match=r"cannot bind 192\.0\.2\.1:\d+: .*address in the lab file"):
        make(address="192.0.2.1").reserve()


def test_close_gives_the_ports_back(make: Make) -> None:
    """The next session gets the same ports; a second close does no harm."""
    pool = make()
    ports = [pool.reserve(), pool.reserve()]
    pool.close()
    pool.close()
    assert pool.listening() == []
    for port in ports:
        with socket.socket() as stranger:
            stranger.bind((ADDRESS, port))
        assert make(port, port).reserve() == port


def test_a_port_that_is_given_back_comes_first(make: Make) -> None:
    """The lowest of those given back, before any new one; each is handed out once."""
    pool = make()
    first, second, third = (pool.reserve() for _ in range(3))
    pool.give_back(second)
    pool.give_back(first)
    assert [pool.reserve(), pool.reserve()] == [first, second]
    assert pool.reserve() not in (first, second, third)


def test_a_range_is_not_used_up_by_starts_that_ended(make: Make) -> None:
    """Negative control: without giving back, the third start of a range of two finds none."""
    port = make().reserve()
    pool = make(port + 50, port + 51)
    for _ in range(5):
        pool.give_back(pool.reserve())
    pool.reserve()
    pool.reserve()
    with pytest.raises(StartError, match="no free port left"):
        pool.reserve()


def test_a_port_that_is_given_back_stays_ours(make: Make) -> None:
    """No stranger, and no other session, gets it while it waits for its next server."""
    pool = make()
    port = pool.reserve()
    pool.give_back(port)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind((ADDRESS, port))
    assert make().reserve() != port


def test_a_port_on_which_somebody_still_listens_is_not_handed_out(make: Make) -> None:
    """A server that was ended too late keeps it; when it is gone, the port comes again."""
    pool = make()
    port = pool.reserve()
    with socket.create_server((ADDRESS, port)):
        pool.give_back(port)
        assert pool.reserve() != port
    assert pool.reserve() == port


def test_what_is_not_reserved_cannot_be_given_back(make: Make) -> None:
    """Neither a port that was never reserved, nor one that was given back already."""
    pool = make()
    port = pool.reserve()
    with pytest.raises(ValueError, match=f"port {port + 1} of {ADDRESS} is not reserved"):
        pool.give_back(port + 1)
    pool.give_back(port)
    with pytest.raises(ValueError, match=f"port {port} of {ADDRESS} is not reserved"):
        pool.give_back(port)


def test_a_closed_pool_hands_out_nothing_that_it_no_longer_holds(make: Make) -> None:
    pool = make()
    port = pool.reserve()
    pool.give_back(port)
    pool.close()
    with socket.socket() as stranger:
        stranger.bind((ADDRESS, port))
        assert pool.reserve() != port

"""TCP ports that nobody else can take between their allocation and the moment a server listens on them.

A vLLM server binds its port some 20 s after it was started. Until then, and until the end of the session, the
port is held by a socket that is bound and never listens. It was bound without SO_REUSEADDR, so nobody else
used the port; SO_REUSEADDR is set on it afterwards, so a server that sets it too (uvicorn, Rust's standard
library and ZeroMQ do) may bind and listen, while a plain bind by another program, and the kernel's own choice
of a port, are refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

from disagglab.address import family, joined
from disagglab.errors import StartError

ACCEPT_TIMEOUT_S = 1.0


class PortPool:
    """Hands out ports of one host from a fixed range, lowest free one first.

    Args:
        address: the address that servers will listen on.
        first: first port of the range.
        last: last port of the range, included.
        make: makes a socket; another network namespace's if need be.
    """

    def __init__(
        self, address: str, first: int, last: int, make: Callable[..., socket.socket] = socket.socket
    ) -> None:
        self._make = make
        self.address = address
        self.first = first
        self.last = last
        self._next = first
        self._held: dict[int, socket.socket] = {}
        self._returned: list[int] = []

    def reserve(self) -> int:
        """Reserve one port, for the life of the pool or until it is given back. One that was given back
        comes first.

        Raises:
            StartError: if every port of the range is taken.
        """
        for port in sorted(self._returned):
            if not accepts(self.address, port, self._make):
                self._returned.remove(port)
                return port
        for port in range(self._next, self.last + 1):
            holder = self._make(family(self.address), socket.SOCK_STREAM)
            try:
                holder.bind((self.address, port))
            except OSError as error:
                holder.close()
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise StartError(
                    f"cannot bind {joined(self.address, port)}: {error.strerror}; the node's address"
                    f" in the lab file must be one of this host's own (ip -brief address)"
                ) from error
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held[port] = holder
            self._next = port + 1
            return port
        raise StartError(
            f"no free port left between {self.first} and {self.last} on {self.address};"
            f" widen [ports] in the lab file, or see who listens: ss -tlnp"
        )

    def give_back(self, port: int) -> None:
        """Let :meth:`reserve` hand a port out again; meanwhile it stays ours.

        Raises:
            ValueError: if it is not reserved.
        """
        if port not in self._held or port in self._returned:
            raise ValueError(f"port {port} of {self.address} is not reserved")
        self._returned.append(port)

    def listening(self) -> list[int]:
        """Ports of this pool that somebody listens on now."""
        return [port for port in self._held if accepts(self.address, port, self._make)]

    def close(self) -> None:
        """Give every port back."""
        self._returned.clear()
        while self._held:
            self._held.popitem()[1].close()


def accepts(address: str, port: int, make: Callable[..., socket.socket] = socket.socket) -> bool:
    """Whether a TCP connection to ``address``, ``port`` is accepted. ``make``: makes the socket that asks."""
    with make(family(address), socket.SOCK_STREAM) as probe:
        probe.settimeout(ACCEPT_TIMEOUT_S)
        return probe.connect_ex((address, port)) == 0


LISTENING = "0A"  # TCP_LISTEN, include/net/tcp_states.h


def listening_sockets(pid: int, port: int) -> frozenset[str]:
    """Inodes of the sockets that listen on ``port`` in the network that process ``pid`` is in."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *rest = row.split()
            if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                found.add(rest[5])
    return frozenset(found)


def holds(pid: int, inodes: frozenset[str]) -> bool:
    """Whether a process has one of these sockets open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(descriptor) in wanted:
                return True
    return False

"""TCP ports that nobody else can take between their allocation and the moment a server listens on them.

A vLLM server binds its port some 20 s after it was started. Until then, and until the end of the session, the
port is held by a socket that is bound and never listens. It was bound without SO_REUSEADDR, so nobody else
used the port; SO_REUSEADDR is set on it afterwards, so a server that sets it too (uvicorn, Rust's standard
library and ZeroMQ do) may bind and listen, while a plain bind by another program, and the kernel's own choice
of a port, are refused.
"""

from __future__ import annotations

import errno
import socket

from disagglab.errors import StartError


class PortPool:
    """Hands out ports of one host from a fixed range, lowest free one first.

    Args:
        address: the address that servers will listen on.
        first: first port of the range.
        last: last port of the range, included.
    """

    def __init__(self, address: str, first: int, last: int) -> None:
        self.address = address
        self.first = first
        self.last = last
        self._next = first
        self._held: dict[int, socket.socket] = {}

    def reserve(self) -> int:
        """Reserve one port for the life of the pool.

        Raises:
            StartError: if every port of the range is taken.
        """
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        for port in range(self._next, self.last + 1):
            holder = socket.socket(family, socket.SOCK_STREAM)
            try:
                holder.bind((self.address, port))
            except OSError as error:
                holder.close()
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise StartError(
                    f"cannot bind {self.address}:{port}: {error.strerror}; the node's address in the lab file"
                    f" must be one of this host's own (ip -brief address)"
                ) from error
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held[port] = holder
            self._next = port + 1
            return port
        raise StartError(
            f"no free port left between {self.first} and {self.last} on {self.address};"
            f" widen [ports] in the lab file, or see who listens: ss -tlnp"
        )

    def listening(self) -> list[int]:
        """Ports of this pool that somebody listens on now."""
        return [port for port in self._held if accepts(self.address, port)]

    def close(self) -> None:
        """Give every port back."""
        while self._held:
            self._held.popitem()[1].close()


def accepts(address: str, port: int, timeout_s: float = 1.0) -> bool:
    """Whether a TCP connection to ``address:port`` is accepted."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s):
            return True
    except OSError:
        return False

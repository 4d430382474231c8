"""A negative control for gates: a TCP proxy that stretches the time of every answer by a known factor.

Run as a program: ``python slowproxy.py ADDRESS PORT UPSTREAM_ADDRESS UPSTREAM_PORT FACTOR``. What comes back
from upstream t seconds after the last byte of a request is handed on FACTOR x t seconds after it,
in order and unchanged: TTFT, gaps and end-to-end time all grow by the same share, and nothing else does.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

CHUNK = 65536  # bytes read at once


class _Stretched:
    """One connection: requests pass at once, answers wait until their time has come."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._asked = 0.0
        self._answers: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def requests(self, client: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> None:
        """Client to upstream; the clock of an answer starts with the last byte of its request."""
        while data := await client.read(CHUNK):
            self._asked = asyncio.get_running_loop().time()
            upstream.write(data)
            await upstream.drain()
        upstream.write_eof()

    async def arrivals(self, upstream: asyncio.StreamReader) -> None:
        """Stamp every piece of an answer with the time at which it is due."""
        while True:
            data = await upstream.read(CHUNK)
            now = asyncio.get_running_loop().time()
            await self._answers.put((self._asked + self._factor * (now - self._asked), data))
            if not data:
                return

    async def departures(self, client: asyncio.StreamWriter) -> None:
        """Upstream to client, each piece at its time."""
        while True:
            due, data = await self._answers.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            if not data:
                return
            client.write(data)
            await client.drain()


async def serve(address: str, port: int, upstream: tuple[str, int], factor: float) -> None:
    """Listen until cancelled."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            back, forth = await asyncio.open_connection(*upstream)
            stretched = _Stretched(factor)
            requests = asyncio.create_task(stretched.requests(reader, forth))
            arrivals = asyncio.create_task(stretched.arrivals(back))
            await stretched.departures(writer)
            for task in (requests, arrivals):
                task.cancel()
            await asyncio.gather(requests, arrivals, return_exceptions=True)
            forth.close()
        writer.close()

    server = await asyncio.start_server(relay, address, port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    own_address, own_port, their_address, their_port, by = sys.argv[1:]
    asyncio.run(serve(own_address, int(own_port), (their_address, int(their_port)), float(by)))

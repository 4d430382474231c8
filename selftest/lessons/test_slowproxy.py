"""The proxy that slows an arm down: it changes the time of what passes, and nothing else."""

from __future__ import annotations

import asyncio

from tests.disagg import slowproxy

FACTOR = 3.0
GAPS_S = (0.1, 0.05, 0.05)


async def through_proxy() -> tuple[list[float], bytes, bytes]:
    """One request through a proxy to a server that answers in pieces: arrival times, answer, request."""
    loop = asyncio.get_running_loop()
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(100))
        for number, gap in enumerate(GAPS_S):
            await asyncio.sleep(gap)
            writer.write(b"piece %d;" % number)
            await writer.drain()
        writer.close()

    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    free = await asyncio.start_server(answer, "127.0.0.1", 0)
    own = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    proxy = asyncio.create_task(slowproxy.serve("127.0.0.1", own, ("127.0.0.1", port), FACTOR))
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", own)
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
    start, times, got = loop.time(), [], b""
    writer.write(b"question")
    while data := await reader.read(1000):
        times.append(loop.time() - start)
        got += data
    writer.close()
    proxy.cancel()
    upstream.close()
    return times, got, heard[0]


def test_every_piece_comes_later_by_the_factor() -> None:
    """Bytes and order are kept; the n-th piece comes FACTOR times as late, not FACTOR to the n."""
    times, answer, request = asyncio.run(asyncio.wait_for(through_proxy(), 20))
    assert request == b"question"
    assert answer == b"piece 0;piece 1;piece 2;"
    assert len(times) == len(GAPS_S)
    for seconds, due in zip(times, (0.1, 0.15, 0.2), strict=True):
        assert seconds >= FACTOR * due - 0.005
        assert seconds < FACTOR * due * FACTOR, "stretched more than once"

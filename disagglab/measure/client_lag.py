"""How busy a client is: how late its event loop wakes up, and how much CPU it takes."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from disagglab.results.records import ClientLoad

INTERVAL_S = 0.01
MOST_SAMPLES = 360_000  # an hour; later ones are not kept


def cpu_s() -> float:
    """CPU time of this process so far, s."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass
class LoopLag:
    """Samples of a running event loop: (clock, how late it woke up, CPU time so far), all in s.

    The clock is ``time.perf_counter``.
    """

    samples: list[tuple[float, float, float]] = field(default_factory=list)

    async def _sample(self) -> None:
        while len(self.samples) < MOST_SAMPLES:
            due = time.perf_counter() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            now = time.perf_counter()
            self.samples.append((now, max(0.0, now - due), cpu_s()))

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[LoopLag]:
        """Sample the running loop until the block ends."""
        task = asyncio.create_task(self._sample())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def between(self, start: float, end: float) -> ClientLoad | None:
        """What the client did between two clock readings; None where it was not looked at twice."""
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        if len(inside) < 2:
            return None
        lags = sorted(lag for _, lag, _ in inside)
        cpu = (inside[-1][2] - inside[0][2]) / (inside[-1][0] - inside[0][0])
        return ClientLoad(cpu, lags[int(0.99 * (len(lags) - 1))], lags[-1])

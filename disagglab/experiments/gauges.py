"""What a worker has in hand and has finished, by its own gauges and counters; and waiting for that."""

from __future__ import annotations

from disagglab import waiting
from disagglab.errors import InvalidRun
from disagglab.measure.ledger import FINISHED, RUNNING, WAITING
from disagglab.serving.vllm import VllmServer

ASK_S = 0.1  # how often a gauge is asked
LIMIT_S = 5.0  # a gauge follows by an engine step


def finished(worker: VllmServer) -> int:
    """Requests that it has finished; 0 while it does not answer."""
    try:
        return round(worker.metrics().value(FINISHED))
    except InvalidRun:
        return 0


def running(worker: VllmServer) -> int:
    """Requests that it has in hand or in its queue.

    Raises:
        InvalidRun: if it does not answer.
    """
    now = worker.metrics()
    return round(now.value(RUNNING) + now.value(WAITING))


def await_idle(worker: VllmServer) -> None:
    """Return when it has nothing in hand.

    Raises:
        InvalidRun: if it still has, although every client has its answer.
    """
    waiting.until(
        lambda: running(worker) == 0,
        LIMIT_S,
        lambda: InvalidRun(f"{worker.plan.process_name} runs a request of nobody; see {worker.process.log}"),
        ASK_S,
    )


def await_running(worker: VllmServer, count: int) -> None:
    """Return when it has ``count`` requests in hand, at least.

    Raises:
        InvalidRun: if it does not: then the streams that are to be watched come from somewhere else.
    """
    now = 0

    def has_them() -> bool:
        nonlocal now
        now = running(worker)
        return now >= count

    waiting.until(
        has_them,
        LIMIT_S,
        lambda: InvalidRun(
            f"{worker.plan.process_name} runs {now} requests, {count} were addressed to it;"
            f" look: curl -s {worker.url}/metrics | grep {RUNNING}; log: {worker.process.log}"
        ),
        ASK_S,
    )

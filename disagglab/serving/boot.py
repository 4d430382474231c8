"""Waits for servers that start in parallel: bounded by lack of progress, not by a tight time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from disagglab import waiting
from disagglab.config.schema import Lab
from disagglab.errors import StartError
from disagglab.progress import ProgressLine
from disagglab.results.seconds import Phase, spends
from disagglab.serving import death
from disagglab.serving.service import POLL_S
from disagglab.serving.vllm import VllmServer, post_mortem

USUAL_START_S = 60.0  # shown beside the elapsed time of a start, not enforced
CPU_PROGRESS_S = 0.05  # CPU time between two looks that counts as a sign of life


class _Watch:
    """Signs of life of one starting server: log growth and CPU time."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server
        self.last_sign = time.monotonic()
        self._log_size = 0
        self._cpu_s = 0.0

    def look(self) -> None:
        size = self.server.process.log.stat().st_size if self.server.process.log.exists() else 0
        cpu_s = self.server.cpu_s()
        if size != self._log_size or cpu_s - self._cpu_s > CPU_PROGRESS_S:
            self.last_sign = time.monotonic()
        self._log_size, self._cpu_s = size, cpu_s


@spends(Phase.SERVERS)
def wait_ready(
    servers: Sequence[VllmServer], lab: Lab, line: ProgressLine, followers: Sequence[VllmServer] = ()
) -> None:
    """Return when every server is ready; show phase and elapsed time while they boot.

    Args:
        followers: ranks on other hosts, which answer nobody. A server waits for its own, so they have to
            live.

    Raises:
        StartError: at once when one dies (likely cause, last log lines), shows no sign of life for
        ``stall_s``,
            exceeds ``start_limit_s``, or when another process answers in its place.
    """
    watches = {server.name: _Watch(server) for server in servers}

    def all_ready() -> bool:
        for follower in followers:
            _require_living(follower)
        for server in servers:
            if server.ready_s is None:
                _look(server, watches[server.name], lab)
        line.show(", ".join(f"{s.name} {'ready' if s.ready_s is not None else s.phase()}" for s in servers))
        return all(server.ready_s is not None for server in servers)

    waiting.last_answer(all_ready, math.inf, POLL_S)  # bounded for each server, by the lab file's limits
    line.done(", ".join(f"{server.name} ready after {server.ready_s:.0f} s" for server in servers))


def _look(server: VllmServer, watch: _Watch, lab: Lab) -> None:
    """Note that a server is ready; refuse to wait for one that is dead, silent or late."""
    _require_living(server)
    took_s = time.monotonic() - server.started
    if server.process.recorded or server.is_ready():
        server.ready_s = took_s
        return
    watch.look()
    silent_s = time.monotonic() - watch.last_sign
    if silent_s > lab.vllm.stall_s:
        raise StartError(
            f"{server.name}: no log output, no CPU use for {silent_s:.0f} s (phase {server.phase()})\n"
            f"{post_mortem(server.process.log)}"
        )
    if took_s > lab.vllm.start_limit_s:
        raise StartError(
            f"{server.name}: not ready after {lab.vllm.start_limit_s:.0f} s ([vllm] start_limit_s)\n"
            f"{post_mortem(server.process.log)}"
        )


def _require_living(server: VllmServer) -> None:
    """Refuse to wait where a process has died."""
    died = death.of(server.process, server.plan.node.role)
    if died is not None:
        raise StartError(f"while starting, {died}")

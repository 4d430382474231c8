"""How each KV transfer went, step by step, as the server that asked for it saw it.

The connector learns that a transfer has ended when the engine next looks, once a step. Its own figure
(``vllm:nixl_xfer_time_seconds``) therefore runs from the posting to that look. With ``[transport] trace``
every server logs a line a transfer: how long the posting took, when the engine looked and found it under way
for the last time, and when it found it done. The end lies between the two.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disagglab.errors import InvalidRun

MARK = "disagg-lab transfer "
_log = logging.getLogger("vllm.disagglab")


@dataclass(frozen=True)
class Traced:
    """One transfer. Seconds from the call that posts it: ``posted_s``, when that call came back;
    ``pending_s``, the last look that found it under way (0 if none did); ``done_s``, the look that found it
    done. ``looks``: how many there were.
    """

    bytes: int
    descriptors: int
    posted_s: float
    pending_s: float
    done_s: float
    looks: int

    @property
    def unseen_s(self) -> float:
        """How long at most it had been over when the engine found it done, s: an upper bound of what was no
        work of the link, since it may have ended at any moment after the last look before.
        """
        return self.done_s - max(self.pending_s, self.posted_s)


@dataclass
class _Open:
    started: float
    posted_s: float = 0.0
    pending_s: float = 0.0
    looks: int = 0


def watch(agent: Any) -> None:
    """Let a NIXL agent class log its transfers; safe to call more than once.

    Args:
        agent: the class, with ``transfer``, ``check_xfer_state`` and ``get_xfer_telemetry``.
    """
    if getattr(agent, "_disagglab_watched", False):
        return
    under_way: dict[int, _Open] = {}
    post, look, tell = agent.transfer, agent.check_xfer_state, agent.get_xfer_telemetry

    @functools.wraps(post)
    def transfer(self: Any, handle: Any, *args: Any, **kwargs: Any) -> Any:
        found = under_way[id(handle)] = _Open(time.perf_counter())
        state = post(self, handle, *args, **kwargs)
        found.posted_s = time.perf_counter() - found.started
        return state

    @functools.wraps(look)
    def check_xfer_state(self: Any, handle: Any) -> Any:
        state = look(self, handle)
        found = under_way.get(id(handle))
        if found is None:
            return state
        now = time.perf_counter() - found.started
        found.looks += 1
        if state == "PROC":
            found.pending_s = now
            return state
        del under_way[id(handle)]
        if state == "DONE":
            told = tell(self, handle)
            line = Traced(told.totalBytes, told.descCount, found.posted_s, found.pending_s, now, found.looks)
            _log.info("%s%s", MARK, json.dumps(asdict(line)))
        return state

    agent.transfer, agent.check_xfer_state = transfer, check_xfer_state
    agent._disagglab_watched = True


def read(lines: Iterable[str]) -> list[Traced]:
    """The transfers that a server's log tells of, in their order.

    Raises:
        ValueError: if a line is not what :func:`watch` writes.
    """
    found = []
    for line in lines:
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                found.append(Traced(**json.loads(text)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"not a line of a transfer: {line!r}: {error}") from error
    return found


def by_run(
    logged: Mapping[str, Sequence[Traced]], counted: Sequence[Mapping[str, int]]
) -> list[list[Traced]]:
    """The transfers of each run, told apart by their place in the logs: a run is over before the next begins.

    Args:
        logged: transfers of all runs, by server, in the order of its log.
        counted: transfers of each run by server, as the counters have them, in the order of the runs.

    Raises:
        InvalidRun: if a server logged another number of transfers than were counted.
    """
    for server in {*logged, *(name for one in counted for name in one)}:
        lines, transfers = len(logged.get(server, ())), sum(one.get(server, 0) for one in counted)
        if lines != transfers:
            raise InvalidRun(
                f"{server}: {lines} transfers were logged, {transfers} were counted in {len(counted)} runs;"
                f" look: grep '{MARK.strip()}' in its log"
            )
    left = {server: iter(lines) for server, lines in logged.items()}
    return [
        [line for server, count in one.items() if count for line in itertools.islice(left[server], count)]
        for one in counted
    ]

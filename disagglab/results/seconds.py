"""Where a session's seconds go: an account in which every second counts for one phase.

What takes time says so where it does (a scrape, a router's start, a job of the load engine). Spans nest; a
second counts for the innermost one that is open. What no span covers is ``Phase.OTHER``, so the phases add
up to the time since the process began. The account is the process's, because a session is a process and few
things that take time hold its folder; where nobody opened one, saying so has no effect.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from disagglab.agent import supervisor

LEAST_S = 0.5  # of a phase, to be named in the line of the terminal; all of them stand in the table


class Phase(enum.StrEnum):
    """What a second was spent on, in the order of tables."""

    START = "start"
    PROBE = "probe"
    HOSTS = "hosts"
    MODEL = "model"
    SERVERS = "servers"
    ROUTERS = "routers"
    WARM_UP = "warm-up"
    LOAD = "load"
    ENGINE = "load engine"
    COUNTERS = "counters"
    TESTS = "tests"
    ENDS = "ends"
    REPORT = "report"
    OTHER = "other"


MEANING = {
    Phase.START: "Python, pytest and plugins, until the run's folder is made",
    Phase.PROBE: "machine speed, before and after",
    Phase.HOSTS: "reaching hosts, clearing them, reading their facts",
    Phase.MODEL: "finding the model; the first time converting it",
    Phase.SERVERS: "vLLM servers and Dynamo's workers, from their start until they are ready",
    Phase.ROUTERS: "routers and Dynamo's frontends, from their start until they are ready",
    Phase.WARM_UP: "runs that warm up, with all that belongs to them",
    Phase.LOAD: "load runs, from the first request to the last answer",
    Phase.ENGINE: "the load engine beside that: jobs handed over, traces and results read",
    Phase.COUNTERS: "reading the servers' counters until they have caught up",
    Phase.TESTS: "tests and fixtures beside all that: requests of their own, arithmetic",
    Phase.ENDS: "ending routers, servers and hosts, and the proof that nothing is left",
    Phase.REPORT: "writing the report, looking for secrets",
    Phase.OTHER: "pytest: collection, and what it does between tests",
}


class Account:
    """Seconds by phase, from now on.

    Only the thread that opens it is charged: what its other threads do happens within its own seconds.

    Args:
        clock: s; monotonic.
        before_s: what had gone by already; it counts for ``Phase.START``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, before_s: float = 0.0) -> None:
        self._clock = clock
        self._thread = threading.get_ident()
        self._open: list[Phase] = []
        self._whole = False
        self._charged_until = clock()
        self._spent = {Phase.START: before_s}

    @contextlib.contextmanager
    def spends(self, phase: Phase, whole: bool = False) -> Iterator[None]:
        """The block counts for ``phase``, but for spans inside it.

        A span ends before one that was open when it began; so it must not hold a generator's ``yield``.

        Args:
            whole: whether the spans inside count for ``phase``, too, as of a warm-up.
        """
        if not self._takes():
            yield
            return
        self._charge()
        self._open.append(phase)
        self._whole = whole
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._whole = False

    def counts(self, phase: Phase, spent_s: float) -> None:
        """Of the innermost open span so many seconds were of another phase, as somebody else measured.

        At most what that span's phase has, so that none becomes negative.
        """
        if not self._takes():
            return
        self._charge()
        moved_s = min(max(spent_s, 0.0), self._spent[self._now()])
        self._spent[self._now()] -= moved_s
        self._spent[phase] = self._spent.get(phase, 0.0) + moved_s

    def so_far(self) -> dict[str, float]:
        """Seconds by phase up to now, in the order of :class:`Phase`; phases that had none are left out."""
        self._charge()
        return {str(phase): self._spent[phase] for phase in Phase if self._spent.get(phase)}

    def _takes(self) -> bool:
        return threading.get_ident() == self._thread and not self._whole

    def _now(self) -> Phase:
        return self._open[-1] if self._open else Phase.OTHER

    def _charge(self) -> None:
        now = self._clock()
        self._spent[self._now()] = self._spent.get(self._now(), 0.0) + now - self._charged_until
        self._charged_until = now


_of_process: Account | None = None


def open_account() -> None:
    """Begin the account of this process; what went by since the process began counts for its start."""
    global _of_process
    _of_process = Account(before_s=age_s())


def age_s() -> float:
    """Seconds since this process began, to the kernel's clock tick (10 ms)."""
    ticks = supervisor.identify(os.getpid()).start_ticks
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


@contextlib.contextmanager
def spends(phase: Phase, whole: bool = False) -> Iterator[None]:
    """:meth:`Account.spends` of this process's account; a decorator as well."""
    with _of_process.spends(phase, whole) if _of_process else contextlib.nullcontext():
        yield


def counts(phase: Phase, spent_s: float) -> None:
    """:meth:`Account.counts` of this process's account."""
    if _of_process:
        _of_process.counts(phase, spent_s)


def so_far() -> dict[str, float]:
    """:meth:`Account.so_far` of this process's account; empty where there is none."""
    return _of_process.so_far() if _of_process else {}


def rows(spent: Mapping[str, float]) -> list[tuple[str, float, float, str]]:
    """Phase, s, its share of all, and what it means, of what ``run.json`` keeps under ``seconds``."""
    whole_s = sum(spent.values())
    known = {str(phase): what for phase, what in MEANING.items()}
    return [(name, took, took / whole_s, known.get(name, "")) for name, took in spent.items() if whole_s]


def line(spent: Mapping[str, float]) -> str:
    """``time: start 2 s, servers 34 s, load 201 s, other 12 s = 249 s``, in whole seconds that add up.

    Phases of less than LEAST_S are in ``other``, the last. Each figure is by how much the rounded sum grows,
    so it is off by less than 1 s.
    """
    other = str(Phase.OTHER)
    named = {name: took for name, took in spent.items() if took >= LEAST_S and name != other}
    named[other] = sum(spent.values()) - sum(named.values())
    parts, until_s = [], 0.0
    for name, took in named.items():
        parts.append(f"{name} {round(until_s + took) - round(until_s)} s")
        until_s += took
    return f"time: {', '.join(parts)} = {round(until_s)} s"

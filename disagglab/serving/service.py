"""A service: a program on a host that others ask. One life for all of them: started, ready, asked, ended.

vLLM servers, routers, etcd, NATS, Dynamo's workers and frontends differ in their command and in what they
call ready.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from disagglab.errors import StartError
from disagglab.hosts.host import HostProcess

TAIL_LINES = 20  # of a log, in the message of a start that failed
POLL_S = 0.25  # for what takes seconds to be ready
HTTP_TIMEOUT_S = 5.0  # of one question to a service of this lab


class Service(abc.ABC):
    """A program that was started. ``process`` runs it; ``command`` is what one would type."""

    poll_s: ClassVar[float] = POLL_S  # between two looks whether it is ready

    if TYPE_CHECKING:  # subclasses have them as fields or properties, as it suits them

        @property
        def name(self) -> str: ...

        @property
        def command(self) -> str: ...

        @property
        def process(self) -> HostProcess: ...

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether it can be used, by its own word."""

    def lacks(self) -> str:
        """What is missing while it is not ready, for a message; empty where nothing tells."""
        return ""

    def await_ready(self, limit_s: float) -> None:
        """Return when it is ready.

        Raises:
            StartError: if it ends before, or is not ready after ``limit_s``; see :func:`await_that`.
        """
        await_that(self, self.is_ready, limit_s, self.lacks)

    def brought_up(self, limit_s: float) -> Self:
        """Itself, ready; what does not come up is ended.

        Raises:
            StartError: see :meth:`await_ready`.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self.await_ready(limit_s)
            undo.pop_all()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self) -> None:
        """End the program itself as a crash would (SIGKILL); :meth:`stop` waits for what it started."""
        self.process.kill()

    def ask_to_stop(self) -> None:
        """Begin to end it; :meth:`stop` waits until it has ended."""
        self.process.ask_to_stop()

    def stop(self) -> None:
        """End it and everything it started; return when all of it is gone.

        Raises:
            StartError: if something of it is still alive after the deadline.
        """
        self.process.stop()


def await_that(
    service: Service, condition: Callable[[], bool], limit_s: float, lacks: Callable[[], str] = str
) -> None:
    """Return when a condition holds that a service is to bring about.

    Args:
        lacks: what is missing, for the message.

    Raises:
        StartError: if it ends before, or the condition does not hold after ``limit_s``. The message holds
            the end of its log. The service is left to whoever started it.
    """

    def without(alive: bool) -> StartError:
        state = f"is not ready after {limit_s:g} s" if alive else "ended"
        missing = f"; {text}" if (text := lacks()) else ""
        log = service.process.log
        tail = "\n".join(read_tail(log, TAIL_LINES))
        what = f"{service.process.name} {state}{missing}"
        return StartError(f"{what}; command: {service.command}\nlast lines of {log}:\n{tail}")

    service.process.await_that(condition, limit_s, without, service.poll_s)


def read_tail(log: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of a log; empty if there is none."""
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []

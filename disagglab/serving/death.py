"""How a process of this session died: who ended it, its last error, what that means, what mends it.

Three witnesses: the supervisor (exit status, out-of-memory kills of the kernel), our plugin inside of vLLM
(how an engine ended, which the API server does not tell), and the log.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagglab import waiting
from disagglab.agent.supervisor import MEMORY
from disagglab.errors import InvalidRun
from disagglab.hosts.host import HostProcess
from disagglab.serving.causes import CHILD_ENDED, GIVE_LESS, cause_of, last_words
from disagglab.serving.service import read_tail

LOG_LINES = 2000  # of a log's end: an engine's error stands above one traceback a request that it took along
DYING_LIMIT_S = 30.0  # from the word that its engine is dead to the end of an API server
POLL_S = 0.1

_CHILD_ENDED = re.compile(re.escape(CHILD_ENDED) + r"pid (\d+), status (-?\d+)")
_DYING = re.compile(r"EngineDeadError|EngineCore encountered a fatal error|engine core exited unexpectedly")
_PREFIX = re.compile(r"^(\([^)]*\) )?((ERROR|CRITICAL|WARNING|INFO) [\d-]+ [\d:.]+ (\[[^\]]*\] )?)?")
_MARKED = re.compile(r"\b(ERROR|CRITICAL)\b")
_TRACEBACK = "Traceback "
_EXCEPTION = re.compile(
    r"^[\w.]*(Error|Exception|Exit)\b|^Fatal Python error|^Segmentation fault|^free\(\)|^malloc"
)
_FOLLOWS = re.compile(  # what a death brings
    r"EngineDeadError|Engine core initialization failed|^SystemExit|CancelledError|^KeyboardInterrupt"
)

# What a signal that nobody here sent means, and what mends it.
SIGNALS = {
    signal.SIGKILL: (
        "somebody else killed it (SIGKILL); the kernel counted no out-of-memory kill meanwhile",
        "see who ends processes here: a job's limit, a container's, another user; then run again",
    ),
    signal.SIGTERM: ("somebody else asked it to end", "see who ends processes on this host; then run again"),
    signal.SIGINT: ("somebody else interrupted it", "see who ends processes on this host; then run again"),
    signal.SIGHUP: ("its terminal or session was closed", "run again"),
    signal.SIGSEGV: (
        "native code crashed (invalid memory)",
        "look for native frames in the log; try other versions of vLLM, NIXL or the driver",
    ),
    signal.SIGBUS: ("a memory map has lost its file, mostly a full /dev/shm", "see: df -h /dev/shm"),
    signal.SIGILL: ("an instruction this CPU lacks", "unset ONEDNN_MAX_CPU_ISA"),
    signal.SIGABRT: ("native code gave up (abort)", "the reason stands above the last lines of the log"),
    signal.SIGFPE: ("native code divided by zero", "the reason stands above the last lines of the log"),
}
STARVED = ("the kernel killed it: out of memory", GIVE_LESS)


@dataclass(frozen=True)
class Death:
    """A process that ended though nobody here asked it to.

    ``line``: which process, when, how. ``last_error``: the last one of its own that its log holds, or empty.
    """

    process: str
    line: str
    last_error: str
    cause: str
    mend: str
    log: Path

    def __str__(self) -> str:
        said = f"last error: {self.last_error}\n" if self.last_error else ""
        return (
            f"{self.line}\n{said}likely cause: {self.cause}\nmend: {self.mend}\n"
            f"log: {self.log}\nnext: tail -n 60 {self.log}"
        )


class Died(InvalidRun):
    """A server or router died while it was needed. ``death`` says how."""

    def __init__(self, death: Death) -> None:
        self.death = death
        super().__init__(death.line)


def of(process: HostProcess, what: str = "") -> Death | None:
    """How a process died; None where it lives, or was ended by us.

    A server that has just lost its engine is given ``DYING_LIMIT_S`` to end.

    Args:
        what: what the process is for, in the message: a role.

    Raises:
        StartError: if the connection to its host is lost.
    """
    if not process.died and is_dying(process):
        waiting.last_answer(process.has_died, DYING_LIMIT_S, POLL_S)
    if not process.has_died():
        return None
    return told(process, read_tail(process.log, LOG_LINES), what)


def require_alive(process: HostProcess, what: str = "") -> None:
    """Refuse to go on with a process that has died; see :func:`of`.

    Raises:
        Died: with how.
    """
    if (found := of(process, what)) is not None:
        raise Died(found)


def is_dying(process: HostProcess) -> bool:
    """Whether its log says that its engine is dead. Of a process that we end or have ended: no."""
    if process.asked or not process.alive:
        return False
    process.host.follow(process.name)
    return any(_DYING.search(line) for line in read_tail(process.log, LOG_LINES))


def told(process: HostProcess, lines: Sequence[str], what: str = "") -> Death:
    """A death, from what the supervisor says in ``process.ended`` and from the log's lines."""
    ended = process.ended or {}
    found = [match for line in lines if (match := _CHILD_ENDED.search(line))]
    inner = [(int(m[1]), int(m[2])) for m in found if m[2] != "0"]
    code = ended.get("code")
    how, number = _end(code)
    if inner:
        pid, status = inner[0]
        part, number = _end(status)
        how = f"its {_name_of(pid, lines)} (pid {pid}) {part}; then it {how}"
    cause, mend = _cause(ended, number, lines)
    where = "" if process.host.is_local else f" on {process.host.name}"
    when = f" at {time.strftime('%H:%M:%S', time.localtime(ended['ended_s']))}" if "ended_s" in ended else ""
    role = f", {what}" if what else ""
    line = f"{process.name}{role} (pid {process.identity.pid}{where}) died{when}: {how}"
    error = last_error(last_words(lines)) or (lines[-1].strip() if lines and code and not number else "")
    return Death(process.name, line, error, cause, mend, process.log)


def last_error(lines: Sequence[str]) -> str:
    """The last line of a log that is an error of the process's own, without the logger's mark before it.

    What the death of an engine brings to every request under way (EngineDeadError) is not looked for.
    """
    bare = [_PREFIX.sub("", line).rstrip() for line in lines]
    own = [line for line in bare if _EXCEPTION.search(line) and not _FOLLOWS.search(line)]
    if own:
        return own[-1]
    said = ""
    for line, rest, following in zip(lines, bare, [*bare, ""][1:], strict=True):
        plain = rest and not rest.startswith((" ", _TRACEBACK)) and not _FOLLOWS.search(rest)
        if _MARKED.search(line) and plain and not following.startswith(_TRACEBACK):
            said = rest
    return said


def _end(code: int | None) -> tuple[str, int]:
    """How an exit status reads, and the signal in it (0: none)."""
    if code is None:
        return "ended together with its supervisor", signal.SIGKILL
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return f"was ended by {name}", -code
    return f"ended with status {code}", 0


def _name_of(pid: int, lines: Sequence[str]) -> str:
    """What vLLM calls one of its processes, read from the mark before its lines in the log."""
    marks = (re.match(rf"\((\w+) pid={pid}\)", line) for line in lines)
    return next((mark[1] for mark in marks if mark), "child")


def _cause(ended: Mapping[str, Any], number: int, lines: Sequence[str]) -> tuple[str, str]:
    """Likely cause and mend. A signal is surer than words in a log; our own stop is surest."""
    if ended.get("reason") != MEMORY and number == signal.SIGKILL and ended.get("oom_kills"):
        return STARVED
    if ended.get("reason") != MEMORY and number in SIGNALS:
        return SIGNALS[signal.Signals(number)]
    return cause_of(lines)

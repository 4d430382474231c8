"""Waiting for a condition, with a deadline and a message: the one loop of the suite that does.

Standard library of Python 3.10 alone, because it travels to hosts with what runs there.
"""

from __future__ import annotations

import time
from typing import Callable, TypeVar  # noqa: UP035 - also on an older Python

Answer = TypeVar("Answer")

POLL_S = 0.2


def last_answer(
    ask: Callable[[], Answer], limit_s: float, poll_s: float = POLL_S, first_s: float | None = None
) -> Answer:
    """Ask until the answer counts as true or ``limit_s`` have passed; return the last answer.

    It is asked at least once, and once more after the limit. What is late is for the caller to say.

    Args:
        poll_s: between two questions, s.
        first_s: between the first two, s, for what is likely to hold soon; it doubles until it is ``poll_s``.
    """
    deadline = time.monotonic() + limit_s
    pause_s = poll_s if first_s is None else min(first_s, poll_s)
    while not (answer := ask()) and time.monotonic() <= deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, poll_s)
    return answer


def until(
    ask: Callable[[], Answer], limit_s: float, late: Callable[[], Exception], poll_s: float = POLL_S
) -> Answer:
    """Ask until the answer counts as true; return it.

    Args:
        late: makes the error, with what did not happen and what to do next.
        poll_s: between two questions, s.

    Raises:
        Exception: what ``late`` makes, after ``limit_s``. Whatever ``ask`` raises ends the wait at once.
    """
    answer = last_answer(ask, limit_s, poll_s)
    if not answer:
        raise late()
    return answer

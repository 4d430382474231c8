"""How far a host's clock is from ours: an interval, because asking takes time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# No figure compares the clocks of two hosts: times are by the client's clock, transfers and leases by that of
# the server that has them. They matter to whoever reads two logs side by side, and vLLM stamps whole seconds.
MOST_OFFSET_S = 0.5
READINGS = 5  # the one with the shortest round trip says most
ASK = "date +%s.%N"


@dataclass(frozen=True)
class Offset:
    """A host's clock less ours lies between ``low_s`` and ``high_s``."""

    low_s: float
    high_s: float

    @classmethod
    def of(cls, before: float, theirs: float, after: float) -> Offset:
        """From their reading between two of ours, all in s: it was taken at some moment between the two."""
        return cls(theirs - after, theirs - before)

    @property
    def mean_s(self) -> float:
        """The middle; right if both ways take the same time."""
        return (self.low_s + self.high_s) / 2

    @property
    def round_trip_s(self) -> float:
        """How long asking took."""
        return self.high_s - self.low_s

    def within(self, limit_s: float) -> Literal["yes", "no", "unknown"]:
        """Whether the clocks are no further apart than this; unknown where asking took too long to tell."""
        if self.low_s > limit_s or self.high_s < -limit_s:
            return "no"
        return "yes" if -limit_s <= self.low_s and self.high_s <= limit_s else "unknown"

    def __str__(self) -> str:
        return f"{self.mean_s:+.4f} s ± {self.round_trip_s / 2:.4f} s"


def read(facts: Any, now: Callable[[], float] = time.time) -> Offset:
    """The offset of a host's clock, from the quickest of some readings. ``facts``: its testinfra host."""
    found = []
    for _ in range(READINGS):
        before = now()
        theirs = float(facts.check_output(ASK))
        found.append(Offset.of(before, theirs, now()))
    return min(found, key=lambda offset: offset.round_trip_s)

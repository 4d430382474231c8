"""What a verdict means for the gate that asked for it; or what stands there if no gate did."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import get_args

from disagglab.stats.verdict import Want

NOT_ENFORCED, UNDERPOWERED = " (not enforced)", ", underpowered"
MORE = re.compile(r", needs about (\d+) min more$")


class State(StrEnum):
    """How it stands. A gate of the lab is met or not; of two releases one is worse, or that is not found;
    identical arms, ways, arms beside the lab's own, predictions, expectations and claims are no gates.
    """

    MET = "met"
    NOT_MET = "not met"
    NO_REGRESSION = "no regression"
    WORSE = "worse"
    UNDECIDED = "undecided"
    IDENTICAL = "A/A: identical arms"
    WAY = "way"
    VARIANT = "variant"  # a way, in files of earlier versions
    BESIDE = "beside"
    PREDICTED = "predicted"
    EXPECTED = "expected"
    CLAIM = "claim"
    OTHER = "other"


@dataclass(frozen=True)
class GateState:
    """State, and what belongs to it. Its text is what people read and what files hold.

    ``want``: of a gate. ``enforced``: whether the session fails of it. ``underpowered``: whether too few
    rounds were made to find a difference of the size of the margin. ``minutes``: of further rounds that
    would decide it if effect and spread stay as they are; None where that is not foreseen. ``about``: what is
    predicted, expected or claimed; ``answer``: how that stands. Of OTHER, ``about`` is the whole text.
    """

    state: State
    want: Want | None = None
    enforced: bool = True
    underpowered: bool = False
    about: str = ""
    answer: str = ""
    minutes: int | None = None

    @property
    def of_a_gate(self) -> bool:
        """Whether a gate of the lab file asked for the verdict."""
        return self.state in (State.MET, State.NOT_MET)

    @property
    def fails(self) -> bool:
        """Whether a session must not pass with it: an enforced gate that is not met, a figure of a release
        that is worse under an enforced gate.
        """
        return self.enforced and self.state in (State.NOT_MET, State.WORSE)

    def __str__(self) -> str:
        lacking = UNDERPOWERED if self.underpowered else ""
        if self.minutes is not None:
            lacking = f", needs about {self.minutes} min more"
        match self.state:
            case State.MET | State.NOT_MET:
                return f"{self.state}: wants {self.want}{lacking}{'' if self.enforced else NOT_ENFORCED}"
            case State.WORSE:
                return "worse" if self.enforced else f"found worse{NOT_ENFORCED}"
            case State.UNDECIDED:
                return f"{self.state}{lacking}"
            case State.PREDICTED:
                return f"{self.state} {self.about}"
            case State.EXPECTED:
                return f"{self.state} {self.about}: {self.answer}"
            case State.CLAIM:
                return f"{self.state}{' of ' if self.about else ''}{self.about}: {self.answer}"
            case State.OTHER:
                return self.about
            case _:
                return str(self.state)

    @classmethod
    def parse(cls, text: str) -> GateState:
        """The state of a text in a file. One that this version does not know is kept as OTHER."""
        return next((one for one in cls._readings(text) if str(one) == text), cls(State.OTHER, about=text))

    @classmethod
    def _readings(cls, text: str) -> Iterator[GateState]:
        """What a text may say. Whether it does is told by turning that into text again."""
        rest, enforced = text.removesuffix(NOT_ENFORCED), not text.endswith(NOT_ENFORCED)
        rest, underpowered = rest.removesuffix(UNDERPOWERED), rest.endswith(UNDERPOWERED)
        more = MORE.search(rest)
        rest, minutes = MORE.sub("", rest), int(more[1]) if more else None
        yield from (cls(state) for state in State if state is not State.OTHER)
        yield cls(State.WORSE, enforced=False)
        yield cls(State.UNDECIDED, underpowered=True)
        head, _, tail = rest.partition(": ")
        for want in get_args(Want):
            for state in (State.MET, State.NOT_MET):
                yield cls(state, want, enforced, underpowered, minutes=minutes)
        yield cls(State.PREDICTED, about=text.removeprefix(f"{State.PREDICTED} "))
        yield cls(State.EXPECTED, about=head.removeprefix(f"{State.EXPECTED} "), answer=tail)
        claimed = head.removeprefix(State.CLAIM).removeprefix(" of ")
        yield cls(State.CLAIM, about=claimed, answer=tail)

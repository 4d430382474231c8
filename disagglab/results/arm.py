"""An arm: what is measured in turns with others."""

from __future__ import annotations

from dataclasses import dataclass

MARK = "@"


@dataclass(frozen=True)
class Arm:
    """``name``: the topology, or whatever else takes a turn. ``tag``: what tells it from the lab's own of
    that name: a way, a vLLM release, other engine options; empty for the lab's own.

    Its text, ``disaggregated@tcp``, is its name in files, commands and tables.
    """

    name: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.name}{MARK}{self.tag}" if self.tag else self.name

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The arm of a name in a file."""
        name, _, tag = text.partition(MARK)
        return cls(name, tag)

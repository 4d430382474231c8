"""What tuning tries: the options of ``[tuning]`` with their values, and how many settings each way tries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import Field

from disagglab.config.head import Section

Value = str | int | float | bool
Each = TypeVar("Each")
RATIO = re.compile(r"([1-9]\d*)P([1-9]\d*)D")
MOST_SETTINGS = 64  # of one way; against a slip of the keyboard


class DisaggregatedSpace(Section):
    """Dimensions that disaggregated serving alone has, drawn on top of [tuning.space]."""

    prefill: dict[str, list[Value]] = Field(
        default={},
        description="option of the servers that prefill, with its values; beats [tuning.space]",
    )
    decode: dict[str, list[Value]] = Field(default={}, description="the same of the servers that decode")
    transport: dict[str, list[Value]] = Field(
        default={},
        description="key of [transport] with its values; `extra.num_threads` is a key inside extra",
    )
    ratios: list[str] = Field(
        default=[], description="how many nodes prefill and how many decode, as 1P2D; empty: the lab's roles"
    )

    @property
    def tables(self) -> dict[str, dict[str, list[Value]]]:
        """Tables of options by their key; ``ratios`` is none."""
        return {"prefill": self.prefill, "decode": self.decode, "transport": self.transport}


class TuningSection(Section):
    """How `disagglab tune` looks for good settings of every way to use the nodes.

    Each way tries `settings` settings, the lab's own among them, on runs of `workload`; the better half of
    them goes on to the next rung, until one is left. What is better: more requests that meet `[slo]`, then a
    lower p99 ITL.
    """

    workload: str = Field(description="name of a file in workloads/, on which settings are compared")
    kinds: list[str] = Field(
        default=["single", "replicated", "disaggregated"],
        min_length=1,
        description="ways that are tuned; sharded where the model's heads divide by the ranks",
    )
    settings: int = Field(
        8, ge=2, le=MOST_SETTINGS, description="settings that each way tries, the lab's own included"
    )
    seed: int = Field(1, ge=0, description="that settings and prompts are drawn by")
    confirm: int = Field(
        3, ge=1, le=20, description="runs of each winner and of the lab's own setting on fresh prompts"
    )
    space: dict[str, list[Value]] = Field(
        min_length=1, description="option of `vllm serve`, without --, with the values that are tried"
    )
    disaggregated: DisaggregatedSpace | None = Field(
        None, description="further dimensions, which disaggregated serving alone has"
    )
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.3, 0.5, 0.7, 0.9, 1.1),
        min_length=1,
        description="offered rates of the frontier, as shares of a capacity that is measured first",
    )
    rounds: int = Field(3, ge=1, description="rounds of the frontier at each rate")

    resident: int = Field(
        1,
        ge=1,
        description="deployments whose servers run at once; others take turns, each with a start of its own",
    )

    @property
    def option_tables(self) -> dict[str, dict[str, list[Value]]]:
        """Every table of values by its key in the lab file."""
        further = self.disaggregated.tables if self.disaggregated else {}
        return {
            "tuning.space": self.space,
            **{f"tuning.disaggregated.{name}": table for name, table in further.items()},
        }


def parts_of(ratio: str) -> tuple[int, int]:
    """Nodes that prefill and nodes that decode, of a text such as ``1P2D``.

    Raises:
        ValueError: if it is no such text.
    """
    found = RATIO.fullmatch(ratio)
    if found is None:
        raise ValueError(f"no ratio: {ratio!r}")
    return int(found[1]), int(found[2])


def size(space: Mapping[str, Sequence[Value]], own: Mapping[str, Value]) -> int:
    """How many settings there are, the lab's own included, which may stand outside of the space.

    Args:
        own: the lab's [vllm.args]; an option that is not there has vLLM's value, which is taken for another
            than those of the space.
    """
    inside = all(name in own and own[name] in values for name, values in space.items())
    return math.prod(len(values) for values in space.values()) + (not inside)


def repeated(values: Sequence[Each]) -> Iterator[Each]:
    """Values that stand in a list before."""
    for position, value in enumerate(values):
        if value in values[:position]:
            yield value

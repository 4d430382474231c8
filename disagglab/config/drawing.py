"""The settings of a search: the lab's own first, then settings drawn by seed, spread over the space.

The engine's options are drawn once and are the same for every kind of way, so that each is tuned with equal
effort and one start can serve several. What disaggregated serving has beside them is drawn on top, in the
same number of settings.

A draw is a Latin design in one column a dimension: each value stands in it as often as every other, give or
take one, and its order is drawn by lot (M. McKay, R. Beckman, W. Conover, Technometrics 21, 1979). Of
independent draws some values would come up twice as often as others, and some never.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from disagglab.config import search_space, setting
from disagglab.config.schema import Lab
from disagglab.config.search_space import DisaggregatedSpace, TuningSection, Value
from disagglab.config.setting import Setting
from disagglab.config.way import DISAGGREGATED

DESIGNS = 200  # tried before what stands twice in a design is replaced

Key = TypeVar("Key", bound=Hashable)
Row = tuple[Value, ...]


def draw(lab: Lab, tuning: TuningSection) -> dict[str, tuple[Setting, ...]]:
    """The settings of each kind, the lab's own first; the same for the same seed.

    Raises:
        ValueError: if the space has fewer settings than are asked for, which a lab file that was read has
            not.
    """
    count = tuning.settings - 1
    common = [
        Setting(setting.options(setting.without(row, lab.vllm.args)))
        for row in distinct(tuning.space, lab.vllm.args, count, random.Random(f"{tuning.seed} engine"))
    ]
    further = common
    if tuning.disaggregated is not None:
        source = random.Random(f"{tuning.seed} disaggregated")
        further = _on_top(lab, common, tuning.disaggregated, source)
    return {kind: (Setting(), *(further if kind == DISAGGREGATED else common)) for kind in tuning.kinds}


def _on_top(
    lab: Lab, common: Sequence[Setting], space: DisaggregatedSpace, source: random.Random
) -> list[Setting]:
    """The settings with what only disaggregated serving has."""
    columns: dict[tuple[str, str], Sequence[Value]] = {
        (name, key): values for name, table in space.tables.items() for key, values in table.items()
    }
    if space.ratios:
        columns["ratios", ""] = space.ratios
    found = []
    for below, row in zip(common, latin(columns, len(common), source), strict=True):
        servers = {**lab.vllm.args, **dict(below.args)}
        tables: dict[str, dict[str, Value]] = {
            name: {key: row[name, key] for key in table} for name, table in space.tables.items()
        }
        prefill, decode = nodes_of(lab, str(row["ratios", ""])) if space.ratios else ((), ())
        found.append(
            Setting(
                below.args,
                setting.options(setting.without(tables["prefill"], servers)),
                setting.options(setting.without(tables["decode"], servers)),
                setting.options(setting.without(tables["transport"], _flat(lab))),
                prefill,
                decode,
            )
        )
    return found


def _flat(lab: Lab) -> dict[str, Value]:
    """The lab's [transport] with dotted keys."""
    found: dict[str, Value] = {}
    for key, value in lab.transport.model_dump().items():
        if isinstance(value, dict):
            found.update({f"{key}.{inner}": each for inner, each in value.items()})
        elif isinstance(value, str | int | float | bool):
            found[key] = value
    return found


def nodes_of(lab: Lab, ratio: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the nodes that prefill and that decode at a ratio; empty where it is the lab's own.

    Nodes keep their part as far as there is one: the lab's prefill nodes come first, those that decode
    last.

    Raises:
        ValueError: see :func:`disagglab.config.search_space.parts_of`.
    """
    if ratio == lab.ratio:
        return (), ()
    prefill, decode = search_space.parts_of(ratio)
    names = [node.name for node in (*lab.prefill, *lab.decode)]
    return tuple(names[:prefill]), tuple(names[prefill : prefill + decode])


def latin(space: Mapping[Key, Sequence[Value]], count: int, source: random.Random) -> list[dict[Key, Value]]:
    """So many rows in which each value of a dimension stands equally often, give or take one."""
    columns = []
    for values in space.values():
        whole, rest = divmod(count, len(values))
        column = [*values] * whole + source.sample(list(values), rest)
        source.shuffle(column)
        columns.append(column)
    return (
        [dict(zip(space, row, strict=True)) for row in zip(*columns, strict=True)]
        if columns
        else [{} for _ in range(count)]
    )


def distinct(
    space: Mapping[str, Sequence[Value]], own: Mapping[str, Value], count: int, source: random.Random
) -> list[dict[str, Value]]:
    """Rows of a Latin design, none of them twice and none the lab's own.

    Where a space is so small that no design of ``DESIGNS`` is without repetition, what stands twice is
    replaced by what the space has left, values that stand in fewer rows first.

    Raises:
        ValueError: if the space has fewer.
    """
    taken = tuple(own.get(name) for name in space)
    rows: list[Row] = []
    for _ in range(DESIGNS):
        drawn = [tuple(row.values()) for row in latin(space, count, source)]
        rows = [row for row in dict.fromkeys(drawn) if row != taken]
        if len(rows) == count:
            break
    if len(rows) < count:
        rows += _left(space, rows, taken, count - len(rows), source)
    return [dict(zip(space, row, strict=True)) for row in rows]


def _left(
    space: Mapping[str, Sequence[Value]],
    rows: Iterable[Row],
    taken: tuple[Value | None, ...],
    count: int,
    source: random.Random,
) -> list[Row]:
    """Further rows of the space, those first whose values stand in fewer rows."""
    used = set(rows)
    free = [row for row in itertools.product(*space.values()) if row not in used and row != taken]
    if len(free) < count:
        raise ValueError(f"{count} more settings are wanted, the space has {len(free)}")
    source.shuffle(free)
    seen = Counter((place, value) for row in used for place, value in enumerate(row))
    found: list[Row] = []
    for _ in range(count):
        best = min(free, key=lambda row: sum(seen[place, value] for place, value in enumerate(row)))
        free.remove(best)
        seen.update(enumerate(best))
        found.append(best)
    return found

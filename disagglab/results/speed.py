"""How fast a machine is right now: a probe before and after a session, and whether it can be believed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from disagglab.results.seconds import Phase, spends

COPY_BYTES = 256 * 2**20  # several times the last-level cache of what this runs on
MATRIX = 512
REPEATS = 7  # after one of each that is not counted: it touches the memory and wakes the threads of BLAS
# A figure is the best of the repeats, what the machine is able to do. It stands only if at least half of them
# come near it: else the best is luck, as where threads of a matrix product wait for each other.
STEADY_WITHIN = 0.25  # of the best, how far their median may lie below it

COPY, MATRIX_PRODUCT = "copy_gb_per_s", "matrix_gflop_per_s"
UNITS = {COPY: "GB/s", MATRIX_PRODUCT: "GFLOP/s"}
DIGITS = {COPY: 1, MATRIX_PRODUCT: 0}
NAMES = {COPY: "copy", MATRIX_PRODUCT: "matrix"}


@spends(Phase.PROBE)
def probe() -> dict[str, float | list[float] | None]:
    """The speed of memory copies (GB/s, bytes copied) and of matrix products (GFLOP/s), as :func:`record`
    keeps them.

    Shared machines slow down several times over for minutes; a run is read beside its probe.
    """
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    left = np.ones((MATRIX, MATRIX), dtype=np.float32)
    rates: dict[str, list[float]] = {COPY: [], MATRIX_PRODUCT: []}
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        np.copyto(target, source)
        rates[COPY].append(COPY_BYTES / (time.perf_counter() - start) / 1e9)
        start = time.perf_counter()
        left @ left
        rates[MATRIX_PRODUCT].append(2 * MATRIX**3 / (time.perf_counter() - start) / 1e9)
    return record({name: found[1:] for name, found in rates.items()})


def record(rates: Mapping[str, Sequence[float]]) -> dict[str, float | list[float] | None]:
    """What ``run.json`` keeps: of each quantity the best repeat, None if it is not steady, and as
    ``NAME_range`` the lowest and the highest.
    """
    kept: dict[str, float | list[float] | None] = {}
    for name, found in rates.items():
        kept[name] = max(found) if steady(found) else None
        kept[f"{name}_range"] = [min(found), max(found)]
    return kept


def steady(rates: Sequence[float]) -> bool:
    """Whether at least half of the repeats come near the best: see :data:`STEADY_WITHIN`."""
    return statistics.median(rates) >= (1 - STEADY_WITHIN) * max(rates)


def one(probe: Any, name: str) -> str:
    """A quantity of a probe of ``run.json`` for people; ``not recorded`` where there is none.

    Sessions of earlier versions recorded the figure alone, so nothing tells whether theirs was steady.
    """
    kept = probe if isinstance(probe, Mapping) else {}
    figure, both = kept.get(name), kept.get(f"{name}_range")
    digits, unit = DIGITS[name], UNITS[name]
    if _is_number(figure):
        return f"{figure:.{digits}f} {unit}"
    if isinstance(both, list) and len(both) == 2 and all(map(_is_number, both)):
        return f"not steady ({both[0]:.{digits}f} to {both[1]:.{digits}f} {unit})"
    return "not recorded"


def text(probe: Any) -> str:
    """Both quantities of a probe, in one line."""
    return ", ".join(f"{NAMES[name]} {one(probe, name)}" for name in UNITS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

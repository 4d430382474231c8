"""How tests record numbers: into the run's store, and into pytest-benchmark through its public API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disagglab.results.records import Plot, Record
from disagglab.results.run_folder import Store


class VirtualClock:
    """A timer for pytest-benchmark that moves when told to, so that it stores times measured elsewhere."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self._now_s += seconds


VIRTUAL_CLOCK = VirtualClock()


class Recorder:
    """Records what one test measured.

    Args:
        store: the run's store.
        module: the learning module.
        test: the test's name.
    """

    def __init__(self, store: Store, module: str, test: str) -> None:
        self._store = store
        self._module = module
        self._test = test

    def numbers(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        arm: str = "",
        what: str = "runs",
        command: str = "",
        note: str = "",
    ) -> None:
        """Keep replicates of one figure. ``what``: what one value comes from (runs, requests, gaps).

        Raises:
            ValueError: if there are no values.
        """
        if not values:
            raise ValueError(f"{self._test}: no values for {name}")
        floats = tuple(float(value) for value in values)
        self._store.add(Record(self._module, self._test, name, unit, floats, arm, what, command, note))

    def plot(
        self,
        title: str,
        x_label: str,
        y_label: str,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        style: str = "line",
        caption: str = "",
        ticks: Sequence[str] = (),
    ) -> None:
        """Keep a figure for the report."""
        points = {label: (tuple(map(float, xs)), tuple(map(float, ys))) for label, (xs, ys) in series.items()}
        self._store.add(Plot(self._module, title, x_label, y_label, points, style, caption, tuple(ticks)))


def saved_name(release: str, run_id: str) -> str:
    """Name of a session's file in pytest-benchmark's storage, behind its number. The vLLM release comes
    first: ``pytest-benchmark compare`` shows twelve characters of number and name.
    """
    return f"{release}-{run_id}"


def timing_into(benchmark: Any) -> Callable[..., None]:
    """A function that stores measured seconds (one value a replicate) as rounds of pytest-benchmark.

    Its table shows everything in s, ms or us and takes lower as better, so only times may be entries; what
    belongs to them and is none goes into ``extra``. ``renamed``: a word of the test's name, and what stands
    for it in the entry's name.
    """

    def store(values_s: Sequence[float], renamed: tuple[str, str] = ("", ""), **extra: object) -> None:
        benchmark.name, benchmark.fullname = (
            name.replace(*renamed) if renamed[0] else name for name in (benchmark.name, benchmark.fullname)
        )
        iterator: Iterator[float] = iter(values_s)
        benchmark.pedantic(
            lambda: VIRTUAL_CLOCK.advance(next(iterator)), rounds=len(values_s), iterations=1, warmup_rounds=0
        )
        benchmark.extra_info.update(extra)

    return store

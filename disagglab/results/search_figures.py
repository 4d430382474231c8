"""The figures of a search: numbers and plots for the report."""

from __future__ import annotations

from disagglab.results.objective import score
from disagglab.results.recorder import Recorder
from disagglab.results.search_record import Search, Trial
from disagglab.results.tuned_lab import arm_of

CHUNK = "max-num-batched-tokens"
GOOD_UNIT = "requests/s"


def record(recorder: Recorder, search: Search, command: str = "") -> None:
    """Keep what the search saw: per kind the figures of the confirmation, and two plots.

    Args:
        command: that made the search.
    """
    _numbers(recorder, search, command)
    _objective_by_rung(recorder, search)
    _gaps_by_chunk(recorder, search)


def _numbers(recorder: Recorder, search: Search, command: str) -> None:
    """Good requests per second and p99 ITL of winner and own setting on fresh prompts, a value a run."""
    for one in search.outcomes:
        if one.confirmed is None or one.winner is None:
            continue
        sides = ((one.kind, 0, "the lab's own setting"), (f"{one.kind}@winner", 1, one.winner.words))
        for arm, side, note in sides:
            runs = [pair[side] for pair in one.confirmed.pairs]
            good = [score([run]).good_per_s for run in runs]
            recorder.numbers(
                "good requests, fresh prompts", good, GOOD_UNIT, arm=arm, command=command, note=note
            )
            gaps = [run.itl_p99_s for run in runs if run.itl_p99_s is not None]
            if gaps:
                recorder.numbers("p99 ITL, fresh prompts", gaps, "s", arm=arm, command=command, note=note)


def _objective_by_rung(recorder: Recorder, search: Search) -> None:
    """Every trial of the search, a kind a colour."""
    names = search.rung_names
    series: dict[str, tuple[list[float], list[float]]] = {}
    for kind in search.settings:
        xs, ys = series.setdefault(kind, ([], []))
        for trial in search.trials:
            if trial.candidate.kind == kind and trial.seen is not None:
                xs.append(names.index(trial.rung))
                ys.append(score([trial.seen]).good_per_s)
    caption = (
        "one point a run; in each rung the better half of a kind's settings is left, by all of their runs"
    )
    _plot(
        recorder,
        f"Search on {search.workload}: good requests by rung",
        "rung",
        "good requests per second",
        series,
        caption,
        tuple(names),
    )


def _gaps_by_chunk(recorder: Recorder, search: Search) -> None:
    """p99 ITL against the chunk budget, where that was searched."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for trial in search.searched():
        budget = _budget(trial)
        if budget is not None and trial.seen is not None and trial.seen.itl_p99_s is not None:
            xs, ys = series.setdefault(trial.candidate.kind, ([], []))
            xs.append(budget)
            ys.append(trial.seen.itl_p99_s)
    caption = "one point a run; settings without a budget of their own, as the lab's, are left out"
    _plot(
        recorder,
        f"Search on {search.workload}: p99 ITL by chunk budget",
        f"{CHUNK}, tokens",
        "p99 ITL, s",
        series,
        caption,
    )


def _budget(trial: Trial) -> float | None:
    value = dict(trial.candidate.setting.args).get(CHUNK)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _plot(
    recorder: Recorder,
    title: str,
    x_label: str,
    y_label: str,
    series: dict[str, tuple[list[float], list[float]]],
    caption: str,
    ticks: tuple[str, ...] = (),
) -> None:
    """A plot of points; none where no series has one."""
    shown = {label: points for label, points in series.items() if points[0]}
    if shown:
        recorder.plot(title, x_label, y_label, shown, "points", caption, ticks)


def picks(search: Search) -> dict[str, str]:
    """The arm of each kind's pick, for ``run.json``; kinds of which no setting ran are left out."""
    return {one.kind: arm_of(one.kind, search) for one in search.outcomes if one.pick is not None}

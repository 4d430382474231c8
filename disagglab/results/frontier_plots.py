"""The figures of a frontier for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from disagglab.results import winner_map
from disagglab.results.dominance import words
from disagglab.results.frontier import Frontier, Point, pareto
from disagglab.results.plot import ROUNDS, ROUNDS_UP, WINNERS
from disagglab.results.promise import KINDS
from disagglab.results.rated_run import RatedRun
from disagglab.results.recorder import Recorder
from disagglab.results.standing import USUAL, Terms

NOBODY = "no way is ahead"
Series = Mapping[str, tuple[list[float], list[float]]]


def record(recorder: Recorder, frontier: Frontier, terms: Terms = USUAL) -> None:
    """Numbers of every point, and the figures: goodput, p99 ITL, tokens/s, winners.

    Raises:
        InvalidRun: see :func:`.standing.standings`.
    """
    said = ". ".join(words(frontier, terms=terms))
    for point in frontier.points():
        runs = frontier.at(point.arm, point.rate_per_s)
        recorder.numbers(
            f"goodput at {point.rate_per_s:.3g} requests/s",
            [run.good_per_s(frontier.promise) for run in runs],
            "requests/s",
            arm=point.arm,
            note=f"{frontier.promise}; {100 * point.good_share:.0f} % of sent; {point.tokens_per_s:.4g}"
            f" output tokens/s, {point.density:.4g} {_per(frontier)};"
            f" kept up in {point.kept_up} of {point.rounds}",
        )
    recorder.plot(
        "Goodput against offered rate",
        "offered requests/s",
        "good requests/s",
        by_rate(frontier, lambda run: run.good_per_s(frontier.promise)),
        ROUNDS,
        f"Good: {frontier.promise}. Points are rounds, lines their means. {said}.",
    )
    itl = by_rate(frontier, lambda run: run.itl_p99_s)
    if itl:
        recorder.plot(
            "p99 ITL against offered rate",
            "offered requests/s",
            "p99 ITL, s",
            itl,
            ROUNDS_UP,
            "Points are rounds, lines their means; the y axis is logarithmic. A p99 can sit on a cliff: see"
            " the share of gaps above a limit (disagglab frontier).",
        )
    best = ", ".join(f"{one.arm} at {one.rate_per_s:.3g}/s" for one in pareto(frontier.points()))
    recorder.plot(
        "Tokens/s per user against tokens/s for the hardware",
        "output tokens/s per user (1 / median TPOT)",
        f"output tokens/s {_per(frontier)}",
        tokens(frontier),
        ROUNDS,
        "A line joins the rates of an arm; points are rounds."
        f" Beaten by no other way in both: {best or 'none'}.",
    )
    for title, unit, of in _spent(frontier):
        found = against_users(frontier, of)
        if found:
            recorder.plot(
                f"{title} against tokens/s per user",
                "output tokens/s per user (1 / median TPOT)",
                unit,
                found,
                caption="A line joins the rates of an arm; means over rounds. docs/explanation/frontier.md",
            )
    winners = winners_by_limit(frontier, terms)
    if winners:
        recorder.plot(
            "Who is ahead, by load and promise",
            "offered requests/s",
            f"limit on {KINDS[winner_map.axis_of(frontier.promise) or 'tpot_s']}, s",
            winners,
            WINNERS,
            f"At {frontier.promise} with that limit changed: the way that is ahead of all other kinds; each"
            " mark is one look, so of many some will be wrong.",
        )


def by_rate(frontier: Frontier, of: Callable[[RatedRun], float | None]) -> Series:
    """For the style ROUNDS: rounds and means of each arm by rate; an arm that has no figure is left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for arm in frontier.arms:
        rounds: tuple[list[float], list[float]] = ([], [])
        means: tuple[list[float], list[float]] = ([], [])
        for rate in frontier.rates:
            values = [value for run in frontier.at(arm, rate) if (value := of(run)) is not None]
            rounds[0].extend([rate] * len(values))
            rounds[1].extend(values)
            if values:
                means[0].append(rate)
                means[1].append(sum(values) / len(values))
        if means[0]:
            found |= {f"{arm}, rounds": rounds, arm: means}
    return found


def tokens(frontier: Frontier) -> Series:
    """For the style ROUNDS: tokens/s per user and per GPU (else per node), an arm by ascending rate."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for arm in frontier.arms:
        place = frontier.footprints[arm]
        units = place.gpus or place.nodes
        runs = [run for rate in frontier.rates for run in frontier.at(arm, rate)]
        rounds = [(x, run.output_tokens / run.duration_s / units) for run in runs if (x := run.per_user)]
        means = [
            (point.tokens_per_s_user, point.density)
            for point in frontier.points()
            if point.arm == arm and point.tokens_per_s_user is not None
        ]
        if means:
            found[f"{arm}, rounds"] = ([x for x, _ in rounds], [y for _, y in rounds])
            found[arm] = ([x for x, _ in means], [y for _, y in means])
    return found


def against_users(frontier: Frontier, of: Callable[[Point], float | None]) -> Series:
    """What points cost by their tokens/s per user, an arm by ascending rate; arms without it are left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in frontier.points():
        user, spent = point.tokens_per_s_user, of(point)
        if user is not None and spent is not None:
            xs, ys = found.setdefault(point.arm, ([], []))
            xs.append(user)
            ys.append(spent)
    return found


def _spent(frontier: Frontier) -> Iterator[tuple[str, str, Callable[[Point], float | None]]]:
    """Title, unit and figure of what is spent, where a price or a counter tells it."""
    if frontier.price is not None:
        currency = frontier.price.currency
        yield "Cost of tokens", f"{currency} per 1M output tokens", lambda one: one.cost_per_million_tokens
        yield "Cost of good requests", f"{currency} per good request", lambda one: one.cost_per_good_request
    yield "Energy", "J per output token", lambda one: one.energy_j_token


def winners_by_limit(frontier: Frontier, terms: Terms = USUAL) -> Series:
    """For the style WINNERS: a series an answer, its points the rates and limits; empty where the promise has
    no second limit.
    """
    axis = winner_map.axis_of(frontier.promise)
    if axis is None:
        return {}
    rows = winner_map.grid(frontier.promise)
    own = next(row for row in rows if row[0].ttft_s == frontier.promise.ttft_s)
    (cells,) = winner_map.winner_map(frontier, [own], terms)
    found: dict[str, tuple[list[float], list[float]]] = {NOBODY: ([], [])}
    for cell in cells:
        for rate in frontier.rates:
            name = cell.winner_at(rate) or NOBODY
            xs, ys = found.setdefault(name, ([], []))
            xs.append(rate)
            ys.append(getattr(cell.promise, axis))
    return found


def _per(frontier: Frontier) -> str:
    return "per GPU" if any(place.gpus for place in frontier.footprints.values()) else "per node"

"""A frontier in words and tables of plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from disagglab import text
from disagglab.config.arms import AGAIN
from disagglab.results import winner_map
from disagglab.results.dominance import words
from disagglab.results.frontier import Frontier, Point, pareto
from disagglab.results.promise import limit_text
from disagglab.results.standing import ITL_P99, USUAL, Pair, Terms, goodput, pairs
from disagglab.stats.pooled import REFUTED_AT, Pooled

NONE = "-"
COLUMNS = (
    *("arm", "req/s", "rounds", "tokens/s", "/node", "/GPU", "/decode GPU", "prompt/prefill GPU", "/user"),
    *("TTFT p50 s", "p99 s", "ITL p99 s", "gaps late", "good/s", "good", "keeps up", "Pareto"),
)
COSTS = ("per 1M tokens", "per 1k good requests")
JOULES = ("J/token", "prefill J/token", "decode J/token")
KILO = 1000


def lines(frontier: Frontier, terms: Terms = USUAL, whole_map: bool = True) -> list[str]:
    """All that is said of a frontier.

    Args:
        whole_map: also the winners for limits around the promise.

    Raises:
        InvalidRun: see :func:`.standing.standings`.
    """
    found = [
        f"{frontier.workload}{f' ({frontier.stream})' if frontier.stream else ''}: good is a request with"
        f" {frontier.promise}",
        "",
        *words(frontier, terms=terms),
    ]
    if all(run.itl_p99_s is not None for run in frontier.runs):
        found += ["", "p99 ITL of all requests:", *words(frontier, ITL_P99, terms)]
    rows = _without_empty(table(frontier))
    found += ["", *text.table(rows, range(1, len(rows[0]))), "", *_notes(frontier)]
    found += ["", *variance_lines(frontier, terms), *twin_lines(frontier)]
    if whole_map:
        cells = winner_map.winner_map(frontier, terms=terms)
        found += ["", *winner_map.lines(cells, frontier.promise)]
    return [*found, *(f"left out: {line}" for line in frontier.left_out)]


def table(frontier: Frontier) -> list[tuple[str, ...]]:
    """A head, then a row for each point; columns of cost and energy where there is a price and a meter."""
    points = frontier.points()
    best = set(map(_key, pareto(points)))
    joules = any(point.energy_j_token is not None for point in points)
    head = COLUMNS + (COSTS if frontier.price else ()) + (JOULES if joules else ())
    rows = []
    for point in points:
        cells = [*_cells(point), "yes" if _key(point) in best else ""]
        if frontier.price:
            request = point.cost_per_good_request
            cells += [
                _cell(point.cost_per_million_tokens),
                _cell(None if request is None else KILO * request),
            ]
        if joules:
            cells += map(_cell, (point.energy_j_token, point.prefill_j_token, point.decode_j_token))
        rows.append(tuple(cells))
    return [head, *rows]


def variance_lines(frontier: Frontier, terms: Terms = USUAL) -> list[str]:
    """What the bands assume, pair by pair: how many times the binomial deviation a round's log-ratio of
    goodput has (1: requests are good independently of each other), and whether that stands for all rates.
    """
    rows = [("way", "other way", "times binomial", "degrees of freedom", "p of equal variances", "band")]
    seen = set()
    for (arm, rival), pair in pairs(frontier, terms=terms).items():
        if (rival, arm) in seen or not pair.place:
            continue
        seen.add((arm, rival))
        pooled = pair.pooled
        deviation, p = pooled.deviation, pooled.equal_p
        rows.append(
            (
                arm,
                rival,
                NONE if deviation is None else f"{deviation:.2g}",
                str(pooled.freedom),
                NONE if p is None else f"{p:.2g}",
                "none: one round"
                if all(len(point) == 1 for point in pooled.points)
                else "of all rates together"
                if pooled.equal
                else "of each rate alone",
            )
        )
    said = "bands of goodput: of each rate's own rounds, as asked for"
    if not terms.own_spread:
        said = (
            "bands of goodput: one multiple of the binomial variance for all rates of a pair, unless"
            f" Bartlett's test speaks against it (p <= {REFUTED_AT:g})"
        )
    return [said, *text.table(rows, (2, 3, 4))]


def twin_lines(frontier: Frontier) -> list[str]:
    """What two ways of the same servers, started again, leave open: a line for each twin.

    Student's t over the log-ratios of all rates and rounds together; the true ratio is 1 if turns are fair.
    """
    found = []
    for twin in filter(lambda arm: arm.endswith(AGAIN), frontier.arms):
        own = twin.removesuffix(AGAIN)
        pair = Pair.of(frontier, goodput(frontier), twin, own, own_spread=True)
        logs = tuple(log for point in pair.pooled.points for log in point)
        if not logs:
            continue
        band = Pooled((logs,)).band(0)
        said = f"{twin} against {own}, goodput of {len(logs)} pairs: {math.exp(band.mean):.3f} times"
        if not band.limited:
            found.append(f"{said}; one pair has no band")
            continue
        fair = band.low <= 0 <= band.high
        found.append(
            f"{said} [{math.exp(band.low):.3f}, {math.exp(band.high):.3f}]:"
            f" {'no difference is seen' if fair else 'turns do not treat them alike'}"
        )
    return found


def _without_empty(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows without the columns in which nothing is known."""
    kept = [n for n in range(len(rows[0])) if any(row[n] != NONE for row in rows[1:])]
    return [tuple(row[n] for n in kept) for row in rows]


def _key(point: Point) -> tuple[str, float]:
    return point.arm, point.rate_per_s


def _cells(point: Point) -> Iterator[str]:
    yield point.arm
    yield _cell(point.rate_per_s)
    yield str(point.rounds)
    for value in (
        *(point.tokens_per_s, point.tokens_per_s_node, point.tokens_per_s_gpu, point.tokens_per_s_decode_gpu),
        *(point.prompt_tokens_per_s_prefill_gpu, point.tokens_per_s_user, point.ttft_p50_s, point.ttft_p99_s),
        point.itl_p99_s,
    ):
        yield _cell(value)
    yield NONE if point.gaps_above is None else f"{100 * point.gaps_above:.2g} %"
    yield _cell(point.good_per_s)
    yield f"{100 * point.good_share:.0f} %"
    yield f"{point.kept_up} of {point.rounds}"


def _cell(value: float | None) -> str:
    return NONE if value is None else text.number(value)


def _notes(frontier: Frontier) -> Sequence[str]:
    promise = frontier.promise
    late = promise.itl_s if promise.itl_s is not None else promise.tpot_s
    found = []
    if any(place.gpus for place in frontier.footprints.values()):
        found.append("/GPU: over all GPUs of the way; /decode GPU: over those that decode")
    if late is not None:
        found.append(f"gaps late: share of gaps longer than {limit_text(late)}")
    if frontier.price:
        found.append(f"cost in {frontier.price.currency} at {frontier.price}, of all that the way occupies")
    if all(run.energy_j is None for run in frontier.runs):
        found.append("energy: not read (no GPU, or its driver does not say it)")
    else:
        found.append("energy: of the GPUs from before a run to its end, idle power with it")
    return found

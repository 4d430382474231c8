"""Which points of the break-even map are measured, and how what was measured stands to the map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from disagglab.config.workload import Workload
from disagglab.predict import breakeven
from disagglab.predict.breakeven import Cluster, Outcome, Point
from disagglab.stats.verdict import Verdict

MOST_USE = 0.85  # of any station; nearer to 1 a short run is far from equilibrium
LEAST_REQUESTS, MOST_REQUESTS = 6, 400  # of a run

Agreement = Literal["agrees", "disagrees", "undecided"]


@dataclass(frozen=True)
class Budget:
    """What one run may be. ``window_s``: in which its requests arrive; ``most_e2e_s``, ``most_tokens``: of a
    request.
    """

    window_s: float
    most_e2e_s: float
    most_tokens: int


def candidates(
    cluster: Cluster, prompts: Sequence[int], outputs: Sequence[int], loads: Sequence[float], budget: Budget
) -> list[Outcome]:
    """Points that a run of this length can show: nothing falls behind, and requests are many and short."""
    found = []
    for one in breakeven.grid(cluster, prompts, outputs, loads):
        requests = one.point.rate_per_s * budget.window_s
        sides = (one.replicated, one.disaggregated)
        if (
            one.point.prompt_tokens + one.point.output_tokens <= budget.most_tokens
            and all(max(side.use.values()) <= MOST_USE for side in sides)
            and max(side.e2e_s for side in sides) <= budget.most_e2e_s
            and LEAST_REQUESTS <= requests <= MOST_REQUESTS
        ):
            found.append(one)
    return found


def choose(found: Sequence[Outcome], count: int) -> list[Outcome]:
    """Points to measure, in turns the clearest win, the clearest loss, and the nearest to break-even.

    Of each kind one of another prompt length is preferred to its neighbour; of the losses, before that, one
    that something else decides. No point comes twice.
    """

    def clear(one: Outcome) -> float:
        return math.log(one.ratio())

    orders: list[Callable[[Outcome], float]] = [clear, lambda one: -clear(one), lambda one: abs(clear(one))]
    losses = 1  # place in orders
    chosen: list[Outcome] = []
    taken: list[list[Outcome]] = [[] for _ in orders]
    for kind in itertools.islice(itertools.cycle(range(len(orders))), min(count, len(found))):
        causes = {one.decided_by for one in taken[kind]} if kind == losses else set()
        prompts = {one.point.prompt_tokens for one in taken[kind]}
        rest = [one for one in found if one not in chosen]
        rest.sort(key=lambda o: (o.decided_by in causes, o.point.prompt_tokens in prompts, orders[kind](o)))
        chosen.append(rest[0])
        taken[kind].append(rest[0])
    return chosen


def workload(one: Outcome, window_s: float) -> Workload:
    """The run that measures a point of the map."""
    point = one.point
    name = f"break-even-{point.prompt_tokens}-{point.output_tokens}-{one.load:.2f}"
    return open_loop(name, point, window_s)


def open_loop(name: str, point: Point, window_s: float) -> Workload:
    """A run of a point: requests arrive at its rate for ``window_s`` seconds."""
    return Workload(
        name=name,
        prompt_tokens=point.prompt_tokens,
        output_tokens=point.output_tokens,
        requests=math.ceil(point.rate_per_s * window_s),
        rate_per_s=point.rate_per_s,
    )


def agreement(predicted: float, verdict: Verdict) -> Agreement:
    """Whether a verdict on disaggregated / replicated, lower being better, bears out a predicted ratio.

    An equivalence within the margin is borne out by a prediction within it.
    """
    match verdict.outcome:
        case "undecided":
            return "undecided"
        case "equivalent":
            return "agrees" if abs(math.log(predicted)) <= math.log1p(verdict.margin) else "disagrees"
        case _:
            return "agrees" if (verdict.outcome == "better") == (predicted < 1) else "disagrees"


def concordance(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Kendall's tau: pairs of points in the same order on both sides, less those in opposite order, as a
    share of all pairs.
    """
    signs = [
        math.copysign(1, (a - b) * (c - d)) if (a - b) * (c - d) else 0
        for (a, c), (b, d) in itertools.combinations(zip(predicted, measured, strict=True), 2)
    ]
    return sum(signs) / len(signs)

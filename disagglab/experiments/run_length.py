"""How many requests a run has: which lengths measure the same, and which of them tells most in the time."""

from __future__ import annotations

from collections.abc import Sequence

from disagglab.config.schema import GateSection
from disagglab.config.workload import Workload
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.pair_spread import cost_of_a_run, spread_of_arms
from disagglab.results.metrics import answers
from disagglab.stats.components import best_length, within
from disagglab.stats.metric import METRICS
from disagglab.stats.rule import ORDER_DRAWN, Rule, multiplier
from disagglab.stats.verdict import ALPHA

# Requests a run for each that is under way at once. With one, TTFT on two CPU cores was 35 % longer.
HELD = 2
LONGEST = 4  # times the workload's own number of requests; longer runs would leave too few rounds
ROUNDS_OF_A_LENGTH = 4  # before another is thought of: fewer would choose by chance


def lengths(workload: Workload, gates: Sequence[GateSection]) -> list[int]:
    """The lengths that runs of a workload may have, requests; its own alone where another would be another
    measurement.

    That is an open loop, whose queue depends on how long it lasts; a figure that depends on a run's length,
    see :class:`disagglab.stats.metric.Metric`; and a run in which the concurrency would not be reached and
    held.
    """
    own = workload.requests
    if workload.concurrency is None or any(METRICS[gate.metric].by_length for gate in gates):
        return [own]
    least = min(own, workload.concurrency * (HELD if workload.concurrency > 1 else 1))
    doubled = (least * 2**power for power in range((LONGEST * own).bit_length()))
    return sorted({own, *(length for length in doubled if length <= LONGEST * own)})


def shortest(workload: Workload, gates: Sequence[GateSection]) -> Workload:
    """The workload with the shortest runs that measure the same."""
    return workload.of_length(lengths(workload, gates)[0])


def length_of(
    comparison: Comparison,
    workload: Workload,
    gates: Sequence[GateSection],
    arms: Sequence[str],
    seconds: float,
    rule: Rule = ORDER_DRAWN,
) -> Workload:
    """The workload with runs of the length that makes the interval of its first gate with a baseline
    narrowest; the shortest until so many of its rounds show their spread (``ROUNDS_OF_A_LENGTH``).

    The spread within a run is that of all runs with several requests, the first round of a session above all,
    which has the workload's own length.

    Args:
        arms: whose runs tell the spread.
        seconds: for all runs of one arm.
    """
    short = shortest(workload, gates)
    judged = [gate for gate in gates if METRICS[gate.metric].each and gate.baseline]
    if not judged or short == workload:
        return short
    metric, stream = METRICS[judged[0].metric], judged[0].stream
    assert metric.each is not None  # by the choice of the gate
    runs = [run for arm in arms for run in comparison.valid(workload.name, arm)]
    inside = within([metric.each(answers(run, stream=stream)) for run in runs])
    alike = Comparison(
        [run for run in runs if run.workload.run_requests == short.run_requests], comparison.slo
    )
    found = spread_of_arms(alike, judged[0], arms)
    if inside is None or found is None or found.freedom < ROUNDS_OF_A_LENGTH - 1:
        return short
    cost = cost_of_a_run(alike, workload.name, judged[0].candidate)
    best = best_length(
        found,
        inside,
        short.run_requests,
        cost,
        lengths(workload, gates),
        seconds,
        lambda n: multiplier(n, ALPHA, rule),
    )
    return workload.of_length(best)

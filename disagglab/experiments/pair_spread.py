"""What is known of a workload's runs so far: how much a pair of them differs, and what a run takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.config.schema import GateSection
from disagglab.errors import InvalidRun
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.match import Match
from disagglab.stats import sequential
from disagglab.stats.components import RunCost, Spread, spread, upper_sd
from disagglab.stats.rule import ANY_TIME, Rule

CONFIDENCE_OF_PLANS = 0.8
OWN_PAIRS = 4  # from so many pairs on their own spread is taken, before that the one of all arms


def cost_of_a_run(comparison: Comparison, workload: str, arm: str) -> RunCost:
    """What a run of an arm takes, by its runs so far.

    Raises:
        InvalidRun: if none of its runs counts.
    """
    found = comparison.valid(workload, arm)
    if not found:
        raise InvalidRun(f"{workload}, {arm}: no valid run, so nothing is known of what a run takes")
    fixed = statistics.fmean((run.took_s or run.duration_s) - run.duration_s for run in found)
    each = statistics.fmean(run.duration_s / max(1, run.workload.run_requests) for run in found)
    return RunCost(fixed, each)


@dataclass(frozen=True)
class PairSpread:
    """Standard deviation of the log-ratio of a pair, its degrees of freedom, and by how much the rule takes a
    standard error for larger because neighbouring rounds are alike.
    """

    sd: float
    freedom: int
    inflation: float = 1.0

    def careful(self, rule: Rule) -> float:
        """What the deviation is below with 80 % confidence, as a rule takes it: what plans are made with.

        An estimate from few rounds is as often too small as too large, and a plan that believes the smallest
        of several sends its time where it is not enough.
        """
        wider = self.inflation if rule == ANY_TIME else 1.0
        return upper_sd(self.sd, self.freedom, CONFIDENCE_OF_PLANS) * wider


def pair_spread(
    comparison: Comparison, match: Match, baseline: str, arms: Sequence[str]
) -> PairSpread | None:
    """The spread of a gate's pairs with one of its baselines; None where nothing tells.

    Of few pairs it is taken from all arms of the workload, which together know it better.
    """
    ratios = [math.log(candidate / value) for value, candidate in match.pairs[baseline]]
    found = spread_of_arms(comparison, match.gate, arms) if match.gate.baseline else None
    if len(ratios) >= OWN_PAIRS or (found is None and len(ratios) > 1):
        return PairSpread(statistics.stdev(ratios), len(ratios) - 1, sequential.inflation(ratios))
    return PairSpread(found.of_a_pair, found.freedom) if found else None


def spread_of_arms(comparison: Comparison, gate: GateSection, arms: Sequence[str]) -> Spread | None:
    """Of all arms that were measured in the same rounds as the candidate."""
    table = []
    for arm in arms:
        pairs = comparison.pairs(gate.workload, gate.candidate, arm, gate.metric, gate.stream)
        table.append([value for _, value in pairs])
    longest = max(map(len, table), default=0)
    whole = [row for row in table if len(row) == longest]
    return spread(whole) if len(whole) > 1 and longest > 1 else None

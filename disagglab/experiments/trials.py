"""The plan of trials: in the time given, how long runs are, how many rounds each workload gets, and what that
will be able to decide.

It is made of what pilot rounds and all rounds since have shown: the spread of a pair, the seconds of a run,
and how large an effect is. Which arm an effect favours it never asks. It is made again after every round,
so time goes to gates that are open; that looking does no harm is the business of
:mod:`disagglab.stats.sequential`. docs/explanation/trials.md tells more.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagglab import text
from disagglab.config.arms import baselines, twin_of, twinned
from disagglab.config.schema import GateSection, Lab
from disagglab.config.workload import Workload
from disagglab.experiments.comparison import Comparison
from disagglab.experiments.match import Match, is_row_of, match_of, rule_of
from disagglab.experiments.pair_spread import cost_of_a_run, pair_spread
from disagglab.experiments.verdicts import verdict_rows
from disagglab.results.records import VerdictRow
from disagglab.stats.metric import METRICS
from disagglab.stats.rule import MOST_ROUNDS, ORDER_DRAWN, Rule, multiplier, quantile
from disagglab.stats.sample import LARGEST_LOG
from disagglab.stats.verdict import ALPHA, POWER

PILOT_ROUNDS = 2  # the fewest that show a spread


@dataclass(frozen=True)
class Outlook:
    """What is known of one gate. ``rounds``: pairs so far; ``pair_sd``: standard deviation of a pair's
    log-ratio, None where nothing tells; ``needed``: rounds in all after which it would be decided if effect
    and spread stay as they are, None where no number of rounds is foreseen.
    """

    gate: GateSection
    rule: Rule
    rounds: int
    pair_sd: float | None
    open: bool
    needed: int | None

    def half_width(self, rounds: int) -> float | None:
        """Of the interval after so many rounds, ratio - 1; None where that is not known, or not finite."""
        return self._reach(multiplier(rounds, ALPHA, self.rule), rounds)

    def detectable(self, rounds: int) -> float | None:
        """Smallest difference that so many rounds find with 80 % power, ratio - 1; None as above."""
        power = quantile(POWER, rounds - 1) if rounds > 1 else math.inf
        return self._reach(multiplier(rounds, ALPHA, self.rule) + power, rounds)

    def _reach(self, errors: float, rounds: int) -> float | None:
        if self.pair_sd is None or errors == math.inf:
            return None
        log = errors * self.pair_sd / math.sqrt(rounds)
        return math.expm1(log) if log < LARGEST_LOG else None


@dataclass(frozen=True)
class Share:
    """What one workload gets. ``arms``: of a round; ``round_s``: what a round takes, s; ``done``: rounds so
    far; ``planned``: more.
    """

    workload: Workload
    arms: tuple[str, ...]
    round_s: float
    done: int
    planned: int
    outlooks: tuple[Outlook, ...]

    @property
    def open(self) -> bool:
        """Whether one of its gates is."""
        return any(one.open for one in self.outlooks)


@dataclass(frozen=True)
class TrialPlan:
    """``budget_s``: for all of the comparison; ``left_s``: of it; ``shares``: by workload."""

    budget_s: float
    left_s: float
    shares: tuple[Share, ...]

    def following(self) -> Share | None:
        """The workload whose round is next: the one that has made the smallest part of its rounds; None when
        nothing is planned.
        """
        wanting = [one for one in self.shares if one.planned]
        return min(wanting, key=lambda one: one.done / (one.done + one.planned)) if wanting else None

    def lines(self) -> list[str]:
        """The plan as people read it."""
        head = ("workload", "arms of a round", "requests", "rounds", "s a round")
        rows = [
            (
                one.workload.name,
                ", ".join(one.arms),
                str(one.workload.total_requests),
                f"{one.done} + {one.planned}",
                f"{one.round_s:.1f}",
            )
            for one in self.shares
        ]
        gates = ("gate", "now", "decided after", "interval then", "smallest detectable then")
        outlooks = [_outlook(share, one) for share in self.shares for one in share.outlooks]
        taken = sum(one.planned * one.round_s for one in self.shares)
        return [
            f"plan of trials: {self.left_s:.0f} of {self.budget_s:.0f} s are left, {taken:.0f} s are planned",
            *text.table([head, *rows], right={2, 3, 4}),
            *text.table([gates, *outlooks]),
        ]

    def as_json(self) -> dict[str, object]:
        """For ``run.json``: the forecast, before what it is about is measured."""
        return {
            "budget_s": self.budget_s,
            "left_s": self.left_s,
            "workloads": [
                {
                    "workload": share.workload.name,
                    "arms": list(share.arms),
                    "requests": share.workload.total_requests,
                    "round_s": share.round_s,
                    "done": share.done,
                    "planned": share.planned,
                    "gates": [
                        {
                            "figure": one.gate.figure,
                            "open": one.open,
                            "pair_sd": one.pair_sd,
                            "needed": one.needed,
                            "half_width": one.half_width(share.done + share.planned),
                            "smallest_detectable": one.detectable(share.done + share.planned),
                        }
                        for one in share.outlooks
                    ],
                }
                for share in self.shares
            ],
        }


def _outlook(share: Share, one: Outlook) -> tuple[str, ...]:
    rounds = share.done + share.planned
    after = "-" if not one.open else f"{one.needed} rounds" if one.needed else "not foreseen"
    reached = (one.half_width(rounds), one.detectable(rounds))
    return (
        f"{share.workload.name} {one.gate.figure}",
        "open" if one.open else "decided",
        after,
        *("not known" if value is None else text.margin(value) for value in reached),
    )


def arms_needed(
    gates: Sequence[GateSection], ways: Sequence[str] = (), arms: Sequence[str] = ()
) -> tuple[str, ...]:
    """The arms of a round that judges these gates, baselines first; ways stand beside the candidate.

    Args:
        arms: all of the session, among which a gate against the best has its baselines.
    """
    against = (arm for gate in gates for arm in baselines(gate, arms))
    return tuple(dict.fromkeys((*against, *(gate.candidate for gate in gates), *ways)))


def twin_needed(gates: Sequence[GateSection], arms: Sequence[str] = ()) -> str | None:
    """The arm whose only difference from the gates' baseline is noise; None without a baseline.

    Args:
        arms: see :func:`arms_needed`.
    """
    found = (twinned(gate, arms) for gate in gates)
    return next((twin_of(arm) for arm in found if arm), None)


def outlook(
    comparison: Comparison,
    gate: GateSection,
    arms: Sequence[str],
    is_open: bool,
    rule: Rule = ORDER_DRAWN,
    alpha: float = ALPHA,
) -> Outlook:
    """What is known of a gate after the rounds so far.

    Args:
        arms: all of the workload, which tell the spread together while pairs are few.
        alpha: that a decision takes.
    """
    match = match_of(comparison, gate)
    rule = rule_of(gate, rule)
    if not match.whole:
        return Outlook(gate, rule, match.rounds, None, is_open, None)
    spreads = {name: pair_spread(comparison, match, name, arms) for name in match.pairs}
    known = [(_mean(match, name), found.careful(rule)) for name, found in spreads.items() if found]
    needed = None
    if len(known) == len(spreads):
        needed = rounds_to_decide(gate, known, match.rounds, rule, alpha)
    picked = spreads[match.judge(rule).baseline]
    return Outlook(gate, rule, match.rounds, picked.sd if picked else None, is_open, needed)


def _mean(match: Match, baseline: str) -> float:
    return statistics.fmean(math.log(candidate / value) for value, candidate in match.pairs[baseline])


def rounds_to_decide(
    gate: GateSection,
    known: Sequence[tuple[float, float]],
    rounds: int,
    rule: Rule,
    alpha: float = ALPHA,
) -> int | None:
    """Rounds in all after which a gate would be decided: its interval would exclude no difference, lie within
    the margin or, where not to be worse is enough, stay within the margin on the bad side.

    Args:
        known: mean and standard deviation of the log-ratios with each baseline, which are taken to stay as
            they are; of several the best counts, see :mod:`disagglab.stats.best`.
    """
    bound = math.log1p(gate.margin)
    turned = 1 if METRICS[gate.metric].better == "lower" else -1
    means, deviations = [turned * mean for mean, _ in known], [sd for _, sd in known]

    def decides(total: int) -> bool:
        bad, good = (
            [errors * sd / math.sqrt(total) if errors < math.inf else math.inf for sd in deviations]
            for errors in (multiplier(total, level, rule) for level in (alpha, alpha / len(known)))
        )
        high = max(mean + half for mean, half in zip(means, bad, strict=True))
        low = max(mean - half for mean, half in zip(means, good, strict=True))
        met = gate.want == "not worse" and high <= bound
        return met or high < 0 or low > 0 or (-bound <= low and high <= bound)

    return next((total for total in range(max(2, rounds), MOST_ROUNDS + 1) if decides(total)), None)


def plan(
    comparison: Comparison,
    lab: Lab,
    workloads: Sequence[Workload],
    arms: Mapping[str, Sequence[str]],
    budget_s: float,
    left_s: float,
    rule: Rule = ORDER_DRAWN,
) -> TrialPlan:
    """Divide the time that is left among workloads with open gates.

    First what takes least to be decided, since that decides most in a given time; what is left then goes to
    those that it will not decide, so that they too get narrower.

    Args:
        lab: whose gates are judged.
        workloads: with the lengths that their runs have.
        arms: of a round, by workload. One of which an arm has no valid run yet gets no rounds: what broke it
            would break them as well.
    """
    measured = tuple(gate for gate in lab.gates if match_of(comparison, gate).whole)
    rows = verdict_rows(comparison, lab.model_copy(update={"gates": measured}), rule)
    decided = [gate for gate, row in zip(measured, rows, strict=False) if not row.open]
    still = [gate for gate in lab.gates if gate not in decided]
    alpha = ALPHA / max(1, len(still))  # Holm's step for the first of those that are open
    shares = []
    for workload in workloads:
        own = tuple(arms[workload.name])
        if not all(comparison.valid(workload.name, arm) for arm in own):
            continue
        seen = dict.fromkeys(run.topology for run in comparison.runs if run.workload.name == workload.name)
        outlooks = tuple(
            outlook(comparison, gate, list(seen), gate in still, rule, alpha)
            for gate in lab.gates
            if gate.workload == workload.name
        )
        round_s = sum(cost_of_a_run(comparison, workload.name, arm).of(workload.run_requests) for arm in own)
        done = max((one.rounds for one in outlooks), default=0)
        shares.append(Share(workload, own, round_s, done, 0, outlooks))
    return TrialPlan(budget_s, left_s, tuple(divided(shares, left_s)))


def with_outlook(rows: Sequence[VerdictRow], found: TrialPlan) -> list[VerdictRow]:
    """The rows, with the minutes that open gates would take, by a plan of what was measured."""
    minutes = [
        (one.gate, max(1, round(max(1, one.needed - share.done) * share.round_s / 60)))
        for share in found.shares
        for one in share.outlooks
        if one.open and one.needed
    ]

    def more(row: VerdictRow) -> int | None:
        found = (
            left
            for gate, left in minutes
            if (gate.workload, gate.figure) == (row.workload, row.metric)
            and is_row_of(gate, row.candidate, row.baseline)
        )
        return next(found, None) if row.gate.of_a_gate else None

    return [
        dataclasses.replace(row, gate=dataclasses.replace(row.gate, minutes=left, underpowered=False))
        if (left := more(row))
        else row
        for row in rows
    ]


def divided(shares: Sequence[Share], left_s: float) -> list[Share]:
    """The shares with the rounds that each gets of the seconds that are left; see :func:`plan`."""
    planned = dict.fromkeys((one.workload.name for one in shares), 0)
    wanted = sorted(
        (max(1, one.needed - share.done) * share.round_s, share.workload.name, one.needed - share.done)
        for share in shares
        for one in share.outlooks
        if one.open and one.needed
    )
    seconds = {share.workload.name: share.round_s for share in shares}
    for _, name, more in wanted:
        rounds = min(max(1, more) - planned[name], int(left_s / seconds[name]))
        if rounds > 0:
            planned[name] += rounds
            left_s -= rounds * seconds[name]
    for share in sorted(shares, key=lambda one: one.round_s):
        if share.open and not planned[share.workload.name]:
            rounds = int(left_s / share.round_s)
            planned[share.workload.name] += rounds
            left_s -= rounds * share.round_s
    return [
        Share(one.workload, one.arms, one.round_s, one.done, planned[one.workload.name], one.outlooks)
        for one in shares
    ]

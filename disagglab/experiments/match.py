"""What a gate compares: its candidate with a baseline, with the best of all other ways, or with a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagglab.config.arms import BEST, baselines
from disagglab.config.schema import GateSection
from disagglab.experiments.comparison import Comparison
from disagglab.stats.best import BestVerdict, best_gate_p, judge_best
from disagglab.stats.metric import METRICS
from disagglab.stats.rule import ANY_TIME, ORDER_DRAWN, Rule

LIMIT = "limit"  # in the place of a baseline, where a gate compares with a value of the lab file
OF_BEST = f"{BEST}: "  # before the baseline that was picked


@dataclass(frozen=True)
class Match:
    """Runs of the same rounds. ``pairs``: (baseline, candidate) of each round, by baseline: one of them, or
    with ``best`` all from which the best is picked.
    """

    gate: GateSection
    candidate: str
    pairs: Mapping[str, Sequence[tuple[float, float]]]
    best: bool = False

    @property
    def lacking(self) -> tuple[str, ...]:
        """The baselines without a pair."""
        return tuple(name for name, found in self.pairs.items() if not found)

    @property
    def whole(self) -> bool:
        """Whether there is something to compare with, and a pair with each of it."""
        return bool(self.pairs) and not self.lacking

    @property
    def rounds(self) -> int:
        """The fewest pairs with any baseline."""
        return min(map(len, self.pairs.values()), default=0)

    def judge(self, rule: Rule) -> BestVerdict:
        """The verdict, and with which baseline.

        Raises:
            InvalidRun: if it is not whole.
        """
        return judge_best(
            self.pairs, METRICS[self.gate.metric].better, self.gate.margin, rule_of(self.gate, rule)
        )

    def p(self, rule: Rule) -> float:
        """Of the gate's hypothesis.

        Raises:
            InvalidRun: if it is not whole.
        """
        gate = self.gate
        better = METRICS[gate.metric].better
        return best_gate_p(self.pairs, better, gate.margin, gate.want, rule_of(gate, rule))

    def called(self, baseline: str) -> str:
        """The baseline as reports name it: ``best: replicated@tuned`` where it was picked."""
        return f"{OF_BEST}{baseline}" if self.best else baseline


def match_of(comparison: Comparison, gate: GateSection) -> Match:
    """What a gate asks for, of the runs that there are.

    The best is that of all arms that were measured on the workload, also of those without a run that counts:
    what is lacking is not left out in silence.
    """
    if gate.limit is not None:
        own = comparison.pairs(gate.workload, gate.candidate, gate.candidate, gate.metric, gate.stream)
        return Match(gate, gate.candidate, {LIMIT: [(gate.limit, value) for _, value in own]})
    measured = comparison.arms(gate.workload, counted=False)
    found = {
        arm: comparison.pairs(gate.workload, arm, gate.candidate, gate.metric, gate.stream)
        for arm in baselines(gate, measured)
    }
    return Match(gate, gate.candidate, found, gate.baseline == BEST)


def between(comparison: Comparison, gate: GateSection, baseline: str, candidate: str) -> Match:
    """Two arms by the figure and the margin of a gate, whatever it compares itself."""
    pairs = comparison.pairs(gate.workload, baseline, candidate, gate.metric, gate.stream)
    return Match(gate.model_copy(update={"limit": None}), candidate, {baseline: pairs})


def rule_of(gate: GateSection, rule: Rule) -> Rule:
    """The rule for one gate of a session: a limit is no arm, so no order of arms was drawn with it."""
    return ANY_TIME if gate.limit is not None and rule == ORDER_DRAWN else rule


def is_row_of(gate: GateSection, candidate: str, baseline: str) -> bool:
    """Whether a verdict with these names is that of a gate, as far as they tell."""
    asked = BEST if baseline.startswith(OF_BEST) else baseline
    return (gate.candidate, gate.baseline or LIMIT) == (candidate, asked)

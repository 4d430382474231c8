"""A candidate against the best of several baselines, corrected for the best having been picked.

Let d(i) be the true log-ratio of candidate and baseline i, counted so that more is better. Over the best of k
baselines the candidate gains d = min d(i). Each pair of arms has an interval from L(i) to U(i).

- From below, min L(i) is a limit of d without any correction: to claim more than d, the interval of the very
  baseline with d(i) = d would have to fail (intersection-union test; R. Berger, Multiparameter hypothesis
  testing and acceptance sampling, Technometrics 24, 1982).
- From above, min U(i) falls below d as soon as one of the k intervals fails, and the smallest of k estimates
  is more likely than any one of them to have had bad luck. So each U(i) is at alpha / k (union bound).

The interval thus holds d with 1 - alpha and reaches further to the good side, as those of J. Hsu, Constrained
simultaneous confidence intervals for multiple comparisons with the best, Ann. Statist. 12 (1984), do. It asks
nothing of how the baselines hang together, which they do: all are paired with the same runs of the candidate.
With one baseline it is the verdict of :func:`disagglab.stats.verdict.judge`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagglab.errors import InvalidRun
from disagglab.stats.metric import Direction
from disagglab.stats.rule import FIXED, Rule
from disagglab.stats.sample import Limits, Sample, log_ratios, sample_of
from disagglab.stats.verdict import ALPHA, Verdict, Want, concluded, gate_p, sign_flip_p

Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class BestVerdict:
    """``verdict``: of candidate / best baseline; ``baseline``: which of them looked best, and was compared;
    ``among``: all of them.

    ``verdict.effect`` is the measured one against ``baseline``. It is below the true gain on average, by the
    luck of the pick; the interval allows for that. ``verdict.smallest_detectable`` is at alpha / k, the wider
    side; ``verdict.rounds`` are the fewest that any baseline has.
    """

    verdict: Verdict
    baseline: str
    among: tuple[str, ...]

    @property
    def k(self) -> int:
        """How many baselines there were to pick from."""
        return len(self.among)


def judge_best(
    pairs: Mapping[str, Pairs], better: Direction, margin: float, rule: Rule = "fixed-n"
) -> BestVerdict:
    """Judge a candidate against the best of these baselines.

    Args:
        pairs: (baseline, candidate) by name of the baseline, one a round, in the order of measuring. A round
            that one baseline lacks may stand at the others.
        better, margin, rule: see :func:`disagglab.stats.verdict.judge`.

    Raises:
        InvalidRun: if there is no baseline, or one has no pair or a value that is not a positive finite
            number; the message names it.
    """
    ratios = _ratios(pairs)
    samples = {name: sample_of(found) for name, found in ratios.items()}
    # below 0 where the candidate is better
    badness = {name: one if better == "lower" else _turned(one) for name, one in samples.items()}
    picked = max(badness, key=lambda name: badness[name].mean)
    every, bad, k = list(samples.values()), list(badness.values()), len(samples)
    p = _p(bad, rule), _flipped(list(ratios.values()), bad)
    limits, fixed = _limits(every, better, rule), _limits(every, better, FIXED)
    verdict = concluded(samples[picked], limits, fixed, better, margin, rule, p, ALPHA / k)
    if k > 1:
        verdict = dataclasses.replace(
            verdict, rounds=min(map(len, ratios.values())), reason=_reason(verdict, ratios, picked)
        )
    return BestVerdict(verdict, picked, tuple(samples))


def best_gate_p(
    pairs: Mapping[str, Pairs], better: Direction, margin: float, want: Want, rule: Rule = "fixed-n"
) -> float:
    """p of a gate's hypothesis against the best of these baselines, on the scale of a two-sided test: the
    largest of those against each alone, since the hypothesis is refuted where each of them is.

    Raises:
        InvalidRun: see :func:`judge_best`.
    """
    _ratios(pairs)
    return max(gate_p(found, better, margin, want, rule) for found in pairs.values())


def _ratios(pairs: Mapping[str, Pairs]) -> dict[str, list[float]]:
    if not pairs:
        raise InvalidRun("no baseline to compare with")
    found = {}
    for name, values in pairs.items():
        try:
            found[name] = log_ratios(values)
        except InvalidRun as error:
            raise InvalidRun(f"baseline {name}: {error}") from error
    return found


def _turned(sample: Sample) -> Sample:
    return dataclasses.replace(sample, mean=-sample.mean)


def over_best(near: Sequence[Limits], far: Sequence[Limits]) -> Limits:
    """Limits of the smallest of several log-ratios, where higher figures are better.

    Args:
        near: of each at alpha; ``far``: of each at alpha over their number.
    """
    return min(low for low, _ in near), min(high for _, high in far)


def _limits(samples: Sequence[Sample], better: Direction, rule: Rule) -> Limits:
    turned = samples if better == "higher" else [_turned(one) for one in samples]
    near, far = ([one.limits(rule, alpha) for one in turned] for alpha in (ALPHA, ALPHA / len(samples)))
    low, high = over_best(near, far)
    return (low, high) if better == "higher" else (-high, -low)


def _p(badness: Sequence[Sample], rule: Rule) -> float:
    """Two-sided: at alpha it says whether the interval excludes no difference, and on either side."""
    for_better = max(one.p_above(0.0, rule) for one in badness)
    for_worse = len(badness) * min(_turned(one).p_above(0.0, rule) for one in badness)
    return min(1.0, for_better, for_worse)


def _flipped(ratios: Sequence[Sequence[float]], badness: Sequence[Sample]) -> float:
    """The same by turning signs, each pair of arms alone."""
    worse = [each for each, one in zip(ratios, badness, strict=True) if one.mean >= 0]
    if worse:
        return min(1.0, len(ratios) * min(map(sign_flip_p, worse)))
    return max(map(sign_flip_p, ratios))


def _reason(verdict: Verdict, ratios: Mapping[str, Sequence[float]], picked: str) -> str:
    others = [name for name in ratios if name != picked]
    said = f"{verdict.reason}; against the best of {len(ratios)} other ways ({', '.join([picked, *others])})"
    if len({len(found) for found in ratios.values()}) > 1:
        counts = ", ".join(f"{len(found)} with {name}" for name, found in ratios.items())
        said += f"; pairs differ in number: {counts}"
    return said

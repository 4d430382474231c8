"""A gate as a file: pairs of figures, one a round, judged as the gates of a lab are.

``{"metric": "itl_p99", "better": "lower", "margin": 0.05, "pairs": [[baseline, candidate], …]}``

With ``"sequential": true`` pairs may be appended later and the file judged again, as often as one likes. In
the place of ``pairs`` a candidate may have several baselines, of which the best counts:

``{…, "candidate": [0.8, 0.9], "baselines": {"replicated": [1.0, 1.1], "sharded": [0.9, 1.0]}}``
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disagglab import jsonfile
from disagglab.errors import ConfigError, Problem
from disagglab.problems import problems_of
from disagglab.stats.best import BestVerdict, judge_best
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import Rule, held_back, rounds_needed

Figure = Annotated[float, Field(gt=0, allow_inf_nan=False)]
EXAMPLE = "see docs/reference/metrics.md for an example"


class GateFile(BaseModel):
    """What a file asks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    metric: str = Field(min_length=1, description="name of the figure")
    better: Direction = Field(description='"lower" or "higher"')
    margin: float = Field(gt=0, lt=1, description="share below which the two are equivalent: 0.05 for 5 %")
    pairs: tuple[tuple[Figure, Figure], ...] = Field(
        default=(),
        description="[baseline, candidate] of each round, in the order of measuring; leave out rounds with an"
        " invalid run",
    )
    candidate: tuple[Figure, ...] = Field(
        default=(), description="in place of pairs, beside baselines: the candidate's value of each round"
    )
    baselines: dict[str, tuple[Figure, ...]] = Field(
        default={},
        description="in place of pairs: by name of the baseline its value of each round, as many as candidate"
        " has; the candidate is judged against the best of them",
    )
    family: int = Field(
        default=1,
        ge=1,
        description="gates that are judged together, this one included: p is taken times that",
    )
    sequential: bool = Field(
        default=False,
        description="whether the number of pairs depends on what was seen, as where one is added after"
        " another until something is decided; false: it was fixed before the first",
    )

    @property
    def rule(self) -> Rule:
        """What the interval has to hold for."""
        return "any time" if self.sequential else "fixed-n"

    @property
    def by_baseline(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """(baseline, candidate) of each round, by name of the baseline; one without a name where the file has
        pairs.
        """
        if self.pairs:
            return {"": self.pairs}
        return {
            name: tuple(zip(values, self.candidate, strict=True)) for name, values in self.baselines.items()
        }

    def judge(self) -> BestVerdict:
        """The verdict on the file's pairs, and with which baseline."""
        return judge_best(self.by_baseline, self.better, self.margin, self.rule)


def read(path: Path) -> GateFile:
    """Read a gate file.

    Raises:
        ConfigError: naming file and key, if it is missing or malformed, or a value is no positive finite
        number.
    """
    raw = jsonfile.read(path, mend=EXAMPLE)
    try:
        gate = GateFile.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError(problems_of(error, str(path), GateFile)) from error
    problems = list(_contradictions(gate, str(path)))
    if problems:
        raise ConfigError(problems)
    return gate


def _contradictions(gate: GateFile, file: str) -> Iterator[Problem]:
    """Pairs and several baselines at once, or neither; a baseline that lacks a round."""
    several = bool(gate.candidate or gate.baselines)
    if gate.pairs and several:
        yield Problem(file, "pairs", "given beside candidate or baselines", "write one of the two forms")
    elif several and not (gate.candidate and gate.baselines):
        key = "baselines" if gate.candidate else "candidate"
        yield Problem(file, key, "missing, and the other of the two is there", EXAMPLE)
    elif not gate.pairs and not several:
        yield Problem(file, "pairs", "none", f"add [baseline, candidate] of each round; {EXAMPLE}")
    for name, values in gate.baselines.items():
        if gate.candidate and len(values) != len(gate.candidate):
            wrong = f"{len(values)} values, and candidate has {len(gate.candidate)}"
            yield Problem(file, f"baselines.{name}", wrong, "leave out rounds that one of them lacks")


def as_dict(gate: GateFile, found: BestVerdict) -> dict[str, object]:
    """A verdict for JSON: ``effect``, ``ci``, ``ci_fixed_n`` and ``mde`` as ratio - 1; what so few rounds
    cannot tell is null. ``rounds_needed``: a forecast, null where it is decided or more than 1,000, and with
    several baselines. ``baseline``: the one that was picked, where the file names several; ``among``: them.
    """
    verdict = found.verdict
    needed = None
    if gate.pairs and verdict.outcome == "undecided":
        needed = rounds_needed(gate.pairs, gate.margin, gate.rule)
    named = {"baseline": found.baseline, "among": list(found.among)} if gate.baselines else {}
    # Holm's own factor needs the p of the others; that of Bonferroni, his first step, is never smaller
    p_adjusted = min(1.0, verdict.p * gate.family)
    said = held_back(verdict.outcome, verdict.p, p_adjusted, gate.family)
    if verdict.outcome == "equivalent":  # which is no matter of p
        said = ""
    return {
        "metric": gate.metric,
        **named,
        "verdict": verdict.outcome,
        "effect": verdict.effect,
        "rule": verdict.rule,
        "ci": _limits(verdict.low, verdict.high),
        "ci_fixed_n": _limits(verdict.fixed_low, verdict.fixed_high),
        "mde": verdict.smallest_detectable,
        "margin": verdict.margin,
        "rounds": verdict.rounds,
        "rounds_needed": needed,
        "underpowered": verdict.underpowered,
        "p": verdict.p,
        "p_adjusted": p_adjusted,
        "p_sign_flip": verdict.p_sign_flip,
        "reason": f"{verdict.reason}; {said}" if said else verdict.reason,
    }


def _limits(low: float, high: float) -> list[float | None] | None:
    if math.isfinite(high):
        return [low, high]
    return [low, None] if low > -1 else None

"""A gate as a file: pairs of figures, one a round, judged as the gates of a lab are.

``{"metric": "itl_p99", "better": "lower", "margin": 0.05, "pairs": [[baseline, candidate], …]}``

With ``"sequential": true`` pairs may be appended later and the file judged again, as often as one likes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disagglab import jsonfile
from disagglab.errors import ConfigError
from disagglab.problems import problems_of
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import Rule, Verdict, held_back, judge, rounds_needed

Figure = Annotated[float, Field(gt=0, allow_inf_nan=False)]
EXAMPLE = "see docs/reference/metrics.md for an example"


class GateFile(BaseModel):
    """What a file asks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    metric: str = Field(min_length=1, description="name of the figure")
    better: Direction = Field(description='"lower" or "higher"')
    margin: float = Field(gt=0, lt=1, description="share below which the two are equivalent: 0.05 for 5 %")
    pairs: tuple[tuple[Figure, Figure], ...] = Field(
        min_length=1,
        description="[baseline, candidate] of each round, in the order of measuring; leave out rounds with an"
        " invalid run",
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

    def judge(self) -> Verdict:
        """The verdict on the file's pairs."""
        return judge(self.pairs, self.better, self.margin, self.rule)


def read(path: Path) -> GateFile:
    """Read a gate file.

    Raises:
        ConfigError: naming file and key, if it is missing or malformed, or a value is no positive finite
        number.
    """
    raw = jsonfile.read(path, mend=EXAMPLE)
    try:
        return GateFile.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError(problems_of(error, str(path), GateFile)) from error


def as_dict(gate: GateFile, verdict: Verdict) -> dict[str, object]:
    """A verdict for JSON: ``effect``, ``ci``, ``ci_fixed_n`` and ``mde`` as ratio - 1; what so few rounds
    cannot tell is null. ``rounds_needed``: a forecast, null where it is decided or more than 1,000.
    """
    needed = rounds_needed(gate.pairs, gate.margin, gate.rule) if verdict.outcome == "undecided" else None
    # Holm's own factor needs the p of the others; that of Bonferroni, his first step, is never smaller
    p_adjusted = min(1.0, verdict.p * gate.family)
    said = held_back(verdict.outcome, verdict.p, p_adjusted, gate.family)
    if verdict.outcome == "equivalent":  # which is no matter of p
        said = ""
    return {
        "metric": gate.metric,
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


def _limits(low: float, high: float) -> list[float] | None:
    return [low, high] if math.isfinite(high) else None

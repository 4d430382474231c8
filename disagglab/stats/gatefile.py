"""A gate as a file: pairs of figures, one a round, judged as the gates of a lab are.

``{"metric": "itl_p99", "better": "lower", "margin": 0.05, "pairs": [[baseline, candidate], …]}``
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from disagglab.errors import ConfigError, Problem
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import Verdict, judge

KEYS = ("metric", "better", "margin", "pairs")


@dataclass(frozen=True)
class GateFile:
    """What a file asks: ``pairs`` are (baseline, candidate); ``margin``: share below which they are
    equivalent.
    """

    metric: str
    better: Direction
    margin: float
    pairs: tuple[tuple[float, float], ...]

    def judge(self) -> Verdict:
        """The verdict on the file's pairs."""
        return judge(self.pairs, self.better, self.margin)


def read(path: Path) -> GateFile:
    """Read a gate file.

    Raises:
        ConfigError: naming file and key, if it is missing or malformed, or a value is no positive finite
        number.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _problem(path, "(whole file)", str(error.strerror or error), "name a gate file") from error
    except (ValueError, RecursionError) as error:
        raise _problem(
            path, "(whole file)", f"not JSON: {error}", "see docs/reference/metrics.md for an example"
        ) from error
    if not isinstance(raw, Mapping):
        raise _problem(path, "(whole file)", "not an object", f"give {', '.join(KEYS)}")
    for key in raw:
        if key not in KEYS:
            raise _problem(path, str(key), "unknown key", f"the keys are {', '.join(KEYS)}")
    for key in KEYS:
        if key not in raw:
            raise _problem(path, key, "missing", f"give {', '.join(KEYS)}")
    if not isinstance(raw["metric"], str) or not raw["metric"]:
        raise _problem(path, "metric", f"{raw['metric']!r:.60} is not a name", "name the figure")
    if raw["better"] not in get_args(Direction):
        raise _problem(path, "better", f"{raw['better']!r:.60}", 'write "lower" or "higher"')
    margin = raw["margin"]
    if not _is_positive(margin) or margin >= 1:
        raise _problem(path, "margin", f"{margin!r:.60} is not between 0 and 1", "write 0.05 for 5 %")
    return GateFile(raw["metric"], raw["better"], float(margin), _pairs(path, raw["pairs"]))


def _pairs(path: Path, raw: Any) -> tuple[tuple[float, float], ...]:
    if not isinstance(raw, list) or not raw:
        raise _problem(path, "pairs", "no pair", "give [baseline, candidate] of at least one round")
    pairs = []
    for number, pair in enumerate(raw):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _problem(path, f"pairs[{number}]", f"{pair!r:.60} is no pair", "give [baseline, candidate]")
        for value in pair:
            if not _is_positive(value):
                wrong = f"{value!r:.60} is not a positive finite number"
                raise _problem(path, f"pairs[{number}]", wrong, "leave out rounds with an invalid run")
        pairs.append((float(pair[0]), float(pair[1])))
    return tuple(pairs)


def _is_positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and float(value) > 0
    except OverflowError:
        return False


def _problem(path: Path, key: str, wrong: str, mend: str) -> ConfigError:
    return ConfigError([Problem(str(path), key, wrong, mend)])


def as_dict(gate: GateFile, verdict: Verdict) -> dict[str, object]:
    """A verdict for JSON: ``effect``, ``ci`` and ``mde`` as ratio - 1; what one round cannot tell is null."""
    decided = math.isfinite(verdict.high)
    return {
        "metric": gate.metric,
        "verdict": verdict.outcome,
        "effect": verdict.effect,
        "ci": [verdict.low, verdict.high] if decided else None,
        "mde": verdict.smallest_detectable,
        "margin": verdict.margin,
        "rounds": verdict.rounds,
        "underpowered": verdict.underpowered,
        "p": verdict.p,
        "p_sign_flip": verdict.p_sign_flip,
        "reason": verdict.reason,
    }

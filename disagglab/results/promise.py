"""A promise: which limits a request has to keep to be a good one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from disagglab.config.schema import SloSection

LATE_SHARE = 0.01  # of a request's gaps may be longer than the limit: what "p99 ITL" says of one request
KINDS = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "p99 ITL"}


@dataclass(frozen=True)
class Promise:
    """Limits in seconds; None: nothing is promised of it.

    ``itl_s`` is for 99 % of a request's gaps between tokens: of fewer than 100 gaps for each of them.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None

    @classmethod
    def of(cls, slo: SloSection | None) -> Promise:
        """The lab's own; without ``[slo]`` nothing is promised."""
        return cls(slo.ttft_s, slo.tpot_s) if slo else cls()

    def kept(self, ttft_s: float, tpot_s: float | None, gap_s: float | None) -> bool:
        """Whether a request is good. ``tpot_s``, ``gap_s``: None for an answer of one token, which has no
        gaps and so keeps their limits. A limit that is met exactly is kept.
        """
        measured = (ttft_s, tpot_s, gap_s)
        limits = (self.ttft_s, self.tpot_s, self.itl_s)
        return all(
            limit is None or value is None or value <= limit
            for value, limit in zip(measured, limits, strict=True)
        )

    def __str__(self) -> str:
        parts = [
            f"{KINDS[one.name]} <= {limit_text(limit)}"
            for one in fields(self)
            if (limit := getattr(self, one.name)) is not None
        ]
        return ", ".join(parts) or "no promise"


NOTHING = Promise()


def limit_text(limit_s: float) -> str:
    """A limit as people write it: ``50 ms``, ``1.5 s``."""
    return f"{limit_s:.4g} s" if limit_s >= 1 else f"{1000 * limit_s:.4g} ms"


def gap_of(gaps_s: Sequence[float]) -> float | None:
    """The shortest limit that 99 % of a request's gaps keep, s; None without gaps."""
    if not gaps_s:
        return None
    ordered = sorted(gaps_s)
    late = math.floor(LATE_SHARE * len(ordered) + 1e-9)
    return ordered[len(ordered) - 1 - late]

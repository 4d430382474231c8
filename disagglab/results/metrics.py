"""Run-level figures from per-request lists. docs/reference/metrics.md defines each of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from disagglab.config.schema import SloSection
from disagglab.results.records import Run
from disagglab.stats.metric import METRICS, Answers

KEPT = "_figures"  # attribute of a run, no field of it


def _chosen(run: Run, stream: str) -> list[int]:
    """Positions of the requests of a stream; of all requests where no stream is named."""
    return [i for i in range(len(run.ttft_s)) if not stream or run.streams[i] == stream]


def tpot_s(run: Run, stream: str = "") -> list[float]:
    """Time per output token of each request: (E2E - TTFT) / (output tokens - 1), s."""
    return [
        (run.e2e_s[i] - run.ttft_s[i]) / (run.output_tokens[i] - 1)
        for i in _chosen(run, stream)
        if run.output_tokens[i] > 1
    ]


def good_requests(run: Run, slo: SloSection) -> int:
    """Requests whose TTFT and TPOT both met the objective."""
    return sum(
        ttft <= slo.ttft_s and (tokens < 2 or (e2e - ttft) / (tokens - 1) <= slo.tpot_s)
        for ttft, e2e, tokens in zip(run.ttft_s, run.e2e_s, run.output_tokens, strict=True)
    )


def answers(run: Run, slo: SloSection | None = None, stream: str = "") -> Answers:
    """The requests of a run, or of one of its streams, as a metric's formula takes them."""
    chosen, book = _chosen(run, stream), run.ledger
    return Answers(
        ttft_s=[run.ttft_s[i] for i in chosen],
        tpot_s=tpot_s(run, stream),
        gaps_s=[gap for i in chosen for gap in run.itl_s[i]],
        e2e_s=[run.e2e_s[i] for i in chosen],
        output_tokens=[run.output_tokens[i] for i in chosen],
        duration_s=run.duration_s,
        good=good_requests(run, slo) if slo else None,
        transfer_s=book.transfer_s / book.transfers if book and book.transfers > 0 else None,
    )


Figures = Mapping[str, float | None]


def figures(run: Run, slo: SloSection | None = None, stream: str = "") -> Figures:
    """Run-level figures by metric name, of all requests or those of one stream.

    A metric that the run does not have is None: see :class:`disagglab.stats.metric.Metric`. They are computed
    once and kept with the run, which is frozen; a run that is made of it by ``replace`` starts anew.
    """
    kept: dict[tuple[SloSection | None, str], Figures] = vars(run).setdefault(KEPT, {})
    if (slo, stream) not in kept:
        seen = answers(run, slo, stream)
        kept[slo, stream] = MappingProxyType(
            {
                name: metric.formula(seen) if metric.by_stream or not stream else None
                for name, metric in METRICS.items()
            }
        )
    return kept[slo, stream]

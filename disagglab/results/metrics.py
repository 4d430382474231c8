"""Run-level figures from per-request lists. docs/reference/metrics.md defines each of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from disagglab.config.arrivals import MAIN
from disagglab.config.schema import SloSection
from disagglab.results.records import Run
from disagglab.stats.verdict import Direction

PERCENTILE_SAMPLES = {50: 1, 90: 10, 95: 20, 99: 100}  # fewer samples than this: the percentile is not shown
SATURATED_BELOW = 0.95  # of the offered rate
LEAST_ANSWERS = 3  # a run in which requests arrive for less than so many median E2E shows no steady state

METRICS: dict[str, tuple[str, Direction]] = {
    "ttft_p50": ("s", "lower"),
    "tpot_p50": ("s", "lower"),
    "itl_p50": ("s", "lower"),
    "itl_p99": ("s", "lower"),
    "e2e_p50": ("s", "lower"),
    "output_tokens_per_s": ("tokens/s", "higher"),
    "slo_attainment": ("share of sent", "higher"),
    "goodput_per_s": ("requests/s", "higher"),
    "transfer_share_of_ttft": ("share of TTFT", "lower"),
}


def percentile(samples: Sequence[float], p: int) -> float | None:
    """The ``p``-th percentile (linear interpolation); None with fewer samples than it takes to know it."""
    if len(samples) < PERCENTILE_SAMPLES[p]:
        return None
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * p / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


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


def figures(run: Run, slo: SloSection | None = None, stream: str = "") -> dict[str, float | None]:
    """Run-level figures by metric name, of all requests or those of one stream.

    ``slo_attainment`` is None without an objective, ``transfer_share_of_ttft`` where no KV moved.
    """
    chosen = _chosen(run, stream)
    ttft = [run.ttft_s[i] for i in chosen]
    gaps = [gap for i in chosen for gap in run.itl_s[i]]
    book = run.ledger
    moved = book is not None and book.transfers > 0 and not stream
    return {
        "ttft_p50": percentile(ttft, 50),
        "tpot_p50": percentile(tpot_s(run, stream), 50),
        "itl_p50": percentile(gaps, 50),
        "itl_p99": percentile(gaps, 99),
        "e2e_p50": percentile([run.e2e_s[i] for i in chosen], 50),
        "output_tokens_per_s": sum(run.output_tokens[i] for i in chosen) / run.duration_s,
        "slo_attainment": good_requests(run, slo) / len(run.ttft_s) if slo else None,
        "goodput_per_s": good_requests(run, slo) / run.duration_s if slo else None,
        "transfer_share_of_ttft": (
            book.transfer_s / book.transfers / statistics.fmean(run.ttft_s) if book and moved else None
        ),
    }


def comparable(metric: str, value: float, requests: int) -> float:
    """A figure as the verdict takes it. Its logarithm has to exist: of a share k / n, (k + 1/2) / (n + 1).

    Source of the correction: F. Anscombe, On estimating binomial response relations, Biometrika 43 (1956).
    """
    return (value * requests + 0.5) / (requests + 1) if metric == "slo_attainment" else value


def kept_rate(run: Run) -> float | None:
    """Rate of completions over rate of arrivals in an open loop; None in a closed one, and in one that is
    too short to tell.

    The time in which the requests arrived over the time in which they were answered, less one answer's own
    (the median E2E). Answers that take equally long give 1; where a queue grows, the last ones come late.
    """
    main = [i for i, stream in enumerate(run.streams) if stream == MAIN]
    if run.workload.rate_per_s is None or len(main) < 2:
        return None
    starts = [run.start_s[i] for i in main]
    arriving = max(starts) - min(starts)
    usual = statistics.median(run.e2e_s[i] for i in main)
    if arriving < LEAST_ANSWERS * usual:
        return None
    answering = max(run.start_s[i] + run.e2e_s[i] for i in main) - min(starts) - usual
    return arriving / answering


def saturated(run: Run) -> bool:
    """Whether the topology fell behind the arrivals of an open loop."""
    kept = kept_rate(run)
    return kept is not None and kept < SATURATED_BELOW

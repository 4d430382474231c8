"""Goodput and streams: figures of made-up runs that can be worked out by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from disagglab.config.arrivals import MAIN, STEADY
from disagglab.config.schema import SloSection
from disagglab.config.workload import Steady, Workload
from disagglab.errors import InvalidRun
from disagglab.measure.bench import require_meaning
from disagglab.measure.client_lag import LoopLag
from disagglab.results.metrics import figures, good_requests
from disagglab.results.records import ClientLoad, Ledger, Run
from disagglab.stats.metric import METRICS

CLOSED = Workload(name="w", prompt_tokens=10, output_tokens=5, concurrency=1, requests=4)
SLO = SloSection(ttft_s=1.0, tpot_s=0.1)
RUN = Run(
    "single", CLOSED, 1, 0, "vllm bench serve", 10.0, None,
    ttft_s=(0.5, 1.0, 1.5, 0.5),
    e2e_s=(0.9, 1.4, 1.9, 1.3),
    itl_s=((0.1,) * 4, (0.1,) * 4, (0.1,) * 4, (0.2,) * 4),
    prompt_tokens=(10,) * 4,
    output_tokens=(5,) * 4,
    start_s=(0.0, 1.0, 2.0, 3.0),
    streams=(STEADY, MAIN, MAIN, MAIN),
)  # fmt: skip
BOOK = Ledger({}, {}, {}, 0, 4, 0.35, 0, 0, 0, 0, 0, 0)


def test_good_requests_meet_both_limits() -> None:
    """The third is late with its first token, the fourth slow between tokens; a limit met exactly is met."""
    assert good_requests(RUN, SLO) == 2
    assert figures(RUN, SLO)["slo_attainment"] == 0.5
    assert figures(RUN, SLO)["goodput_per_s"] == pytest.approx(0.2)
    assert figures(RUN)["slo_attainment"] is None, "without an objective there is no goodput"


def test_figures_of_one_stream() -> None:
    """The steady request alone, and the others alone."""
    assert figures(RUN, stream=STEADY)["ttft_p50"] == 0.5
    assert figures(RUN, stream=MAIN)["ttft_p50"] == 1.0
    assert figures(RUN, stream=MAIN)["output_tokens_per_s"] == pytest.approx(1.5)


def test_share_of_the_transfer() -> None:
    """Mean transfer time over mean TTFT, only where KV moved."""
    assert figures(RUN)["transfer_share_of_ttft"] is None
    share = figures(dataclasses.replace(RUN, ledger=BOOK))["transfer_share_of_ttft"]
    assert share == pytest.approx((0.35 / 4) / (3.5 / 4))


def test_a_share_of_nothing_can_be_compared() -> None:
    """No good request is no logarithm: shares are moved away from 0 and 1, other figures are left alone."""
    assert METRICS["slo_attainment"].comparable(0.0, 9) == pytest.approx(0.05)
    assert METRICS["slo_attainment"].comparable(1.0, 9) == pytest.approx(0.95)
    assert METRICS["ttft_p50"].comparable(0.25, 9) == 0.25


def test_a_blocked_event_loop_is_seen() -> None:
    """A loop that does not come round for 0.2 s is late by about that much, and takes the CPU meanwhile."""

    async def busy() -> tuple[LoopLag, float, float]:
        async with LoopLag().watch() as lag:
            start = time.perf_counter()
            await asyncio.sleep(0.05)
            until = time.perf_counter() + 0.2
            while time.perf_counter() < until:
                pass
            await asyncio.sleep(0.05)
            return lag, start, time.perf_counter()

    lag, start, end = asyncio.run(busy())
    load = lag.between(start, end)
    assert load is not None
    assert load.lag_max_s > 0.15
    assert load.lag_p99_s <= load.lag_max_s
    assert 0 < load.cpu_share < 1.5
    assert lag.between(end + 1, end + 2) is None, "what was not looked at is not reported as idle"


STEADY_WORKLOAD = CLOSED.model_copy(
    update={
        "concurrency": None,
        "rate_per_s": 1.0,
        "requests": 3,
        "steady": Steady(prompt_tokens=10, output_tokens=5, requests=1, lead_s=0.5),
    }
)


def test_the_client_must_not_be_the_bottleneck() -> None:
    """Above nine tenths of a core the load engine is what was measured."""
    require_meaning(dataclasses.replace(RUN, client=ClientLoad(0.9, 0.0, 0.0)))
    with pytest.raises(InvalidRun, match="busy 91%"):
        require_meaning(dataclasses.replace(RUN, client=ClientLoad(0.91, 0.0, 0.0)))


def test_prompts_have_to_arrive_while_steady_requests_decode() -> None:
    """The steady request decodes from 0.5 s to its end; the others arrive at 1, 2 and 3 s."""
    run = dataclasses.replace(RUN, workload=STEADY_WORKLOAD)
    require_meaning(dataclasses.replace(run, e2e_s=(3.0, 1.4, 1.9, 1.3)))
    with pytest.raises(InvalidRun, match="2 of 3 prompts arrived"):
        require_meaning(dataclasses.replace(run, e2e_s=(2.9, 1.4, 1.9, 1.3)))
    with pytest.raises(InvalidRun, match="2 of 3 prompts arrived"):
        require_meaning(dataclasses.replace(run, e2e_s=(9.0, 1.4, 1.9, 1.3), ttft_s=(1.1, 1.0, 1.5, 0.5)))

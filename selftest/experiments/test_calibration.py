"""Calibration: what it takes from a run, and runs that it refuses.

Oracle: runs made by hand, whose counters and gaps are known.
"""

from __future__ import annotations

import dataclasses

import pytest

from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import calibration
from disagglab.results.records import Run

CLOSED = Workload(name="x", prompt_tokens=64, output_tokens=6, requests=2, concurrency=2)
RUN = Run(
    "replicated", CLOSED, 0, 0, "", 9.0, None,
    ttft_s=(1.0, 2.0), e2e_s=(6.0, 7.0), itl_s=((1.0,) * 5, (1.5, 1.5, 1.0, 0.5, 0.5)),
    prompt_tokens=(64, 64), output_tokens=(6, 6), start_s=(0.0, 1.0), streams=("main", "main"),
)  # fmt: skip


def test_a_step_is_the_median_gap_while_all_decode() -> None:
    """Of the gaps that lie in the time in which both decode, with the mean context of the run."""
    found = calibration.step_of(RUN, 1)
    assert (found.batch, found.context_tokens, found.step_s) == (1, 67.0, 1.0)


def test_a_run_without_a_common_step_is_refused() -> None:
    """If one had its answer before the other began, no step held both."""
    apart = dataclasses.replace(RUN, start_s=(0.0, 20.0))
    with pytest.raises(InvalidRun, match="before the last had a token"):
        calibration.step_of(apart, 1)


def test_a_run_without_proof_is_refused() -> None:
    """Transfers are taken from the ledger, prefill times from the counters; neither is made up."""
    with pytest.raises(InvalidRun, match="no ledger"):
        calibration.handed_over(RUN)

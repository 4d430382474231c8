"""Metrics: one definition each, taken up by gates, figures and documentation.

Oracle: the list itself, and a lab file that asks for each of its names.
"""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from disagglab.config.labs import find_lab, parse_lab
from disagglab.config.workload import Workload
from disagglab.errors import ConfigError
from disagglab.paths import ROOT
from disagglab.results.metrics import figures
from disagglab.results.records import Ledger, Run
from disagglab.stats.metric import METRICS, Answers, Metric

ANSWERS = Answers(
    ttft_s=(0.5, 1.5), tpot_s=(0.1, 0.3), gaps_s=(0.1,) * 100, e2e_s=(2.0, 4.0), output_tokens=(10, 30),
    duration_s=8.0, good=1, transfer_s=0.25,
)  # fmt: skip
BY_HAND = {
    "ttft_p50": 1.0,
    "tpot_p50": 0.2,
    "itl_p50": 0.1,
    "itl_p99": 0.1,
    "e2e_p50": 3.0,
    "output_tokens_per_s": 5.0,
    "slo_attainment": 0.5,
    "goodput_per_s": 0.125,
    "transfer_share_of_ttft": 0.25,
}
EMBEDDED = tomllib.loads(find_lab("embedded").read_text())


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_every_formula_by_hand(metric: Metric[Answers]) -> None:
    assert metric.formula(ANSWERS) == pytest.approx(BY_HAND[metric.name])


def test_what_is_not_there_is_none() -> None:
    """No objective, no transfer, too few gaps."""
    bare = Answers((1.0,), (), (0.1,) * 99, (2.0,), (1,), 1.0)
    absent = [metric.name for metric in METRICS.values() if metric.formula(bare) is None]
    assert absent == ["tpot_p50", "itl_p99", "slo_attainment", "goodput_per_s", "transfer_share_of_ttft"]


def test_figures_of_a_run_are_the_metrics_in_their_order() -> None:
    workload = Workload(name="w", prompt_tokens=1, output_tokens=2, concurrency=1, requests=1)
    run = Run(
        "disaggregated", workload, 1, 0, "", 1.0, None, (0.5,), (1.0,), ((0.5,),), (1,), (2,), (0.0,),
        ("main",),
        Ledger({}, {}, {}, 0, 1, 0.1, 0, 0, 0, 0, 0, 0),
    )  # fmt: skip
    assert list(figures(run)) == list(METRICS)
    apart = {name for name, value in figures(run, stream="main").items() if value is None} - {"itl_p99"}
    assert apart == {metric.name for metric in METRICS.values() if not metric.by_stream}


def asking(**gate: Any) -> dict[str, Any]:
    """The embedded lab with one gate."""
    whole = {"workload": "chat", "want": "not worse", "margin": 0.05, **gate}
    return {**EMBEDDED, "gate": [whole]}


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_a_gate_may_ask_for_every_metric_that_is_gated(metric: Metric[Answers]) -> None:
    """Another is refused with file, key and the names that there are."""
    against: dict[str, Any] = {"limit": 0.1} if metric.needs_transfer else {"baseline": "replicated"}
    asked = asking(metric=metric.name, **against)
    if metric.gated:
        assert parse_lab(asked, "my.toml").gates[0].metric == metric.name
        return
    with pytest.raises(ConfigError) as caught:
        parse_lab(asked, "my.toml")
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == ("my.toml", "gate[0].metric")
    assert "'itl_p99', 'e2e_p50'" in problem.wrong, "it lists what may be asked for"
    assert "metric" in problem.mend


def test_what_a_metric_says_of_itself_is_checked_in_a_gate() -> None:
    """A stream of what only all requests have; a baseline in which no KV moves; attainment without [slo]."""
    for gate, without, key in (
        ({"metric": "slo_attainment", "baseline": "single", "stream": "main"}, "", "gate[0].stream"),
        ({"metric": "transfer_share_of_ttft", "baseline": "single"}, "", "gate[0].baseline"),
        ({"metric": "slo_attainment", "baseline": "single"}, "slo", "gate[0].metric"),
    ):
        raw = {name: part for name, part in asking(**gate).items() if name != without}
        with pytest.raises(ConfigError) as caught:
            parse_lab(raw, "my.toml")
        assert key in [problem.key for problem in caught.value.problems], gate


def test_every_metric_is_documented() -> None:
    text = next((ROOT / "docs").rglob("metrics.md")).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for metric in METRICS.values():
        assert any(f"`{metric.name}`" in row and row.endswith(f"| {metric.unit} |") for row in rows), metric


def test_a_share_of_nothing_can_be_compared() -> None:
    """Shares are moved away from 0 and 1, other values are left alone."""
    shares = [metric.name for metric in METRICS.values() if metric.comparable(0.0, 9) != 0]
    assert shares == ["slo_attainment"]
    assert METRICS["slo_attainment"].comparable(1.0, 9) == pytest.approx(0.95)

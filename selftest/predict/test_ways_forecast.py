"""The forecast of every way that ``disagglab predict --workload`` prints.

Oracle: the forecast itself, made from the same speeds; figures of the lab file in what is printed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.config import labs
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError
from disagglab.predict import breakeven, breakeven_map, frontier_forecast, ways_forecast
from disagglab.predict.breakeven_map import Assumed
from disagglab.predict.roofline import Efficiency
from disagglab.predict.ways import Planned

Capture = pytest.CaptureFixture[str]


def known(lab: Lab) -> Assumed:
    """The lab's speeds as its file alone tells them."""
    return breakeven_map.assumed(lab, efficiency=Efficiency())


def said(capsys: Capture, *argv: str) -> str:
    """What the command prints; it has to end with 0 and say nothing else."""
    assert main(["predict", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_every_way_at_every_rate_is_printed(capsys: Capture) -> None:
    """A table a rate with a row a way, the one with the most good requests marked; then the assumptions."""
    out = said(capsys, "--lab", "spark", "--workload", "chat", "--load", "0.25", "--load", "0.5")
    assert out.count(" requests/s\n  way ") == 2
    for arm in ("single", "replicated", "disaggregated", "sharded"):
        assert out.count(f"\n  {arm} ") == 2
    assert out.count(" *") == 2 + 1, "a winner a rate, and the word that explains the mark"
    for assumed in ("125 TFLOP/s", "max-num-batched-tokens is 8,192", "10 us each", "100 Gbit/s"):
        assert assumed in out


def test_as_json_it_is_the_forecast(capsys: Capture) -> None:
    """The record reads back, and its rates are shares of what the replicas bear."""
    lab = labs.load_lab("spark")
    found: dict[str, Any] = json.loads(
        said(capsys, "--lab", "spark", "--workload", "chat", "--load", "0.5", "--json")
    )
    forecast = frontier_forecast.read(found["forecast"])
    assert forecast.arms == ("single", "replicated", "disaggregated", *(one.arm for one in lab.ways))
    chat = lab.workload("chat")
    most = breakeven.capacity_per_s(known(lab).cluster, chat.prompt_tokens, chat.output_tokens)
    (rate,) = forecast.rates_per_s
    assert rate == pytest.approx(most / 2)
    assert {one.requests for one in forecast.points} == {chat.total_requests}


def test_a_way_that_the_model_does_not_tell_apart_is_left_out() -> None:
    """Transfer settings are none of its constants; a chunk budget is."""
    made = [
        Planned("disaggregated", "disaggregated", step_tokens=2048),
        Planned("disaggregated@tcp", "disaggregated", step_tokens=2048),
        Planned("disaggregated@chunk-128", "disaggregated", step_tokens=128),
    ]
    kept, same = ways_forecast._told_apart(made)
    assert [one.arm for one in kept] == ["disaggregated", "disaggregated@chunk-128"]
    assert same == {"disaggregated@tcp": "disaggregated"}
    assert replace(kept[0], arm="") != replace(kept[1], arm="")


def test_without_an_objective_there_is_no_goodput() -> None:
    """Refused with the section that is missing."""
    lab = labs.load_lab("spark").model_copy(update={"slo": None})
    with pytest.raises(ConfigError) as refused:
        ways_forecast.predict(lab, known(lab), lab.workload("chat"), (0.5,))
    assert [one.key for one in refused.value.problems] == ["[slo]"]

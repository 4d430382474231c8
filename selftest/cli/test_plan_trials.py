"""``disagglab plan-trials``: rounds for a difference, from the folder of a made-up session.

Oracle: the noise that was put in, and the definition of a smallest detectable difference.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.config.labs import load_lab
from disagglab.experiments import foresight
from disagglab.experiments.foresight import Foresight
from disagglab.results.run_folder import Store
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE
from disagglab.stats.rule import Rule, multiplier, quantile
from selftest.experiments.made import made_run

Capture = pytest.CaptureFixture[str]
LAB = load_lab("embedded")
TTFT = next(gate for gate in LAB.gates if gate.metric == "ttft_p50")


def session(reports: Path, rounds: int = 40, noise: float = 0.04, **meta: Any) -> Path:
    """A session whose runs spread by ``noise``, each with its length and half a second of its own."""
    source = random.Random(8)
    store = Store.create(reports, "20260101-000000-aaaa")
    about: dict[str, Any] = {
        "lab_file": Path(LAB.file).read_text(),
        "vllm": LAB.vllm.version,
        "fingerprint": {"key": "k"},
    }
    store.write_meta(**about | meta)
    for number in range(rounds):
        for workload in LAB.gated_workloads:
            for arm in (SINGLE, REPLICATED, DISAGGREGATED):
                seconds = 0.1 * math.exp(source.gauss(0, noise))
                store.add_run(made_run(arm, workload, number, seconds, took_s=0.5))
    return store.folder


def test_rounds_and_minutes_for_a_difference(tmp_path: Path, capsys: Capture) -> None:
    """One line a gate, with the spread that was put in and the seconds that a round took."""
    folder = session(tmp_path)
    assert main(["plan-trials", str(folder), "--difference", "5%", "--budget", "5m"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("embedded: rounds that find a difference of 5.0 %")
    assert len(out) == 2 + len(LAB.gates)
    (line,) = (line for line in out if line.startswith("one-user ttft_p50"))
    assert " 40 " in line
    found = {one.gate.figure: one for one in foresight.gates(*foresight.read(folder))}["ttft_p50"]
    assert found.pair_sd == pytest.approx(math.sqrt(2) * 0.04, rel=0.25)
    assert found.round_s == pytest.approx(2 * (0.5 + 3 * 0.2), rel=0.05)


@pytest.mark.parametrize("rule", ["any time", "fixed-n"])
def test_the_rounds_are_the_first_that_find_it(rule: Rule) -> None:
    """80 % power: the difference is (multiplier + t(0.8)) standard errors; one round less does not reach."""
    one = Foresight(TTFT, 6, pair_sd=0.08, round_s=4.0)
    needed = one.needed(0.05, rule)
    assert needed is not None

    def reach(rounds: int) -> float:
        return (multiplier(rounds, 0.05, rule) + quantile(0.8, rounds - 1)) * 0.08 / math.sqrt(rounds)

    assert reach(needed) <= math.log1p(0.05) < reach(needed - 1)


def test_looking_costs_rounds() -> None:
    one = Foresight(TTFT, 6, pair_sd=0.08, round_s=4.0)
    looks, fixed = one.needed(0.05, "any time"), one.needed(0.05, "fixed-n")
    assert looks is not None
    assert fixed is not None
    assert looks > fixed
    assert Foresight(TTFT, 6, pair_sd=3.0, round_s=4.0).needed(0.05, "any time") is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--difference", "much"], "write 5% or 0.05"),
        (["--difference", "500%"], "write 5% or 0.05"),
        (["--budget", "soon"], "write 90s, 10m or 1h"),
    ],
)
def test_what_cannot_be_computed_is_one_line(
    options: list[str], named: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["plan-trials", str(session(tmp_path, 2)), *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """No folder, no runs, a single round: each says what to name instead."""
    for folder in (tmp_path / "nowhere", session(tmp_path / "one", 1)):
        assert main(["plan-trials", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "name " in err

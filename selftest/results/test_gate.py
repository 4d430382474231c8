"""A gate's state: its text is what it always was, and is read back from any session's file.

Oracle: the texts that earlier versions wrote, spelled out here and in reports/reference.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from disagglab.paths import REPORTS
from disagglab.results.gate import GateState, State
from disagglab.results.records import VerdictRow
from disagglab.results.report import verdict_cells
from disagglab.results.run_folder import Store
from disagglab.stats.verdict import judge

TEXTS = {
    "met: wants better": GateState(State.MET, "better"),
    "met: wants not worse (not enforced)": GateState(State.MET, "not worse", enforced=False),
    "not met: wants better": GateState(State.NOT_MET, "better"),
    "not met: wants better, underpowered (not enforced)": GateState(
        State.NOT_MET, "better", enforced=False, underpowered=True
    ),
    "not met: wants not worse, underpowered": GateState(State.NOT_MET, "not worse", underpowered=True),
    "not met: wants better, needs about 4 min more (not enforced)": GateState(
        State.NOT_MET, "better", enforced=False, minutes=4
    ),
    "not met: wants not worse, needs about 120 min more": GateState(State.NOT_MET, "not worse", minutes=120),
    "no regression": GateState(State.NO_REGRESSION),
    "worse": GateState(State.WORSE),
    "found worse (not enforced)": GateState(State.WORSE, enforced=False),
    "undecided": GateState(State.UNDECIDED),
    "undecided, underpowered": GateState(State.UNDECIDED, underpowered=True),
    "A/A: identical arms": GateState(State.IDENTICAL),
    "way": GateState(State.WAY),
    "variant": GateState(State.VARIANT),
    "beside": GateState(State.BESIDE),
    "predicted win": GateState(State.PREDICTED, about="win"),
    "expected +40% to +60%: refuted": GateState(State.EXPECTED, about="+40% to +60%", answer="refuted"),
    "claim: met": GateState(State.CLAIM, answer="met"),
    "claim of -30 %: not met": GateState(State.CLAIM, about="-30 %", answer="not met"),
    "claim: no verdict from one round": GateState(State.CLAIM, answer="no verdict from one round"),
    "a word of another version": GateState(State.OTHER, about="a word of another version"),
    "": GateState(State.OTHER),
}
ROW = VerdictRow(
    "chat", "ttft_p50", "s", "disaggregated", "limit", 0.5, 0.4, "undecided", 0.25, -1.0, math.inf, 1, None,
    TEXTS["not met: wants better"], "one round has no spread",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_state_is_its_text_and_the_text_the_state(text: str) -> None:
    assert str(TEXTS[text]) == text
    assert GateState.parse(text) == TEXTS[text]


def test_every_state_is_among_the_texts() -> None:
    assert {state.state for state in TEXTS.values()} == set(State)


def test_what_fails_a_session() -> None:
    """An enforced gate that is not met, and a release that is worse under one; nothing else."""
    assert {text for text, state in TEXTS.items() if state.fails} == {
        "not met: wants better",
        "not met: wants not worse, underpowered",
        "not met: wants not worse, needs about 120 min more",
        "worse",
    }
    assert all(state.of_a_gate == text.startswith(("met", "not met")) for text, state in TEXTS.items())


def test_a_verdict_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """In the file the gate is its text, as in earlier versions; a row may lack what came later."""
    store = Store.create(tmp_path, "run")
    for state in TEXTS.values():
        store.add(dataclasses.replace(ROW, gate=state))
    lines = [json.loads(line) for line in (store.folder / "verdicts.jsonl").read_text().splitlines()]
    assert [line["gate"] for line in lines] == list(TEXTS)
    assert [VerdictRow.from_json(line) for line in lines] == store.verdicts
    old = {key: lines[0][key] for key in list(lines[0])[:15]}
    assert VerdictRow.from_json(old) == dataclasses.replace(ROW, gate=TEXTS["met: wants better"])
    with pytest.raises(TypeError, match="gate"):
        VerdictRow.from_json({key: value for key, value in old.items() if key != "gate"})


def test_a_row_keeps_its_rule_and_the_fixed_interval() -> None:
    """By whichever rule; a line of an earlier version was judged for a fixed number of rounds."""
    figures = {"candidate_value": 0.5, "baseline_value": 0.4, "gate": TEXTS[""]}
    names = dict.fromkeys(("workload", "metric", "unit", "candidate", "baseline"), "x")
    verdict = judge([(1.0, 1.3), (1.0, 1.05), (1.0, 1.2), (1.0, 1.1)], "lower", 0.05, "any time")
    row = VerdictRow.of(verdict, **names, **figures)  # type: ignore[arg-type]
    assert VerdictRow.from_json(json.loads(json.dumps(row.as_json()))) == row
    assert (row.rule, row.fixed_low, row.fixed_high) == ("any time", verdict.fixed_low, verdict.fixed_high)
    assert row.fixed_low is not None
    assert row.fixed_high is not None
    assert row.low < row.fixed_low < row.fixed_high < row.high
    later = ("rule", "fixed_low", "fixed_high")
    old = VerdictRow.from_json({key: value for key, value in row.as_json().items() if key not in later})
    assert (old.rule, old.fixed_low, old.fixed_high) == ("fixed-n", None, None)


def test_sessions_that_are_kept_are_read() -> None:
    """Every verdict of every reference session has a state that this version knows, and its text; in a table
    what Holm's correction holds back follows it.
    """
    files = sorted((REPORTS / "reference").rglob("verdicts.jsonl"))
    assert files
    for path in files:
        for line in path.read_text().splitlines():
            row = VerdictRow.from_json(json.loads(line))
            assert row.gate.state is not State.OTHER, line
            assert str(row.gate) == json.loads(line)["gate"]
            assert verdict_cells(row)["gate"].startswith(str(row.gate))

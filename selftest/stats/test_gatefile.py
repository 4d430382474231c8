"""``python -m disagglab gate``: verdicts as JSON, and every bad file refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main

GOOD: dict[str, Any] = {
    "metric": "itl_p99",
    "better": "lower",
    "margin": 0.05,
    "pairs": [[100, 120], [101, 121], [99, 119.5], [100, 120.5], [102, 122], [98, 118]],
}
Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, path: Path, raw: Any) -> dict[str, Any]:
    """The JSON object that the tool prints for a file."""
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    assert main(["gate", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "worse"),
        ({"better": "higher"}, "better"),
        ({"pairs": [[b, a] for a, b in GOOD["pairs"]]}, "better"),
        ({"pairs": [[a, a * 1.001] for a, _ in GOOD["pairs"]]}, "equivalent"),
        ({"pairs": [[1, 1.5], [1, 0.6], [1, 1.4], [1, 0.7]]}, "undecided"),
        ({"pairs": [[1, 2]]}, "undecided"),
    ],
)
def test_verdicts(capsys: Capture, tmp_path: Path, changes: dict[str, Any], verdict: str) -> None:
    """The four verdicts, in both directions of better."""
    assert answer(capsys, tmp_path / "gate.json", GOOD | changes)["verdict"] == verdict


def test_numbers_of_a_decided_gate(capsys: Capture, tmp_path: Path) -> None:
    """Effect and interval are ratios - 1; six rounds of the same sign give a sign-flip p of 2 / 64."""
    found = answer(capsys, tmp_path / "gate.json", GOOD)
    assert found["effect"] == pytest.approx(0.202, abs=0.002)
    low, high = found["ci"]
    assert 0.19 < low < found["effect"] < high < 0.21
    assert 0 < found["mde"] < 0.05
    assert (found["underpowered"], found["rounds"], found["p_sign_flip"]) == (False, 6, 2 / 64)
    assert found["p"] < 1e-6


def test_an_undecided_gate_says_why(capsys: Capture, tmp_path: Path) -> None:
    """Too much noise for the margin: underpowered, with the smallest difference that would have shown."""
    noisy = {"pairs": [[1, 1.5], [1, 0.6], [1, 1.4], [1, 0.7]]}
    found = answer(capsys, tmp_path / "gate.json", GOOD | noisy)
    assert found["underpowered"]
    assert "underpowered" in found["reason"]
    assert found["mde"] > 0.05


def test_pairs_may_be_appended_and_judged_again(capsys: Capture, tmp_path: Path) -> None:
    """``sequential``: undecided with the rounds that it may take, then decided with as many pairs more; the
    file says by which rule, and what a fixed number of pairs would say.
    """
    growing = GOOD | {"sequential": True, "pairs": [[1, 1.3], [1, 1.05], [1, 1.2], [1, 1.1]]}
    early = answer(capsys, tmp_path / "gate.json", growing)
    assert (early["verdict"], early["rule"]) == ("undecided", "any time")
    assert early["ci"][0] < early["ci_fixed_n"][0] < early["ci_fixed_n"][1] < early["ci"][1]
    assert early["rounds_needed"] > 4
    assert early["p"] > 0.05
    times = -(-early["rounds_needed"] // 4)
    late = answer(capsys, tmp_path / "gate.json", growing | {"pairs": growing["pairs"] * times})
    assert (late["verdict"], late["rounds_needed"]) == ("worse", None)
    assert late["p"] < 0.05


def test_the_number_of_pairs_is_fixed_unless_the_file_says_otherwise(capsys: Capture, tmp_path: Path) -> None:
    """Without the key the rule is fixed-n, and both intervals are one."""
    found = answer(capsys, tmp_path / "gate.json", GOOD)
    assert (found["rule"], found["ci"], found["rounds_needed"]) == ("fixed-n", found["ci_fixed_n"], None)


def test_three_pairs_are_too_few_for_looks(capsys: Capture, tmp_path: Path) -> None:
    """No interval yet, and its fixed-n one beside; the reason names the fewest pairs."""
    three = GOOD | {"sequential": True, "pairs": GOOD["pairs"][:3]}
    found = answer(capsys, tmp_path / "gate.json", three)
    assert (found["verdict"], found["ci"], found["mde"], found["rounds_needed"]) == (
        *("undecided", None, None),
        4,
    )
    assert found["ci_fixed_n"][0] > 0
    assert "4 is the fewest" in found["reason"]


def test_a_family_of_gates_is_corrected(capsys: Capture, tmp_path: Path) -> None:
    """Alone better, as one of twelve not: reason and p say so; without the key nothing is corrected."""
    pairs = {"pairs": [[1, 0.9], [1, 0.8], [1, 0.85], [1, 0.75]]}
    alone = answer(capsys, tmp_path / "gate.json", GOOD | pairs)
    assert alone["verdict"] == "better"
    assert alone["p_adjusted"] == alone["p"] < 0.05
    found = answer(capsys, tmp_path / "gate.json", GOOD | pairs | {"family": 12})
    assert found["p_adjusted"] == pytest.approx(12 * alone["p"])
    said = f"better at p {found['p']:.2g}, {found['p_adjusted']:.2g} after 12 gates"
    assert found["reason"] == f"{alone['reason']}; {said}"


def test_one_round_has_no_interval(capsys: Capture, tmp_path: Path) -> None:
    """What one pair cannot tell is null, never a number."""
    found = answer(capsys, tmp_path / "gate.json", GOOD | {"pairs": [[1, 2]]})
    assert (found["ci"], found["mde"], found["effect"]) == (None, None, pytest.approx(1.0))
    assert "more rounds" in found["reason"]


SEVERAL: dict[str, Any] = {
    **{key: value for key, value in GOOD.items() if key != "pairs"},
    "candidate": [120, 121, 119.5, 120.5, 122, 118],
    "baselines": {
        "replicated": [150, 152, 149, 151, 150, 148],
        "sharded": [100, 101, 99, 100, 102, 98],
    },
}


def test_the_best_of_several_baselines(capsys: Capture, tmp_path: Path) -> None:
    """It is named; the effect is that of its pairs, and its p twice theirs, because of two it was picked."""
    found = answer(capsys, tmp_path / "gate.json", SEVERAL)
    alone = answer(capsys, tmp_path / "gate.json", GOOD)
    assert (found["baseline"], found["among"]) == ("sharded", ["replicated", "sharded"])
    assert (found["verdict"], found["effect"]) == ("worse", alone["effect"])
    assert found["p"] == pytest.approx(2 * alone["p"])
    assert found["ci"][0] < alone["ci"][0]
    assert found["ci"][1] == alone["ci"][1]
    assert "the best of 2 other ways (sharded, replicated)" in found["reason"]
    assert not {"baseline", "among"} & set(alone), "a file with pairs has the answer that it had"


def test_a_limit_that_so_few_rounds_do_not_give_is_null(capsys: Capture, tmp_path: Path) -> None:
    """Four rounds by looks, eight baselines: better than all of them, and by how much at most is open."""
    logs = [2.0, 2.0002, 1.9998, 2.0]
    baselines = {str(place): [1.0 + 0.01 * place] * 4 for place in range(8)}
    raw = SEVERAL | {"better": "higher", "candidate": logs, "baselines": baselines, "sequential": True}
    found = answer(capsys, tmp_path / "gate.json", raw)
    assert found["verdict"] == "better"
    assert found["ci"][0] > 0
    assert (found["ci"][1], found["mde"], found["underpowered"]) == (None, None, True)


BAD: dict[str, tuple[Any, str]] = {
    "both forms": (GOOD | SEVERAL, "pairs"),
    "baselines without a candidate": (
        {key: value for key, value in SEVERAL.items() if key != "candidate"},
        "candidate",
    ),
    "a candidate without baselines": (SEVERAL | {"baselines": {}}, "baselines"),
    "a baseline that lacks a round": (
        SEVERAL | {"baselines": {"sharded": [1, 2, 3], "single": [1] * 6}},
        "baselines.sharded",
    ),
    "a zero of a baseline": (SEVERAL | {"baselines": {"sharded": [0, 1, 1, 1, 1, 1]}}, "baselines.sharded"),
    "not JSON": ("{", "not JSON"),
    "a list": ([], "not an object"),
    "no pairs": ({k: v for k, v in GOOD.items() if k != "pairs"}, "pairs"),
    "empty pairs": (GOOD | {"pairs": []}, "pairs"),
    "pairs no list": (GOOD | {"pairs": 5}, "pairs"),
    "three in a pair": (GOOD | {"pairs": [[1, 2, 3]]}, "pairs[0]"),
    "a zero": (GOOD | {"pairs": [[1, 2], [0, 2]]}, "pairs[1]"),
    "negative": (GOOD | {"pairs": [[1, -2]]}, "pairs[0]"),
    "a text": (GOOD | {"pairs": [[1, "2"]]}, "pairs[0]"),
    "a boolean": (GOOD | {"pairs": [[1, True]]}, "pairs[0]"),
    "null": (GOOD | {"pairs": [[1, None]]}, "pairs[0]"),
    "not a number": (json.dumps(GOOD).replace("120,", "NaN,").replace("120]", "NaN]"), "pairs[0]"),
    "infinite": (json.dumps(GOOD).replace("[100, 120]", "[100, Infinity]"), "pairs[0]"),
    "too large": (json.dumps(GOOD).replace("[100, 120]", f"[100, {10**400}]"), "pairs[0]"),
    "margin zero": (GOOD | {"margin": 0}, "margin"),
    "margin one": (GOOD | {"margin": 1}, "margin"),
    "margin text": (GOOD | {"margin": "5 %"}, "margin"),
    "no direction": (GOOD | {"better": "smaller"}, "better"),
    "direction no text": (GOOD | {"better": ["lower"]}, "better"),
    "no metric": (GOOD | {"metric": ""}, "metric"),
    "sequential no boolean": (GOOD | {"sequential": "yes"}, "sequential"),
    "no gate in the family": (GOOD | {"family": 0}, "family"),
    "unknown key": (GOOD | {"alpha": 0.1}, "alpha"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(capsys: Capture, tmp_path: Path, case: str) -> None:
    """Exit 2, nothing on standard output, one line that names the file and the key."""
    raw, key = BAD[case]
    path = tmp_path / "gate.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    assert main(["gate", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(str(path))
    assert key in err
    assert " | " not in err, "one mistake is one problem"


def test_a_file_that_is_not_there(capsys: Capture, tmp_path: Path) -> None:
    """A missing file and a folder are named."""
    for path in (tmp_path / "none.json", tmp_path):
        assert main(["gate", str(path)]) == 2
        assert str(path) in capsys.readouterr().err

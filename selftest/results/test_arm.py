"""Arms: the names of those that were measured, in every reference session, are told apart and kept."""

from __future__ import annotations

import json

import pytest

from disagglab.paths import REPORTS
from disagglab.results.arm import Arm


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("single", Arm("single")),
        ("single-again", Arm("single-again")),
        ("disaggregated@tcp", Arm("disaggregated", "tcp")),
        ("single@0.30.0", Arm("single", "0.30.0")),
        ("dynamo-kv", Arm("dynamo-kv")),
    ],
)
def test_an_arm_is_its_name_and_the_name_the_arm(text: str, arm: Arm) -> None:
    assert str(arm) == text
    assert Arm.parse(text) == arm


def test_names_of_kept_sessions_stay_as_they_are() -> None:
    """A tag is that of a way of the lab; nothing is lost on the way through."""
    seen = set()
    for path in (REPORTS / "reference").rglob("figures.jsonl"):
        for line in path.read_text().splitlines():
            seen.add(json.loads(line)["arm"])
    assert {str(Arm.parse(text)) for text in seen} == seen
    assert {Arm.parse(text).name for text in seen} == {
        *("single", "single-again", "replicated", "disaggregated", "sharded")
    }

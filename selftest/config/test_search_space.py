"""The search space of tuning: how many settings it has, and what a ratio says."""

from __future__ import annotations

import pytest

from disagglab.config import search_space
from disagglab.config.search_space import Value

SPACE: dict[str, list[Value]] = {"block-size": [64, 128], "max-num-seqs": [16, 32, 64]}


@pytest.mark.parametrize(
    ("own", "settings"),
    [
        ({}, 7),  # 2 x 3, and the lab's own, whose values are vLLM's
        ({"block-size": 64, "max-num-seqs": 32, "enforce-eager": True}, 6),  # which is one of the six
        ({"block-size": 64}, 7),  # half of it stands in the space
        ({"block-size": 32, "max-num-seqs": 32}, 7),
    ],
)
def test_the_labs_own_setting_counts_once(own: dict[str, Value], settings: int) -> None:
    assert search_space.size(SPACE, own) == settings


def test_a_ratio_is_two_numbers() -> None:
    assert search_space.parts_of("1P2D") == (1, 2)
    for wrong in ("0P2D", "1P", "2D1P", "1p2d", "1P2D ", ""):
        with pytest.raises(ValueError, match="no ratio"):
            search_space.parts_of(wrong)


def test_what_stands_twice_is_named() -> None:
    assert list(search_space.repeated([1, 2, 1, 3, 2, 1])) == [1, 2, 1]
    assert list(search_space.repeated(["a", "b"])) == []

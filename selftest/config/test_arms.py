"""Arms: what is kept, what goes with what is left out, what is refused, and which gates can be judged."""

from __future__ import annotations

import pytest

from disagglab.config import arms
from disagglab.config.arms import Arms
from disagglab.config.labs import load_lab
from disagglab.errors import ConfigError

LAB = load_lab("embedded")
TWIN = "single-again"


@pytest.mark.parametrize(
    ("only", "without", "kept", "left_out"),
    [
        ((), (), ("single", "replicated", "disaggregated", TWIN), ()),
        (("replicated", "disaggregated"), (), ("replicated", "disaggregated"), ("single", TWIN)),
        ((), ("single",), ("replicated", "disaggregated"), ("single", TWIN)),
        ((), (TWIN,), ("single", "replicated", "disaggregated"), (TWIN,)),
        (("disaggregated", "single"), (), ("single", "disaggregated"), ("replicated", TWIN)),
        (("disaggregated", TWIN, "single"), (), ("single", "disaggregated", TWIN), ("replicated",)),
    ],
)
def test_what_is_kept(
    only: tuple[str, ...], without: tuple[str, ...], kept: tuple[str, ...], left_out: tuple[str, ...]
) -> None:
    """In the order of a round, whatever the order of the options; the twin goes with single."""
    assert arms.chosen(LAB, only, without, ()) == Arms(kept, left_out)


def test_a_way_is_an_arm() -> None:
    """It is kept unless an arm is named, and then has to be named as well."""
    assert arms.chosen(LAB, (), ("single",), ["disaggregated@push"]).kept[-1] == "disaggregated@push"
    named = ("disaggregated", "disaggregated@push")
    assert arms.chosen(LAB, named, (), ["disaggregated@push"]).kept == named


@pytest.mark.parametrize(
    ("only", "without", "ways", "told"),
    [
        (("replica",), (), (), "use one of single, replicated, disaggregated, single-again"),
        ((), ("disaggregated@tcp",), ("disaggregated@push",), "single-again, disaggregated@push"),
        (("single", "replicated"), (), (), "it is the candidate of every gate"),
        ((), ("disaggregated",), (), "it is the candidate of every gate"),
        (("disaggregated",), (), (), "disaggregated alone"),
        ((), ("single", "replicated"), (), "disaggregated alone"),
        (("disaggregated", TWIN), (), (), "add --arm single"),
        (("disaggregated", "single"), ("single",), (), "name it in one of the two"),
        (("disaggregated", "single"), (), ("disaggregated@push",), "add --arm disaggregated@push"),
    ],
)
def test_what_is_refused(
    only: tuple[str, ...], without: tuple[str, ...], ways: tuple[str, ...], told: str
) -> None:
    """With what mends it."""
    with pytest.raises(ConfigError) as caught:
        arms.chosen(LAB, only, without, ways)
    assert told in str(caught.value)


def test_a_gate_that_lacks_a_side_is_not_judged() -> None:
    """The others are, in their order; a gate with a limit has one side."""
    without_single = Arms(("replicated", "disaggregated"), ("single", TWIN))
    assert [gate.baseline for gate in without_single.judged(LAB).gates] == [*["replicated"] * 3, None]
    assert [gate.figure for gate in without_single.not_judged(LAB)] == ["ttft_p50"]
    assert Arms().judged(LAB) == LAB
    assert not Arms().not_judged(LAB)


def test_the_skip_reason_names_the_arm() -> None:
    """None where all wanted arms are measured."""
    without_single = Arms(("replicated", "disaggregated"), ("single", TWIN))
    assert without_single.skip_reason("replicated") is None
    assert without_single.skip_reason("replicated", "single") == "ARM-LEFT-OUT: single by --arm or --without"

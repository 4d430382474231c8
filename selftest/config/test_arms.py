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


BEST = LAB.gates[0].model_copy(update={"baseline": "best"})
OF_TUNED = BEST.model_copy(update={"candidate": "disaggregated@tuned"})


def test_the_best_is_that_of_the_arms_of_other_kinds() -> None:
    """Any one of them is enough; with none the gate lacks those that were left out."""
    session = (*arms.OWN, "disaggregated@tuned", "replicated@tuned", "sharded")
    others = ("single", "replicated", "replicated@tuned", "sharded")
    assert arms.baselines(BEST, session) == arms.baselines(OF_TUNED, session) == others
    assert arms.baselines(LAB.gates[0], session) == ("replicated",)
    assert arms.twinned(BEST, session) == "replicated"
    assert arms.twinned(BEST, ("sharded", "disaggregated", "single")) == "sharded"
    alone = Arms(("disaggregated", "disaggregated@tuned"), ("single", "replicated", TWIN))
    assert alone.lacking(BEST) == ("single", "replicated")
    assert Arms(("single", "disaggregated"), ("replicated", TWIN)).judges(BEST)


def test_a_gate_of_a_way_wants_the_way() -> None:
    """It is judged where --way asks for it; the reason of a skipped test tells that from --without."""
    assert Arms().lacking(OF_TUNED) == ("disaggregated@tuned",)
    assert Arms().skip_reason(*Arms().lacking(OF_TUNED)) == (
        "ARM-LEFT-OUT: disaggregated@tuned without its --way"
    )
    both = Arms(("replicated", "disaggregated"), ("single", TWIN)).skip_reason("single", "sharded")
    assert both == "ARM-LEFT-OUT: single by --arm or --without, sharded without its --way"


def test_disaggregated_may_go_where_it_is_no_candidate() -> None:
    """Also where the gates that want it lack their baseline; it is kept for one gate of several."""
    way = "disaggregated@tuned"
    lab = LAB.model_copy(update={"gates": (OF_TUNED,)})
    kept = ("single", "replicated", TWIN, way)
    assert arms.chosen(lab, (), ("disaggregated",), [way]).kept == kept
    named = LAB.model_copy(update={"gates": (OF_TUNED, LAB.gates[0])})
    without = ("disaggregated", "replicated")
    assert arms.chosen(named, (), without, [way]).kept == ("single", TWIN, way)
    with pytest.raises(ConfigError, match="candidate of 1 of 2 gates"):
        arms.chosen(named, (), ("disaggregated",), [way])


def test_the_skip_reason_names_the_arm() -> None:
    """None where all wanted arms are measured."""
    without_single = Arms(("replicated", "disaggregated"), ("single", TWIN))
    assert without_single.skip_reason("replicated") is None
    assert without_single.skip_reason("replicated", "single") == "ARM-LEFT-OUT: single by --arm or --without"

"""Settings are drawn by seed, spread over the space, none twice, the same for every way.

Oracle: counting. Of independent draws, a control, the counts differ by more.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagglab.config import inherit
from disagglab.config.drawing import distinct, draw, latin, nodes_of
from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.search_space import TuningSection, Value
from disagglab.config.setting import Setting
from disagglab.paths import LABS

SPACE: dict[str, list[Value]] = {
    "max-num-batched-tokens": [128, 256, 512, 1024, 2048],
    "max-num-seqs": [16, 32, 64],
    "enable-prefix-caching": [True, False],
}
KINDS = ["single", "replicated", "disaggregated", "sharded"]
RAW = inherit.read(LABS / "embedded.toml").table


def section(**changes: Any) -> TuningSection:
    """Eight settings of four ways."""
    return TuningSection.model_validate({"workload": "chat", "kinds": KINDS, "space": SPACE, **changes})


def spread(rows: list[dict[str, Value]], name: str) -> int:
    """How much more often the commonest value stands in a column than the rarest."""
    counts = Counter(row[name] for row in rows)
    each = [counts[value] for value in SPACE[name]]
    return max(each) - min(each)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 12])
def test_every_value_stands_equally_often(count: int) -> None:
    """Give or take one, in every dimension, for many seeds; the control draws each row by itself."""
    drawn = [latin(SPACE, count, random.Random(seed)) for seed in range(50)]
    assert all(len(rows) == count for rows in drawn)
    assert max(spread(rows, name) for rows in drawn for name in SPACE) <= 1
    if count > 2:
        source = random.Random(1)
        iid = [
            [{name: source.choice(values) for name, values in SPACE.items()} for _ in range(count)]
            for _ in range(50)
        ]
        assert max(spread(rows, name) for rows in iid for name in SPACE) > 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 29), st.integers(0, 10_000))
def test_none_is_drawn_twice_nor_the_labs_own(count: int, seed: int) -> None:
    """Up to all of the 30 points but the lab's own."""
    own: dict[str, Value] = {"max-num-batched-tokens": 512, "max-num-seqs": 32, "enable-prefix-caching": True}
    rows = distinct(SPACE, own, count, random.Random(seed))
    points = [tuple(row.values()) for row in rows]
    assert len(set(points)) == count
    assert tuple(own.values()) not in points
    assert set(points) <= set(itertools.product(*SPACE.values()))


def test_a_space_is_not_larger_than_it_is() -> None:
    with pytest.raises(ValueError, match="the space has"):
        distinct({"a": [1, 2]}, {"a": 1}, 2, random.Random(1))


def test_every_way_tries_the_same_options() -> None:
    lab = load_lab("embedded")
    drawn = draw(lab, section())
    assert list(drawn) == KINDS
    assert len(set(drawn.values())) == 1
    found = drawn["single"]
    assert len(set(found)) == len(found) == 8
    assert found[0] == Setting()
    assert all(set(dict(one.args)) == set(SPACE) for one in found[1:])


def test_the_seed_decides() -> None:
    lab = load_lab("embedded")
    assert draw(lab, section()) == draw(lab, section())
    assert draw(lab, section()) != draw(lab, section(seed=2))


def test_disaggregated_serving_has_its_own_on_top() -> None:
    """The options of the engine stay those of the other ways; each further value is tried equally often."""
    lab = load_lab("embedded")
    further = {
        "prefill": {"max-num-batched-tokens": [4096, 8192]},
        "transport": {"extra.num_threads": [1, 2, 3]},
    }
    drawn = draw(lab, section(settings=7, disaggregated=further))
    assert [one.common for one in drawn["disaggregated"]] == list(drawn["replicated"])
    on_top = drawn["disaggregated"][1:]
    assert Counter(one.prefill_args for one in on_top) == {
        (("max-num-batched-tokens", 4096),): 3,
        (("max-num-batched-tokens", 8192),): 3,
    }
    assert Counter(dict(one.transport)["extra.num_threads"] for one in on_top) == {1: 2, 2: 2, 3: 2}
    assert drawn["disaggregated"][0] == Setting()


def test_what_is_the_labs_own_is_left_out() -> None:
    """So that settings that mean the same are the same: options of the lab, a role's that all servers have,
    transport as it is.
    """
    raw = {**RAW, "vllm": {**RAW["vllm"], "args": {"max-num-seqs": 16}}}
    lab = parse_lab(raw, "lab.toml")
    space: dict[str, list[Value]] = {"max-num-seqs": [16], "block-size": [64, 128]}
    further = {
        "decode": {"block-size": [128]},  # a lab file may not; the draw does not judge
        "transport": {"lease_s": [30], "extra.num_threads": [2]},
    }
    drawn = draw(lab, section(settings=3, space=space, disaggregated=further))
    assert {one.args for one in drawn["single"]} == {(), (("block-size", 64),), (("block-size", 128),)}
    for one in drawn["disaggregated"][1:]:
        assert one.transport == (("extra.num_threads", 2),)
        assert one.decode_args == (() if dict(one.args)["block-size"] == 128 else (("block-size", 128),))


def test_ratios_divide_the_nodes() -> None:
    """one-to-two: one node prefills. At 2P1D the first that decodes prefills, too; 1P2D is the lab's own."""
    lab = load_lab("one-to-two")
    names = [node.name for node in (*lab.prefill, *lab.decode)]
    assert nodes_of(lab, "1P2D") == ((), ())
    assert nodes_of(lab, "2P1D") == (tuple(names[:2]), tuple(names[2:]))
    drawn = draw(lab, section(settings=5, disaggregated={"ratios": ["1P2D", "2P1D"]}))
    assert Counter(one.prefill_nodes for one in drawn["disaggregated"][1:]) == {(): 2, tuple(names[:2]): 2}

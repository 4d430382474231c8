"""One engine over several nodes: work is divided, all-reduces come on top.

Oracle: figures worked out by hand from round speeds and sizes.
"""

from __future__ import annotations

import dataclasses

import pytest

from disagglab.predict import sharding
from disagglab.predict.sharding import AllReduces, sharded
from disagglab.predict.speeds import Prefill, Speeds, Step

ROUND = Speeds(Prefill(0.1, 0.001, 1e-6), Step(0.1, 0.01, 1e-4), 2e6, 0.002, 0.03, 0.02)
# Four all-reduces a step, each of 200 B a token at 10,000 B/s and 0.01 s beside them.
REDUCES = AllReduces(layers=2, hidden_size=100, bytes_per_value=2, link_bytes_per_s=1e4, latency_s=0.01)


def test_what_the_ranks_send_one_another() -> None:
    """Of 800 B a token, a ring of two sends 1 x as many and a ring of four 1.5 x; one rank sends nothing."""
    assert REDUCES.step_s() == pytest.approx(0.04)
    assert [REDUCES.token_s(ranks) for ranks in (1, 2, 4)] == pytest.approx([0, 0.08, 0.12])


def test_speeds_of_two_ranks_by_hand() -> None:
    """Half of each constant; 0.04 s more a step and 0.08 s more a token. Attention over what lies behind is
    divided by heads, and sends nothing more.
    """
    found = sharded(ROUND, 2, REDUCES)
    assert dataclasses.astuple(found.prefill) == pytest.approx((0.09, 0.0805, 5e-7))
    assert dataclasses.astuple(found.step) == pytest.approx((0.09, 0.085, 5e-5))
    assert dataclasses.replace(found, prefill=ROUND.prefill, step=ROUND.step) == ROUND
    assert sharded(ROUND, 2, REDUCES, fixed_s=0.06).step.base_s == pytest.approx(0.02 + 0.06 + 0.04)
    assert sharded(ROUND, 1, REDUCES) == ROUND


def test_with_a_link_that_costs_nothing_ranks_divide_the_time() -> None:
    """The negative control is the link above, over which two ranks are slower than one at each token."""
    free = dataclasses.replace(REDUCES, link_bytes_per_s=1e18, latency_s=0.0)
    assert sharded(ROUND, 4, free).prefill.time_s(400) == pytest.approx(ROUND.prefill.time_s(400) / 4)
    assert sharded(ROUND, 2, REDUCES).prefill.time_s(400) > ROUND.prefill.time_s(400)


@pytest.mark.parametrize(("ranks", "fixed_s"), [(0, 0.0), (2, 0.2), (2, -0.1)])
def test_what_cannot_be_divided_is_refused(ranks: int, fixed_s: float) -> None:
    """No rank at all; a fixed part that is more than the whole, or negative."""
    with pytest.raises(ValueError, match=f"{ranks} ranks, {fixed_s:g} s fixed"):
        sharded(ROUND, ranks, REDUCES, fixed_s)


def test_sizes_come_from_the_config() -> None:
    """Also where a config has the names of GPT-2; a missing one is named."""
    found = sharding.all_reduces({"num_hidden_layers": 30, "hidden_size": 512}, "bfloat16", 1e9, 1e-5)
    assert found == AllReduces(30, 512, 2, 1e9, 1e-5)
    assert sharding.all_reduces({"n_layer": 12, "n_embd": 768}, "float32", 1e9) == AllReduces(12, 768, 4, 1e9)
    with pytest.raises(KeyError, match="hidden_size"):
        sharding.all_reduces({"num_hidden_layers": 30}, "bfloat16", 1e9)

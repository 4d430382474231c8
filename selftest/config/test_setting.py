"""Settings and candidates: equal ones are equal, a way is what the setting says, equal servers start once."""

from __future__ import annotations

import pytest

from disagglab.config import way
from disagglab.config.labs import load_lab
from disagglab.config.setting import Candidate, Setting, nested, options, start_key, without

CHUNK = Setting(options({"max-num-batched-tokens": 128}))
FULL = Setting(
    args=options({"max-num-seqs": 32, "block-size": 64}),
    prefill_args=options({"max-num-batched-tokens": 2048}),
    transport=options({"lease_s": 60, "extra.num_threads": 4}),
    prefill_nodes=("b",),
    decode_nodes=("a",),
)


def test_equal_settings_are_one() -> None:
    """Whatever the order in which options were given."""
    again = Setting(options({"block-size": 64, "max-num-seqs": 32}))
    assert {FULL.common, again} == {again}
    assert Setting().own
    assert not CHUNK.own
    assert FULL.common.beside.own
    assert FULL.beside == Setting((), *[getattr(FULL, key) for key in (
        "prefill_args", "decode_args", "transport", "prefill_nodes", "decode_nodes"
    )])  # fmt: skip


def test_words_say_all_of_it() -> None:
    assert Setting().words == "the lab's own"
    assert FULL.words == (
        "block-size 64, max-num-seqs 32; prefill: max-num-batched-tokens 2048;"
        " transport: extra.num_threads 4, lease_s 60; 1P1D"
    )
    assert Setting((("async-scheduling", False),)).words == "async-scheduling false"


def test_a_way_is_what_the_setting_says() -> None:
    """Served, it has the options, the transport and the roles of the setting, and else the lab's."""
    lab = load_lab("embedded")
    made = FULL.way("disaggregated", "tuned", "what", "expects")
    changed = way.changed(lab, made)
    assert made.arm == "disaggregated@tuned"
    assert changed.vllm.args == {**lab.vllm.args, "block-size": 64, "max-num-seqs": 32}
    assert changed.transport.extra == {"num_threads": 4}
    assert changed.transport.lease_s == 60
    roles = {node.name: (node.role, node.args) for node in changed.nodes}
    assert roles == {"a": ("decode", {}), "b": ("prefill", {"max-num-batched-tokens": 2048})}
    assert CHUNK.way("replicated", "tuned", "w", "e").args == {"max-num-batched-tokens": 128}


def test_only_disaggregated_serving_has_roles() -> None:
    with pytest.raises(ValueError, match="replicated with a setting of disaggregated"):
        Candidate("replicated", FULL)
    assert Candidate("disaggregated", FULL).setting == FULL


def test_servers_that_are_the_same_start_once() -> None:
    """As the suite itself sees it, which compares the command lines of servers."""
    lab = load_lab("embedded")
    candidates = [
        *(Candidate(kind, CHUNK) for kind in ("single", "replicated", "disaggregated", "sharded")),
        Candidate("single", Setting(options({"max-num-batched-tokens": 256}))),
        Candidate("disaggregated", FULL),
        Candidate("disaggregated", FULL.common),
        Candidate("replicated", FULL.common),
    ]
    keys = [start_key(one) for one in candidates]
    assert [keys.index(key) for key in keys] == [0, 0, 0, 3, 4, 5, 6, 6]
    served = [way.start_key(lab, one.setting.way(one.kind, "x", "w", "e")) for one in candidates]
    assert [served.index(key) for key in served] == [0, 0, 0, 3, 4, 5, 6, 6]


def test_dotted_keys_are_tables_inside() -> None:
    assert nested({"lease_s": 6, "extra.a": 1, "extra.b": "x"}) == {"lease_s": 6, "extra": {"a": 1, "b": "x"}}
    assert without({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}) == {"b": 2, "c": 3}

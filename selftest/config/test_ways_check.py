"""What a ``[[way]]`` cannot say is refused with the file, the key and what mends it, and nothing else is.

Oracle: rows that are right, each spoilt in one place.
"""

from __future__ import annotations

from typing import Any

import pytest

from disagglab.config import inherit
from disagglab.config.labs import parse_lab
from disagglab.errors import ConfigError, Problem
from disagglab.paths import LABS

EMBEDDED = inherit.read(LABS / "embedded.toml").table
WORDS = {"what": "w", "expects": "e"}
SEQS = {"max-num-seqs": 8}


def problems(*rows: dict[str, Any], **changes: Any) -> tuple[Problem, ...]:
    """What is wrong with the embedded lab with these ways; nothing if it is taken."""
    try:
        parse_lab({**EMBEDDED, **changes, "way": [{**WORDS, **row} for row in rows]}, "lab.toml")
    except ConfigError as error:
        return tuple(error.problems)
    return ()


@pytest.mark.parametrize(
    "row",
    [
        {"name": "v", "args": SEQS},
        {"name": "again", "args": SEQS},
        {"name": "v", "env": {"A": "1"}},
        {"name": "v", "transport": {"lease_s": 60}},
        {"name": "v", "prefill": {"args": SEQS}},
        {"name": "v", "decode": {"env": {"A": "1"}}},
        {"name": "v", "prefill": {"nodes": ["b"]}, "decode": {"nodes": ["a"]}},
        {"kind": "single", "name": "v", "args": SEQS},
        {"kind": "replicated", "name": "v", "env": {"A": "1"}},
        {"kind": "sharded"},
        {"kind": "sharded", "name": "v", "args": {"block-size": 64}},
        {"name": "v", "args": {"block-size": 64, "kv-cache-dtype": "fp8"}},
    ],
)
def test_what_is_right_is_taken(row: dict[str, Any]) -> None:
    """Negative control: the embedded lab takes each of these."""
    assert problems(row) == ()


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"args": SEQS}, "way[0].name", "disaggregated is the lab's own settings", 'add name = "chunk-128", say'),
    ({"name": "sharded", "args": SEQS}, "way[0].name", "sharded is the name of a kind of way", "another"),
    (
        {"kind": "single", "name": "v-again", "args": SEQS},
        "way[0].name", "v-again is the name of the twin of single@v", "choose another name",
    ),
    ({"kind": "single", "args": SEQS}, "way[0].name", "single is the lab's own settings", "add name"),
    ({"kind": "replicated", "name": "v"}, "way[0]", "changes nothing", "add transport, args, env"),
    ({"name": "v", "prefill": {}}, "way[0]", "changes nothing", "prefill or decode"),
    (
        {"kind": "single", "name": "v", "args": SEQS, "transport": {"lease_s": 60}},
        "way[0].transport", "of a single way, which has no roles and moves no KV", 'kind = "disaggregated"',
    ),
    (
        {"kind": "replicated", "name": "v", "args": SEQS, "prefill": {"args": SEQS}},
        "way[0].prefill", "of a replicated way", 'kind = "disaggregated"',
    ),
    ({"kind": "sharded", "decode": {"nodes": ["a"]}}, "way[0].decode", "of a sharded way", "remove it"),
    (
        {"kind": "sharded", "args": {"tensor-parallel-size": 2}},
        "way[0].args.tensor-parallel-size", "set by the suite", "the number of nodes, or of their GPUs",
    ),
    ({"kind": "sharded", "args": {"nnodes": 2}}, "way[0].args.nnodes", "set by the suite", "the hosts of"),
    ({"name": "v", "prefill": {"args": {"port": 1}}}, "way[0].prefill.args.port", "set by the", "[ports]"),
    (
        {"name": "v", "decode": {"args": {"kv-transfer-config": "x"}}},
        "way[0].decode.args.kv-transfer-config", "set by the suite", "[transport]",
    ),
    (
        {"name": "v", "decode": {"args": {"kv_transfer_config": "x"}}},
        "way[0].decode.args.kv_transfer_config", "set by the suite", "[transport]",
    ),
    (
        {"name": "v", "prefill": {"args": {"block-size": 64}}},
        "way[0].prefill.args.block-size", "set by the suite", "way[0].args: both roles have to agree on it",
    ),
    (
        {"name": "v", "decode": {"args": {"tensor-parallel-size": 2}}},
        "way[0].decode.args.tensor-parallel-size", "set by the suite", "both roles have to agree on it",
    ),
    ({"name": "v", "prefill": {"args": {"--x": 1}}}, "way[0].prefill.args.--x", "dashes in front", "write x"),
    ({"name": "v", "prefill": {"nodes": ["c"]}}, "way[0].prefill.nodes", "no [[node]] is named c", "a, b"),
    (
        {"name": "v", "prefill": {"nodes": ["a", "a"]}}, "way[0].prefill.nodes", "a twice", "name it once",
    ),
    (
        {"name": "v", "prefill": {"nodes": ["a"]}, "decode": {"nodes": ["a"]}},
        "way[0].decode.nodes", "a prefills already", "give each node one role",
    ),
    ({"name": "v", "prefill": {"nodes": ["b"]}}, "way[0].decode", "no node is left to decode", "leave a"),
    ({"name": "v", "decode": {"nodes": ["a"]}}, "way[0].prefill", "no node is left to prefill", "leave a"),
    ({"name": "v", "transport": {"kv_buffer_device": "cuda"}}, "way[0].transport.kv_buffer_device", "no gpus",
     'set it to "cpu"'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "key", "wrong", "mend"), WRONG)
def test_what_is_wrong_is_refused(row: dict[str, Any], key: str, wrong: str, mend: str) -> None:
    """With the one key that is wrong, and nothing besides."""
    (problem,) = problems(row)
    assert (problem.file, problem.key) == ("lab.toml", key)
    assert wrong in problem.wrong
    assert mend in problem.mend


def test_a_node_that_is_nearly_named_is_offered() -> None:
    nodes = [{**node, "name": f"node-{node['name']}"} for node in EMBEDDED["node"]]
    (problem,) = problems({"name": "v", "prefill": {"nodes": ["nod-a"]}}, node=nodes)
    assert problem.mend == "did you mean node-a?"


def test_arms_are_told_apart_by_kind_and_name() -> None:
    """Two kinds may have one name; the same arm twice may not be, named or not."""
    own, other = ({"kind": kind, "name": "v", "args": SEQS} for kind in ("single", "replicated"))
    assert problems(own, other, {"kind": "sharded"}) == ()
    (problem,) = problems(own, other, own)
    assert (problem.key, problem.wrong) == ("way[2].name", "single@v is used twice")
    (problem,) = problems({"kind": "sharded"}, {"kind": "sharded", "args": SEQS})
    assert (problem.key, problem.wrong) == ("way[1].name", "sharded is used twice")


def test_all_mistakes_are_told_at_once() -> None:
    found = problems(
        {"kind": "replicated", "args": {"port": 1}},
        {"name": "v", "prefill": {"nodes": ["c"], "args": {"block-size": 64}}},
    )
    assert [one.key for one in found] == [
        "way[0].name", "way[0].args.port", "way[1].prefill.args.block-size", "way[1].prefill.nodes"
    ]  # fmt: skip


def test_what_is_wrong_with_the_lab_itself_is_not_told_again_of_its_way() -> None:
    """[transport] wants cuda without GPUs: one problem, that of the lab."""
    changed = {**EMBEDDED["transport"], "kv_buffer_device": "cuda"}
    found = problems({"name": "v", "transport": {"lease_s": 60}}, transport=changed)
    assert [one.key for one in found] == ["transport.kv_buffer_device"]


def nodes(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Nodes that have these parts; the first prefills."""
    return [
        {
            "name": f"n{number}",
            "address": f"198.18.1.{number + 1}",
            "role": "decode" if number else "prefill",
            **part,
        }
        for number, part in enumerate(parts)
    ]


def sharded(*parts: dict[str, Any]) -> list[tuple[str, str]]:
    """Key and mistake of a sharded way over nodes of these parts, on the hosts that they name."""
    hosts = [{"name": name} for name in dict.fromkeys(part["host"] for part in parts if "host" in part)]
    return [(one.key, one.wrong) for one in problems({"kind": "sharded"}, node=nodes(*parts), host=hosts)]


def test_a_server_over_equal_parts_is_taken() -> None:
    """Negative control: cores of one host, a GPU each on two, two GPUs each on two, two nodes a host."""
    assert sharded({"cpus": [0]}, {"cpus": [1]}, {"cpus": [2]}) == []
    for gpus in ([0], [0, 1]):
        assert sharded({"host": "x", "gpus": gpus}, {"host": "y", "gpus": gpus}) == []
    assert sharded(*({"host": host, "cpus": [core]} for host in "xy" for core in (0, 1))) == []


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        (({"gpus": [0]}, {"cpus": [1]}), "some have GPUs and others none"),
        (({"gpus": [0]}, {"gpus": [1, 2]}), "different numbers of GPUs"),
        (
            ({"host": "x", "cpus": [0]}, {"host": "x", "cpus": [1]}, {"host": "y", "cpus": [0]}),
            "over hosts with different numbers of ranks: 2 on x, 1 on y",
        ),
    ],
)
def test_a_server_cannot_lie_on_unequal_parts(parts: tuple[dict[str, Any], ...], wrong: str) -> None:
    """vLLM gives every host, and every node of ours, as many ranks as the others."""
    found = sharded(*parts)
    assert all(key == "way[0].kind" for key, _ in found)
    assert any(wrong in told for _, told in found)

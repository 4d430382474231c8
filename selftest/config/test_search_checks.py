"""[tuning] of a lab file: every mistake is found before anything starts, with file, key and mend.

The oracle is a table of broken sections: what is broken, the key that has to be named, a word of the mend.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from disagglab.config import inherit
from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.schema import Lab
from disagglab.config.search_checks import asked, workload_of
from disagglab.errors import ConfigError
from disagglab.paths import LABS

RAW = inherit.read(LABS / "embedded.toml").table
GOOD: dict[str, Any] = {
    "workload": "documents",
    "settings": 4,
    "space": {"max-num-batched-tokens": [128, 256, 512], "max-num-seqs": [16, 32]},
    "disaggregated": {
        "prefill": {"max-num-batched-tokens": [1024]},
        "decode": {"max-num-seqs": [64]},
        "transport": {"extra.num_threads": [1, 4], "lease_s": [30, 60]},
        "ratios": ["1P1D"],
    },
}
ALONE = {key: value for key, value in GOOD.items() if key != "disaggregated"}


def lab_with(tuning: dict[str, Any], **changes: Any) -> Lab:
    """The embedded lab with this section; ``changes`` to its other sections."""
    raw = copy.deepcopy({**RAW, "tuning": tuning, **changes})
    return parse_lab({key: value for key, value in raw.items() if value is not None}, "lab.toml")


def further(**changes: Any) -> dict[str, Any]:
    """The good section with other dimensions of disaggregated serving."""
    return {**GOOD, "disaggregated": changes}


def test_a_good_section_is_read() -> None:
    """The negative control of the table below: without its mistakes the section is taken."""
    tuning = lab_with(GOOD).tuning
    assert tuning is not None
    assert tuning.space["max-num-seqs"] == [16, 32]
    assert tuning.confirm == 3
    assert len(tuning.rates) == 5
    assert load_lab("embedded").tuning is None


BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "option of the suite": ({**GOOD, "space": {"port": [1, 2, 3, 4]}}, "tuning.space.port", "[ports]"),
    "the model's length": (
        {**GOOD, "space": {"max_model_len": [1, 2, 3, 4]}}, "tuning.space.max_model_len", "max_model_len",
    ),
    "ranks": (
        {**GOOD, "space": {"tensor-parallel-size": [1, 2, 3, 4]}},
        "tuning.space.tensor-parallel-size", "sharded",
    ),
    "memory beside others": (
        {**GOOD, "space": {"gpu-memory-utilization": [0.5, 0.6, 0.7, 0.8]}},
        "tuning.space.gpu-memory-utilization", "remove it",
    ),
    "dashes": (
        {**GOOD, "space": {"--block-size": [1, 2, 3, 4]}}, "tuning.space.--block-size", "block-size =",
    ),
    "no dimension": ({**GOOD, "space": {}}, "tuning.space", "correct"),
    "no value": (
        {**GOOD, "space": {**GOOD["space"], "block-size": []}},
        "tuning.space.block-size", "remove the option",
    ),
    "a value twice": (
        {**GOOD, "space": {"max-num-seqs": [16, 32, 16, 64, 8]}}, "tuning.space.max-num-seqs", "once",
    ),
    "fewer settings than asked for": ({**GOOD, "settings": 8}, "tuning.settings", "set it to 7"),
    "one setting": ({**GOOD, "settings": 1}, "tuning.settings", "correct the value"),
    "role with a connector": (
        further(decode={"kv-transfer-config": ["{}"]}), "tuning.disaggregated.decode.kv-transfer-config",
        "[transport]",
    ),
    "role with a block size": (
        further(prefill={"block-size": [64]}), "tuning.disaggregated.prefill.block-size", "[tuning.space]",
    ),
    "unknown key of the transport": (
        further(transport={"extras.num_threads": [1]}), "tuning.disaggregated.transport.extras.num_threads",
        "extra",
    ),
    "wrong value of the transport": (
        further(transport={"connector": ["NixlConnector", "Nixl"]}),
        "tuning.disaggregated.transport.connector", "correct the value",
    ),
    "transport that the nodes cannot have": (
        further(transport={"kv_buffer_device": ["cpu", "cuda"]}),
        "tuning.disaggregated.transport.kv_buffer_device", '"cpu"',
    ),
    "lease by its other name": (
        further(transport={"extra.kv_lease_duration": [9]}),
        "tuning.disaggregated.transport.extra.kv_lease_duration", "lease_s",
    ),
    "ratio of three nodes": (further(ratios=["1P2D"]), "tuning.disaggregated.ratios", "1P1D"),
    "no ratio": (further(ratios=["one to one"]), "tuning.disaggregated.ratios", "1P1D"),
    "unknown dimension": (further(both={}), "tuning.disaggregated.both", "known keys"),
    "workload that is not there": ({**GOOD, "workload": "nothing"}, "tuning.workload", "exists"),
    "unknown way": ({**ALONE, "kinds": ["single", "double"]}, "tuning.kinds", "replicated"),
    "a way twice": ({**ALONE, "kinds": ["single", "single"]}, "tuning.kinds", "once"),
    "dimensions of a way that is not tuned": ({**GOOD, "kinds": ["single"]}, "tuning.disaggregated", "kinds"),
    "rate of nothing": ({**GOOD, "rates": [0.5, 0]}, "tuning.rates[1]", "correct the value"),
    "no rounds": ({**GOOD, "rounds": 0}, "tuning.rounds", "correct the value"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_section_names_file_key_and_mend(case: str) -> None:
    """One mistake gives a problem that names the file, the key and what mends it."""
    tuning, key, mend = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        lab_with(tuning)
    found = [problem for problem in caught.value.problems if problem.key == key]
    assert found, f"no problem names {key}: {caught.value}"
    assert mend in found[0].mend
    assert found[0].file == "lab.toml"


def test_a_lab_without_objective_cannot_be_tuned() -> None:
    gates = [gate for gate in RAW["gate"] if gate["metric"] != "slo_attainment"]
    with pytest.raises(ConfigError, match=r"tuning: without \[slo\]"):
        lab_with(GOOD, slo=None, gate=gates)


def test_nodes_that_share_cores_cannot_be_tuned() -> None:
    nodes = [{**node, "cpus": [0], "share_cpus": True} for node in RAW["node"]]
    with pytest.raises(ConfigError, match="tuning: nodes share cores"):
        lab_with(GOOD, node=nodes, gate=[])


def test_a_sharded_way_wants_two_ranks() -> None:
    """What a [[way]] of kind sharded is refused for, tuning is too; over two nodes it is taken."""
    nodes = [RAW["node"][0] | {"gpus": [0]}, RAW["node"][1]]
    tuning = {**ALONE, "kinds": ["sharded"]}
    assert lab_with(tuning).tuning
    with pytest.raises(ConfigError, match=r"tuning\.kinds: sharded over nodes"):
        lab_with(tuning, node=nodes)


def test_a_run_has_the_gaps_of_a_percentile() -> None:
    """documents on the embedded lab: 4 requests of 16 tokens have 60 gaps; 7 have 105. An open loop is not
    made longer, since that would be another load: too short a one is refused.
    """
    lab = lab_with(GOOD)
    run = workload_of(lab, asked(lab))
    assert lab.workload("documents").requests == 4
    assert (run.total_requests, run.concurrency) == (7, 2)
    steady = asked(lab, "long-prompts-into-steady-decode")
    assert workload_of(lab, steady) == lab.workload("long-prompts-into-steady-decode")
    scale = {**RAW["scale"], "steady": 0.05}
    with pytest.raises(ConfigError, match=r"tuning\.workload: .* has 50 gaps"):
        lab_with({**GOOD, "workload": "long-prompts-into-steady-decode"}, scale=scale)


def test_what_a_session_asks_for_goes_before_the_section() -> None:
    lab = lab_with(GOOD)
    assert asked(lab) == lab.tuning
    found = asked(lab, "chat", 7)
    assert (found.workload, found.settings, found.space) == ("chat", 7, GOOD["space"])


@pytest.mark.parametrize(
    ("workload", "settings", "said"),
    [
        ("", 8, "--settings: 8, and this lab's"),
        ("", 1, "--settings: 1, and this lab's"),
        ("nothing", 4, "--workload nothing: no file"),
    ],
)
def test_what_a_session_cannot_have_is_refused(workload: str, settings: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(lab_with(GOOD), workload, settings)


def test_a_lab_without_the_section_says_what_to_add() -> None:
    with pytest.raises(ConfigError) as caught:
        asked(load_lab("embedded"))
    assert "add [tuning]" in caught.value.problems[0].mend

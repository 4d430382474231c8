"""Candidates as ways of a lab, and the lab file that holds them.

Oracle: the recorded answer of selftest/predict/aiconfigurator, and the reader of lab files, which refuses
what a way must not say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from disagglab.config import way
from disagglab.config.labs import load_lab
from disagglab.errors import ConfigError
from disagglab.predict import aiconfigurator, proposal
from disagglab.predict.aiconfigurator import Candidate, Question, Worker
from disagglab.predict.armforecast import ArmFigures
from disagglab.predict.proposal import Answer, Deployment

RECORDED = Path(__file__).with_name("aiconfigurator")
LAB = load_lab("two-h200")
CHAT = aiconfigurator.question(LAB, "chat", "h200_sxm")
FOUND = aiconfigurator.read_search(RECORDED, CHAT)
ARMS = [
    "sharded@aiconfigurator",
    "sharded@aiconfigurator-step",
    "replicated@aiconfigurator",
    "replicated@aiconfigurator-step",
    "disaggregated@aiconfigurator",
]


def answer() -> Answer:
    """The recorded answer, with a made forecast of two arms."""
    ways, left_out = proposal.proposals(LAB, CHAT, FOUND, "0.12.0")
    forecasts = {"single": ArmFigures(1342.4, 0.105, 0.0111), "sharded": ArmFigures(2086.0, 0.081, 0.0071)}
    return Answer(CHAT, "0.12.0", "0.24.0", ways, forecasts, (*proposal.notes(LAB, CHAT, FOUND), *left_out))


def candidate(prefill: Worker | None, decode: Worker) -> Candidate:
    """A candidate of these servers; its figures do not matter."""
    step, context = (500, 493) if prefill is None else (None, None)
    return Candidate(prefill, decode, 8, ArmFigures(1, 1, 1), step, context, "bfloat16", "bfloat16", "0.24.0")


def asked(nodes: tuple[int, int], gpus: int) -> Question:
    """The question of a lab with so many prefill and decode nodes."""
    return dataclasses.replace(CHAT, prefill_nodes=nodes[0], decode_nodes=nodes[1], gpus=gpus)


def test_the_lab_file_is_one_that_can_be_measured(tmp_path: Path) -> None:
    """It is read without a problem, has each proposal as a way, and keeps the lab's nodes and gates."""
    path = tmp_path / proposal.LAB_FILE
    path.write_text(answer().lab_file("two-h200"), encoding="utf-8")
    lab = load_lab(str(path))
    assert [one.arm for one in lab.ways] == [one.arm for one in answer().proposals] == ARMS
    assert (lab.nodes, lab.gates) == (LAB.nodes, LAB.gates)
    changed = {one.arm: way.changed(lab, one) for one in lab.ways}
    chunks = {arm: changed[arm].vllm.args.get("max-num-batched-tokens") for arm in ARMS[:4]}
    assert list(chunks.values()) == [4060, 551, 4060, 527]
    roles = {node.role: node.args for node in changed["disaggregated@aiconfigurator"].nodes}
    assert roles == {
        "prefill": {"max-num-seqs": 1, "max-num-batched-tokens": 3548},
        "decode": {"max-num-seqs": 512, "max-num-batched-tokens": 512},
    }


def test_a_step_that_the_script_has_is_no_second_way() -> None:
    """Where the search computed with the very chunk of the start script, there is one way."""
    same = dataclasses.replace(FOUND[0], step_tokens=4060)
    ways, _left_out = proposal.proposals(LAB, CHAT, [same], "0.12.0")
    assert [one.arm for one in ways] == ["sharded@aiconfigurator"]


def test_each_way_is_forecast_with_its_own_step() -> None:
    """Tokens of prompts: 4,060 as the script has it, 512 of 551 and of 527 in the search, 8,192 the lab."""
    contexts = [one.deployment.context for one in answer().proposals[:4]]
    assert contexts == [4060, 512, 4060, 512]
    assert {one.context for one in proposal.own(CHAT)} == {8192}


@pytest.mark.parametrize(
    ("nodes", "gpus", "prefill", "decode", "kind"),
    [
        ((1, 1), 1, None, Worker(2, 1, {}), "replicated"),
        ((1, 1), 1, None, Worker(1, 2, {}), "sharded"),
        ((1, 1), 2, None, Worker(2, 2, {}), "replicated"),
        ((1, 1), 2, None, Worker(4, 1, {}), None),
        ((2, 2), 1, None, Worker(2, 2, {}), None),
        ((1, 1), 1, Worker(1, 1, {}), Worker(1, 1, {}), "disaggregated"),
        ((2, 2), 1, Worker(1, 1, {}), Worker(3, 1, {}), "disaggregated"),
        ((2, 2), 1, Worker(1, 1, {}), Worker(1, 2, {}), None),
        ((1, 1), 1, Worker(2, 1, {}), Worker(1, 1, {}), None),
    ],
)
def test_a_way_lies_on_whole_nodes(
    nodes: tuple[int, int], gpus: int, prefill: Worker | None, decode: Worker, kind: str | None
) -> None:
    """What has several servers on one node, or one on a part of the nodes, is left out and told."""
    lab = load_lab("four-h200-2p2d") if nodes == (2, 2) else LAB
    ways, left_out = proposal.proposals(lab, asked(nodes, gpus), [candidate(prefill, decode)], "0.12.0")
    assert {one.deployment.arm.partition("@")[0] for one in ways} == ({kind} if kind else set())
    assert len(left_out) == (kind is None)


def test_another_ratio_names_its_nodes() -> None:
    """Of four nodes, two of them prefill by the lab, one prefills now; the lab's own ratio has no names."""
    lab = load_lab("four-h200-2p2d")
    names = [node.name for node in lab.nodes]
    found = [candidate(Worker(1, 1, {}), Worker(3, 1, {})), candidate(Worker(2, 1, {}), Worker(2, 1, {}))]
    (other, same), _left_out = proposal.proposals(lab, asked((2, 2), 1), found, "0.12.0")
    assert (other.table["prefill"]["nodes"], other.table["decode"]["nodes"]) == (names[:1], names[1:])
    assert "nodes" not in same.table["prefill"]


@pytest.mark.parametrize(
    ("servers", "concurrency", "batch", "busy"), [(2, 16, 8, 2), (2, 17, 9, 2), (2, 1, 1, 1), (1, 16, 16, 1)]
)
def test_requests_are_spread_over_the_servers(servers: int, concurrency: int, batch: int, busy: int) -> None:
    """An odd one is rounded up; with fewer requests than servers some have none."""
    one = Deployment("replicated", None, Worker(servers, 1, {}), 8192)
    assert (one.batch(concurrency), one.busy(concurrency)) == (batch, busy)


def test_the_labs_own_ways_are_forecast_beside() -> None:
    """Four arms; the servers of two nodes of one GPU."""
    shapes: Sequence[tuple[str, int | None, int, int]] = [
        (one.arm, one.prefill.count if one.prefill else None, one.decode.count, one.decode.ranks)
        for one in proposal.own(CHAT)
    ]
    assert shapes == [
        ("single", None, 1, 1),
        ("replicated", None, 2, 1),
        ("disaggregated", 1, 1, 1),
        ("sharded", None, 1, 2),
    ]


def test_the_record_holds_every_figure() -> None:
    """2 x 11.649 x 128 tokens/s over two GPUs; what is forecast is found again by arm."""
    record = json.loads(json.dumps(answer().as_dict()))
    whole = {one["arm"]: one for one in record["proposals"]}
    assert whole["replicated@aiconfigurator"]["output_tokens_per_s_per_gpu"] == pytest.approx(1491.072)
    assert whole["replicated@aiconfigurator"]["concurrency"] == 32
    forecasts, of = proposal.read_record(record, "f")
    assert forecasts == answer().forecasts
    assert of == {"workload": "chat", "definition": LAB.workload("chat").definition}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "KeyError"),
        ({"forecasts": {"single": {"ttft_s": 1}}, "asked": {}}, "TypeError"),
        ({"forecasts": [], "asked": {}}, "AttributeError"),
        ({"forecasts": {}, "asked": {"workload": "w", "definition": "d"}}, "open loop"),
    ],
)
def test_another_record_is_refused(record: dict[str, object], said: str) -> None:
    """What propose did not write, and a record without a forecast."""
    with pytest.raises(ConfigError, match=said):
        proposal.read_record(record, "f")


def test_tables_and_notes_are_printed() -> None:
    """A row an arm, both releases, and what the figures are not."""
    lines = answer().lines()
    assert sum("@aiconfigurator" in line for line in lines) == len(ARMS)
    assert any("are of vLLM 0.24.0, the lab's servers are 0.26.0" in line for line in lines)
    row = next(line.split() for line in lines if "replicated@aiconfigurator " in line)
    assert row[1:6] == ["32", "2,982", "1,491", "0.119", "9.88"]


def test_what_the_lab_has_otherwise_is_noted() -> None:
    """KV in another dtype, several hosts, an open loop: a sentence each."""
    first = proposal.notes(LAB, CHAT, FOUND)
    other = [dataclasses.replace(FOUND[0], kv_dtype="fp8", vllm=LAB.vllm.version)]
    nodes = (LAB.nodes[0], LAB.nodes[1].model_copy(update={"host": "other"}))
    lab = LAB.model_copy(update={"nodes": nodes})
    changed = proposal.notes(lab, dataclasses.replace(CHAT, concurrency=None), other)
    said = [note for note in changed if note not in first]
    assert len(said) == 3
    assert "KV in fp8" in said[0]
    assert "several" in said[1]
    assert "open loop" in said[2]

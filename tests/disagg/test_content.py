"""What came out is what one server alone would have said, and what another implementation says.

Tie policy (measure/same_answer.py): answers are compared token by token up to their first divergence; where
the single server's gap between its two best tokens is below GAP_NATS there, either choice is right and the
rest is not compared. A divergence at a wider gap fails, and so does a probe set of which too little could
be compared. The last tests show that the same check catches another prompt's KV cache. With random weights
the text means nothing, and its positions are ties: these tests are skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from disagglab.config.schema import Lab
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.same_answer import DIFFERENT, EQUAL, GAP_NATS, TIE, Agreement, agree
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.serving import openai
from disagglab.serving.openai import Completion
from disagglab.serving.topology import Topology

pytestmark = pytest.mark.lab_has("real_weights")

OUTPUT_TOKENS = 8
COMPARED_SHARE = 0.6  # of the tokens of a probe set; below it the set proves too little
REFERENCE_LIMIT_S = 300.0
COUNT = 1  # index of the counting probe, whose answer has wide gaps
PROBES = (
    "The capital of France is",
    "1, 2, 3, 4, 5, 6, 7, 8, 9,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "A B C D E F G H I J K L",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a",
    "January, February, March, April, May,",
    "To be, or not to be, that is the",
    "2, 4, 6, 8, 10, 12, 14, 16,",
    "red green blue red green blue red green blue red green",
    "a b a b a b a b a b a b a b a",
    "<ul><li>one</li><li>one</li><li>one</li><li>one</li>",
    "10 20 30 40 50 60 70",
    "yes no yes no yes no yes no yes no yes",
    "one two three four one two three four one two three four one two",
    "Zürich, Genève, Łódź, 東京, 北京. Zürich, Genève, Łódź, 東京,",
)
LONG = "".join(f"{number}, " for number in range(1, 400))
MULTIBYTE = "東京 北京 서울 Łódź Zürich Ελλάδα Москва 🙂 " * 12
FOREIGN = PROBES[4] * 2  # no numbers in it, and no shorter than the counting probe
EDGES = ((1, -1), (1, 0), (1, 1), (4, 0), (4, 1))

Tokenize = Callable[[str], list[int]]


@pytest.fixture
def tokenize(single: Topology) -> Tokenize:
    """Token ids of a text, as the servers see them."""
    return lambda text: openai.tokenize(single.servers[0].url, single.served_name, text)


def request_of(topology: Topology, prompt: Sequence[int], salt: str) -> dict[str, object]:
    """A greedy request whose prompt no earlier one has left in a prefix cache."""
    return openai.body(topology.served_name, list(prompt), OUTPUT_TOKENS) | {"cache_salt": salt}


def alone(single: Topology, prompt: Sequence[int], salt: str) -> Completion:
    """What the single server says."""
    return openai.complete(single.router.url, request_of(single, prompt, f"alone-{salt}"))


def apart(topology: Topology, prompt: Sequence[int], salt: str, lab: Lab, shape: KvShape) -> Completion:
    """What prefill and decode say together, with the path proved."""
    before = ledger.read(topology)
    answer = openai.complete(topology.router.url, request_of(topology, prompt, f"apart-{salt}"))
    after = ledger.settle(topology, before, 1)
    sent = [Sent(answer.prompt_tokens, answer.output_tokens)]
    ledger.prove(topology, before, after, sent, shape, lab.vllm.version)
    return answer


def require_agreement(pairs: Sequence[tuple[str, Completion, Completion]]) -> dict[str, int]:
    """Fail on a divergence that is no tie, or if too few tokens could be compared; count the outcomes."""
    found: list[tuple[str, Agreement]] = [(name, agree(right, answer)) for name, right, answer in pairs]
    wrong = [f"{name}: {agreement}" for name, agreement in found if agreement.outcome == DIFFERENT]
    assert not wrong, f"{len(wrong)} of {len(found)} answers differ from the single server's: {wrong}"
    compared = sum(agreement.compared for _, agreement in found)
    wanted = sum(len(right.token_ids) for _, right, _ in pairs)
    assert compared >= COMPARED_SHARE * wanted, (
        f"near ties left only {compared} of {wanted} tokens to compare; choose other probes"
    )
    outcomes = [agreement.outcome for _, agreement in found]
    return {"equal": outcomes.count(EQUAL), "tie": outcomes.count(TIE), "tokens": compared}


def record_outcome(record: Recorder, what: str, counts: dict[str, int]) -> None:
    """How many answers were equal, and how many parted at a near tie."""
    note = (
        f"{counts['tie']} more part at a near tie (below {GAP_NATS} nat); {counts['tokens']} tokens compared"
    )
    record.numbers(
        f"answers equal token for token, {what}", [counts["equal"]], "answers", what="count", note=note
    )


def test_greedy_output_equals_the_single_servers(
    single: Topology, disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder, tokenize: Tokenize
) -> None:
    """Short, long and multi-byte prompts give the single server's tokens at temperature 0."""
    pairs = []
    for number, text in enumerate((*PROBES, LONG, MULTIBYTE)):
        prompt = tokenize(text)
        right = alone(single, prompt, str(number))
        pairs.append((text[:40], right, apart(disaggregated, prompt, str(number), lab, shape)))
    record_outcome(record, "texts", require_agreement(pairs))


def test_output_at_block_edges_equals_the_single_servers(
    single: Topology, disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder, tokenize: Tokenize
) -> None:
    """One token below, at and above a block edge, where an off-by-one in the last block would show."""
    block = ledger.block_size(disaggregated.decode[0].metrics())
    text = tokenize(LONG)
    pairs = []
    for count, more in EDGES:
        length = count * block + more
        right = alone(single, text[:length], f"edge-{length}")
        pairs.append(
            (f"{length} tokens", right, apart(disaggregated, text[:length], f"edge-{length}", lab, shape))
        )
    record_outcome(record, "block edges", require_agreement(pairs))


def test_concurrent_prompts_do_not_mix(
    single: Topology, disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder, tokenize: Tokenize
) -> None:
    """Sixteen distinct prompts at once: each answer is its own prompt's, and the bytes of all add up."""
    prompts = [tokenize(text) for text in PROBES]
    right = [alone(single, prompt, f"mix-{number}") for number, prompt in enumerate(prompts)]
    texts = {answer.token_ids for answer in right}
    assert len(texts) == len(right), "two prompts have the same answer; mixing them up could not be seen"
    before = ledger.read(disaggregated)
    with ThreadPoolExecutor(len(prompts)) as pool:
        requests = [request_of(disaggregated, prompt, f"mixed-{n}") for n, prompt in enumerate(prompts)]
        answers = list(pool.map(lambda one: openai.complete(disaggregated.router.url, one), requests))
    after = ledger.settle(disaggregated, before, len(answers))
    sent = [Sent(answer.prompt_tokens, answer.output_tokens) for answer in answers]
    ledger.prove(disaggregated, before, after, sent, shape, lab.vllm.version)
    counts = require_agreement(list(zip(PROBES, right, answers, strict=True)))
    record_outcome(record, f"{len(prompts)} at once", counts)


@pytest.mark.parametrize("how", ["another prompt's reference", "a corrupted block id"])
def test_another_prompts_kv_is_caught(
    single: Topology, disaggregated: Topology, lab: Lab, shape: KvShape, tokenize: Tokenize, how: str
) -> None:
    """Decode is handed a wrong KV reference: status 200, bytes right, no failure counted, and the check
    fails.

    The stale-KV hazard in one request. Counters prove how much moved, never what; only content proves
    content.
    """
    prompt, other = tokenize(PROBES[COUNT]), tokenize(FOREIGN)
    assert len(prompt) <= len(other), (
        "what the wrong reference leaves of a block may be the right prompt's own"
    )
    right = alone(single, prompt, f"caught-{how}")
    prefill, decode = disaggregated.prefill[0].url, disaggregated.decode[0].url
    request, foreign = (request_of(disaggregated, ids, f"caught-{how}") for ids in (prompt, other))
    before = ledger.read(disaggregated)
    mine, theirs = openai.prefill(prefill, request), openai.prefill(prefill, foreign)
    wrong = dict(theirs.kv_transfer_params)
    if how == "a corrupted block id":
        wrong = {**mine.kv_transfer_params, "remote_block_ids": theirs.kv_transfer_params["remote_block_ids"]}
    fresh = {"cache_salt": f"decode-{how}"}  # decode holds nothing of either
    answer = openai.decode(decode, request | fresh, openai.Handshake(wrong, 0.0))
    # the reference that is left goes to the other prompt, so that prefill's lease on its blocks ends
    left = mine if wrong["remote_request_id"] == theirs.kv_transfer_params["remote_request_id"] else theirs
    openai.decode(decode, foreign | fresh, left)
    after = ledger.settle(disaggregated, before, 2)
    book = ledger.compare(disaggregated, before, after)
    sent = [Sent(len(ids), OUTPUT_TOKENS) for ids in (prompt, other)]
    block = ledger.block_size(after.snapshots[disaggregated.decode[0].name])
    assert book.kv_bytes == ledger.expected_bytes(sent, shape, block, lab.vllm.version)
    assert book.failed == 0, "the connector noticed; then this is no negative control of the content check"
    with pytest.raises(AssertionError, match="differ from the single server"):
        require_agreement([(PROBES[COUNT], right, answer)])


def test_output_agrees_with_transformers(
    hosts: Hosts, disaggregated: Topology, weights: Model, lab: Lab, record: Recorder, tokenize: Tokenize
) -> None:
    """On one probe the disaggregated answer is what Hugging Face transformers computes from the same weights.

    Prefill and decode server share one engine; an error in that engine is invisible to any comparison between
    them.
    """
    prompt = tokenize(PROBES[COUNT])
    answer = openai.complete(
        disaggregated.router.url, openai.body(disaggregated.served_name, prompt, OUTPUT_TOKENS)
    )
    argv = [
        sys.executable,
        "-m",
        "disagglab.measure.oracles.transformers_greedy",
        str(weights.folder),
        lab.model.dtype,
    ]
    argv += [str(OUTPUT_TOKENS), json.dumps(prompt)]
    lines = hosts.local.run("reference", argv, {"HF_HUB_OFFLINE": "1"}, REFERENCE_LIMIT_S)
    reference = json.loads(next(line for line in lines if line.startswith("{")))
    gap = min(reference["top2_gap"])
    record.numbers("smallest top-2 gap of the transformers probe", [gap], "nat", what="probes")
    assert gap > GAP_NATS, f"the probe has a near tie ({gap:.2f} nat) and cannot tell; choose another"
    assert list(answer.token_ids) == reference["token_ids"]

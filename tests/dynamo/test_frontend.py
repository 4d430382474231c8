"""The frontend: one process that speaks OpenAI's HTTP API, makes token ids of text and chooses a worker.

To its workers it is a client, to its clients a server. Its command names no worker and no model: it learns
both from etcd. The oracle for answers is what the engines count, and two ways of asking that have to give the
same.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

import httpx
import pytest

from disagglab.config.schema import Lab
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.ledger import FINISHED, PROMPT_TOKENS
from disagglab.results.recorder import Recorder
from disagglab.results.records import Reading, Sent
from disagglab.serving import openai
from disagglab.serving.dynamo.parts import Frontend, body
from disagglab.serving.openai import CHAT, COMPLETIONS
from disagglab.serving.topology import Topology

pytestmark = pytest.mark.lab_has("one_host", "ipv4")

REQUESTS = 6
OUTPUT_TOKENS = 8
PROMPT = "The three things that a computer needs in order to"
LIMIT_S = 60.0
ARRIVED = "dynamo_component_requests_total"  # of the worker's runtime, by endpoint

# What is wrong with a request, and the status that says so. MODEL stands for the served name.
WRONG: dict[str, tuple[str, Any, int]] = {
    "unknown model": (COMPLETIONS, {"model": "nobody", "prompt": PROMPT}, 404),
    "no messages": (CHAT, {"model": "MODEL"}, 400),
    "no JSON": (COMPLETIONS, "{", 400),
    "unknown field": (COMPLETIONS, {"model": "MODEL", "prompt": PROMPT, "return_token_ids": True}, 400),
    "temperature of 9": (COMPLETIONS, {"model": "MODEL", "prompt": PROMPT, "temperature": 9}, 400),
    "negative length": (COMPLETIONS, {"model": "MODEL", "prompt": PROMPT, "max_tokens": -1}, 400),
    "longer than the context": (COMPLETIONS, {"model": "MODEL", "prompt": [1000] * 100_000}, 400),
}


def salted(topology: Topology, prompt: str | list[int]) -> dict[str, Any]:
    """A request that no cache helps: what is computed at once decides the rounding, and so near ties."""
    return body(topology.served_name, prompt, OUTPUT_TOKENS) | {"cache_salt": secrets.token_hex(4)}


def ask(topology: Topology, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request in one piece."""
    answer = httpx.post(f"{topology.router.url}{COMPLETIONS}", json=request, timeout=LIMIT_S)
    assert answer.status_code == httpx.codes.OK, answer.text
    found: dict[str, Any] = answer.json()
    return found


def arrived(reading: Reading) -> dict[str, float]:
    """Requests that came to each worker's endpoint so far, whatever became of them."""
    return {
        name: snapshot.value(ARRIVED, dynamo_endpoint="generate")
        for name, snapshot in reading.snapshots.items()
    }


def test_models_come_from_the_registry(round_robin: Topology, record: Recorder) -> None:
    """A frontend that was told neither a model nor an address lists this run's model and reaches both
    workers.

    The model's name, its context length and where its tokenizer is to be had stand in a card that a worker
    put into etcd; the frontend fetches the tokenizer from the worker over HTTP. So a frontend can start
    first, on a machine without the model.
    """
    frontend = round_robin.router
    assert isinstance(frontend, Frontend)
    told = " ".join(frontend.argv)
    assert frontend.models() == [round_robin.served_name]
    assert round_robin.served_name not in told
    assert not any(str(server.plan.port) in told for server in round_robin.servers), told
    found = frontend.instances()
    assert len(found) == len(round_robin.servers), f"{found} for {len(round_robin.servers)} workers"
    record.numbers("workers found in etcd", [len(found)], "workers", what="count", command=frontend.command)


def test_a_stream_is_the_answer_in_pieces(round_robin: Topology) -> None:
    """Streamed and in one piece, the same prompt gives the same text and the same token ids, to the last
    token.

    A stream is server-sent events: one HTTP answer that stays open, an event for each step of the engine, or
    for several where their reader is slow. The two requests go to two workers, which hold the same weights.
    """
    whole = ask(round_robin, salted(round_robin, PROMPT))
    stream = openai.complete(round_robin.router.url, salted(round_robin, PROMPT))
    assert len(stream.token_ids) == OUTPUT_TOKENS == whole["usage"]["completion_tokens"]
    assert stream.token_ids == tuple(whole["nvext"]["completion_token_ids"])
    assert stream.text == whole["choices"][0]["text"]
    assert stream.prompt_tokens == whole["usage"]["prompt_tokens"]
    assert 1 <= len(stream.gaps_s) <= OUTPUT_TOKENS - 1, f"{len(stream.gaps_s) + 1} events with tokens"


def test_text_becomes_ids_in_the_frontend(round_robin: Topology) -> None:
    """A prompt as text and the same prompt as token ids give the same answer: workers are sent ids in any
    case.

    That a router hashes token ids, and not text, is what lets it know which KV blocks a prompt will meet.
    """
    request = salted(round_robin, PROMPT)
    request["nvext"] = {"extra_fields": ["prompt_token_ids", "completion_token_ids"]}
    by_text = ask(round_robin, request)
    ids = by_text["nvext"]["prompt_token_ids"]
    by_ids = ask(round_robin, salted(round_robin, ids))
    assert len(ids) == by_text["usage"]["prompt_tokens"] == by_ids["usage"]["prompt_tokens"]
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]


def test_no_token_is_lost(round_robin: Topology, lab: Lab, shape: KvShape, record: Recorder) -> None:
    """What clients were sent is what the engines generated, token for token, and each worker did its share.

    Between engine and client lie two more processes' queues than with a server alone (request plane,
    frontend).
    """
    before = ledger.read(round_robin)
    sent, received = [], 0
    for number in range(REQUESTS):
        prompt = openai.prompt_of(50 + number, secrets.randbelow(40_000))
        answer = openai.complete(round_robin.router.url, salted(round_robin, prompt))
        received += len(answer.token_ids)
        sent.append(Sent(answer.prompt_tokens, answer.output_tokens))
    after = ledger.settle(round_robin, before, REQUESTS)
    book = ledger.prove(round_robin, before, after, sent, shape, lab.vllm.version)
    generated = sum(book.generated.values())
    record.numbers("tokens received / generated", [received / generated], "ratio", what="count")
    assert received == generated == REQUESTS * OUTPUT_TOKENS
    share = REQUESTS / len(round_robin.servers)
    assert all(finished == share for finished in book.finished.values()), dict(book.finished)


@pytest.mark.parametrize("what", WRONG)
def test_a_bad_request_reaches_no_worker(round_robin: Topology, what: str) -> None:
    """A request that cannot be served is refused with 4xx and a reason in JSON, and no worker sees it.

    The gate belongs in front: a worker that had to parse what anybody sends would lose steps to it. vLLM's
    own server ignores a field that it does not know; the frontend refuses it. Two accounts agree: the
    engine's, and that of the worker's runtime, which counts what arrives before anything looks at it. A good
    request goes first, to show that this one moves.
    """
    path, wrong, status = WRONG[what]
    content = wrong if isinstance(wrong, str) else json.dumps(wrong)
    content = content.replace('"MODEL"', json.dumps(round_robin.served_name))
    idle = ledger.read(round_robin)
    ask(round_robin, salted(round_robin, PROMPT))
    before = ledger.settle(round_robin, idle, 1)
    moved = sum(arrived(before).values()) - sum(arrived(idle).values())
    assert moved == 1, f"a good request moved {ARRIVED} by {moved}"
    answer = httpx.post(
        f"{round_robin.router.url}{path}",
        content=content,
        headers={"Content-Type": "application/json"},
        timeout=LIMIT_S,
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["code"] == status
    assert answer.json()["message"]
    after = ledger.read(round_robin)
    assert arrived(after) == arrived(before)
    for name, snapshot in after.snapshots.items():
        for metric in (FINISHED, PROMPT_TOKENS):
            assert snapshot.value(metric) == before.snapshots[name].value(metric), f"{name}: {metric}"

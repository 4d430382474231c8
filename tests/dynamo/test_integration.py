"""All of it together: etcd, a frontend that routes by KV cache, two workers; then prefill and decode apart.

Hit rates are predicted before a request is sent and measured by the engines' counters, as in tests/routing,
with the same traffic and the same proofs: every request's cached tokens are held against a replay of its
token ids. Bytes that move between workers are held against the arithmetic of the KV cache. The frontend's own
figures prove nothing here; one of them, its hit rate, shows that it chose by what it claims to choose by.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import cast

import pytest
from transformers import AutoTokenizer

from disagglab.config.schema import Lab
from disagglab.config.traffic import dialogue, sketch
from disagglab.errors import InvalidRun
from disagglab.experiments import routing
from disagglab.experiments.routing import Held, Size, run_arm
from disagglab.hosts.weights import Model
from disagglab.kv.prefixcache import PrefixCache
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.predict.hitforecast import HitForecast, forecast
from disagglab.predict.strategies import STRATEGIES
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.serving import openai
from disagglab.serving.dynamo.deployment import DynamoDeployment, require_events
from disagglab.serving.dynamo.parts import HIT_RATE, KV, ROUND_ROBIN, body
from disagglab.serving.topology import Topology
from tests.dynamo.conftest import StartDynamo

pytestmark = pytest.mark.lab_has("one_host", "ipv4")

SEED = 11  # of the order of requests
MODES = {ROUND_ROBIN: "round_robin", KV: "kv_aware", "random": "random"}  # and whose rule a forecast takes
SHORT_MODES = (ROUND_ROBIN, KV)
IDS = {"nvext": {"extra_fields": ["prompt_token_ids", "completion_token_ids"]}}
REQUESTS = 3
PROMPT_TOKENS = 218  # no multiple of a block
OUTPUT_TOKENS = 6


@dataclasses.dataclass(frozen=True)
class Measured:
    """A router mode's forecast and arm. ``cache``: blocks of each worker, and tokens per block.

    ``router_hits``: growth of the frontend's own sum of hit rates.
    """

    forecast: HitForecast
    arm: Held
    cache: tuple[int, int]
    router_hits: float


@pytest.fixture(scope="module")
def modes(
    one_table: None,
    prefix_cache: None,
    dynamo_workers: DynamoDeployment,
    live: Session,
    routing_size: Size,
    weights: Model,
) -> dict[str, Measured]:
    """An arm of each router mode, predicted before."""
    tokenizer = AutoTokenizer.from_pretrained(weights.tokenizer)
    keep = Recorder(live.store, "dynamo", "forecast")
    line = live.progress("router modes")
    found = {}
    for mode in SHORT_MODES if live.short else MODES:
        line.show(mode)
        said = dialogue(
            routing_size.conversations,
            routing_size.turns,
            shared_system=False,
            nonce=f"Desk {secrets.token_hex(3)}",
            seed=SEED,
            output_tokens=routing_size.output_tokens,
        )
        requests = sketch(
            said,
            lambda messages: cast(
                "list[int]",  # what it returns hangs on its arguments, which its annotations leave out
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
            ),
        )
        cache = routing.cache_size(dynamo_workers.workers[0].metrics())
        predicted = forecast(STRATEGIES[MODES[mode]], requests, len(dynamo_workers.workers), *cache)
        limits = [predicted.low, predicted.rate, predicted.high]
        keep.numbers(
            "hit rate, forecast", limits, "ratio", arm=mode, what="limits and mean", note=predicted.how
        )
        with live.uncaptured(), dynamo_workers.routed(mode) as topology:
            if mode == KV:
                require_events(topology)
            before = router_hits(topology)
            arm = run_arm(topology, said, ids=False, extra=IDS)
            routing.prove_replay(topology, ledger.read(topology), arm)
            found[mode] = Measured(predicted, arm, cache, router_hits(topology) - before)
    line.done(", ".join(f"{mode} {each.arm.rate:.0%}" for mode, each in found.items()))
    return found


def router_hits(topology: Topology) -> float:
    """The frontend's own sum of hit rates, one for each request; 0 where it does not route by KV cache."""
    return sum(value for name, _, value in topology.router.metrics().samples if name == HIT_RATE)


@pytest.mark.parametrize("mode", MODES)
def test_hit_rate_is_as_predicted(modes: Mapping[str, Measured], mode: str, record: Recorder) -> None:
    """Under cache pressure each router mode's hit rate lies in the interval that was predicted before it ran.

    The forecast for ``kv`` is that of tests/routing for vllm-router's kv_aware: the worker that holds most of
    the prompt, one of the equals at random. That the same rule predicts another program says that it is the
    events that decide, and not who reads them.
    """
    if mode not in modes:
        pytest.skip(f"SHORT: {mode} is measured in the full form")
    each = modes[mode]
    arm, predicted = each.arm, each.forecast
    record.numbers(
        "hit rate, measured",
        [arm.rate],
        "ratio",
        arm=mode,
        what="arms",
        note=f"predicted {predicted.low:.3f} to {predicted.high:.3f}; {sum(arm.hits.values()):,} of"
        f" {sum(arm.queries.values()):,} tokens; requests: {dict(arm.requests)}",
    )
    record.numbers(
        "TTFT of all turns", [turn.ttft_s for turn in arm.talk.turns], "s", arm=mode, what="requests"
    )
    assert predicted.low <= arm.rate <= predicted.high, (
        f"{mode}: hit rate {arm.rate:.3f}, predicted {predicted.low:.3f} to {predicted.high:.3f}"
        f" ({predicted.how}); requests by worker: {dict(arm.requests)}"
    )


def passed_over(each: Measured) -> list[int]:
    """By request, tokens of the prompt that another worker held beyond those that the chosen one found.

    From a replay of the token ids on models of both caches, which the arm's proof has found to be exact.
    """
    names = list(each.arm.requests)
    caches = [PrefixCache(*each.cache) for _ in names]
    found = []
    for turn in each.arm.talk.turns:
        chain = routing.request_of(turn).chain(each.cache[1])
        held = [cache.find(chain) for cache in caches]
        found.append(max(held) - caches[names.index(str(turn.server))].run(chain))
    return found


def test_kv_requests_go_where_most_is_held(modes: Mapping[str, Measured], record: Recorder) -> None:
    """Routed by KV events no request passes over a worker that holds more of it; taken in turns, some do.

    A hit rate alone cannot show this: where nobody holds anything chance decides, and may put so many
    conversations on one worker that its cache loses them. So the choice is checked, request by request. The
    frontend's own hit rate, which it computes before it sends a request on, is above 0 in mode ``kv`` alone.
    """
    kv, turns = modes[KV], modes[ROUND_ROBIN]
    for mode, each in ((KV, kv), (ROUND_ROBIN, turns)):
        missed = passed_over(each)
        record.numbers(
            "prompt tokens that another worker held",
            missed,
            "tokens",
            arm=mode,
            what="requests",
            note=f"hit rate {each.arm.rate:.3f}; requests: {dict(each.arm.requests)}",
        )
    assert not any(passed_over(kv)), passed_over(kv)
    assert any(passed_over(turns)), "in turns, too, each request met all that was held: nothing is shown"
    expected = kv.router_hits / len(kv.arm.talk.turns)
    record.numbers("expected by the frontend, mean of all requests", [expected], "ratio", arm=KV, what="arms")
    assert kv.router_hits > 0
    assert turns.router_hits == 0


def test_a_frontend_that_hears_nothing_is_refused(
    live: Session, lab: Lab, routing_size: Size, start_dynamo: StartDynamo
) -> None:
    """A worker whose events go to ``tcp://127.0.0.1:PORT`` serves as well as any, and is refused as a KV arm.

    vLLM binds an endpoint with an asterisk and connects to any other. So nobody publishes on that port,
    nothing fails, nothing is logged, and the router, in mode ``kv``, chooses by chance. This is the control
    of the proof that the arms above went through.
    """
    if live.short:
        pytest.skip("SHORT: a worker that nobody hears is started in the full form")
    small = routing.workers_lab(lab, routing_size)
    nodes = routing.workers_nodes(lab)[:1]
    deployed = start_dynamo(small, "@unheard", nodes=nodes, events_host=nodes[0].address)
    try:
        with deployed.routed(KV) as topology, pytest.raises(InvalidRun, match="has heard of none"):
            require_events(topology)
    finally:
        deployed.stop()


@pytest.mark.parametrize("mode", [ROUND_ROBIN, KV])
def test_bytes_move_exactly(
    dynamo_pair: DynamoDeployment, mode: str, lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """With a prefill and a decode worker every prompt's whole blocks cross once, to the byte, and decode
    computes none.

    The frontend asks the prefill worker for one token, takes from the answer where its blocks lie, and sends
    both to the decode worker, which fetches them by NIXL: the handshake that vllm-router makes, too. The
    proof is the same: bytes = blocks x block size x bytes per token, from the model's shape.
    """
    with dynamo_pair.routed(mode) as topology:
        before = ledger.read(topology)
        sent = []
        for number in range(REQUESTS):
            prompt = openai.prompt_of(PROMPT_TOKENS + number, secrets.randbelow(40_000))
            request = body(topology.served_name, prompt, OUTPUT_TOKENS) | {"cache_salt": secrets.token_hex(4)}
            answer = openai.complete(topology.router.url, request)
            assert len(answer.token_ids) == OUTPUT_TOKENS
            sent.append(Sent(answer.prompt_tokens, answer.output_tokens))
        after = ledger.settle(topology, before, REQUESTS)
        book = ledger.prove(topology, before, after, sent, shape, lab.vllm.version)
        command = topology.router.command
    record.numbers("KV moved", [book.kv_bytes], "B", arm=mode, what="sum", command=command)
    assert book.computed_tokens == 0
    assert book.prefill_computed_tokens == sum(one.prompt_tokens for one in sent)

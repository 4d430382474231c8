"""A worker: vLLM's engine in a process that announces itself, takes requests by TCP and has no API of its
own.

What it announces is read from etcd, of a running system. The oracle for "this worker" is the number of its
lease, which stands in its keys, in its metrics and in the address at which requests reach it.
"""

from __future__ import annotations

import itertools
import json
import secrets

import pytest

from disagglab import waiting
from disagglab.address import parted
from disagglab.experiments import routing
from disagglab.measure import ledger
from disagglab.measure.ledger import FINISHED, METRICS, PROMPT_TOKENS
from disagglab.results.recorder import Recorder
from disagglab.serving import openai
from disagglab.serving.dynamo.deployment import DynamoDeployment
from disagglab.serving.dynamo.etcd import EtcdServer
from disagglab.serving.dynamo.parts import LEASE_S, Worker, body, on_worker
from disagglab.serving.prometheus import PROCESS_START
from disagglab.serving.topology import Topology

pytestmark = pytest.mark.lab_has("one_host", "ipv4")

WORKERS = (0, 1)
OUTPUT_TOKENS = 4
POLL_S = 0.2
CONNECTOR = "nixl"  # in the names of metrics that only a server with a KV connector has


def test_registration_is_a_key_under_a_lease(
    dynamo_workers: DynamoDeployment, etcd_server: EtcdServer, record: Recorder
) -> None:
    """Each worker's address stands in etcd, under a key that ends in the number of the lease it lives by.

    The same as in ``test_etcd.py``, written by Dynamo. The key's last part is the lease, so a worker that
    starts again is another one, and what it left behind disappears by itself. The value is the address of its
    request plane: whoever reads it can send requests.
    """
    entries = dynamo_workers.keys().entries
    for worker in dynamo_workers.workers:
        (entry,) = [one for one in entries if one.key == dynamo_workers.key(worker)]
        value = json.loads(entry.value)
        assert f"{entry.lease:x}" == worker.instance == entry.key.rpartition("/")[2]
        left_s = etcd_server.client.remaining_s(entry.lease)
        assert left_s is not None, f"{worker.name}: lease {worker.instance} is gone"
        assert 0 < left_s <= LEASE_S
        address = value["transport"]["tcp"].partition("/")[0]
        host, port = parted(address)
        assert host == worker.plan.node.address
        assert not worker.process.is_anothers_port(port), f"{address} is not {worker.name}'s"
    kinds = sorted({entry.key.split("/")[4].split("_source_")[0] for entry in entries})
    record.numbers(
        "keys below v1/instances", [len(entries)], "keys", what="count", note=f"endpoints: {', '.join(kinds)}"
    )
    assert "generate" in kinds


def test_the_card_says_what_is_served(dynamo_workers: DynamoDeployment, record: Recorder) -> None:
    """Beside its address a worker puts a card of its model: name, context length, size of a KV block.

    A router needs the size of a block to cut prompts as the engine does, a frontend the rest.
    """
    config = dynamo_workers.workers[0].metrics()
    cards = dynamo_workers.keys("mdc").entries
    assert len(cards) == len(dynamo_workers.workers)
    for entry in cards:
        card = json.loads(entry.value)["card_json"]
        assert card["display_name"] == dynamo_workers.served_name
        assert card["kv_cache_block_size"] == ledger.block_size(config) == routing.BLOCK_SIZE
        assert card["context_length"] == dynamo_workers.lab.model.max_model_len
    record.numbers("model cards", [len(cards)], "keys", what="count", note=cards[0].key)


def test_the_lease_is_renewed(
    dynamo_workers: DynamoDeployment, etcd_server: EtcdServer, record: Recorder
) -> None:
    """A worker renews its lease long before it ends: the time that is left goes up without the key changing.

    A lease is a heartbeat that the registry watches in place of every client. If the worker dies, nothing has
    to notice it: the time runs out, and the key goes.
    """
    (worker, *_) = dynamo_workers.workers
    key, lease = dynamo_workers.key(worker), int(worker.instance, 16)
    before = next(entry for entry in dynamo_workers.keys().entries if entry.key == key)
    seen: list[int] = []

    def renewed() -> bool:
        seen.append(etcd_server.client.remaining_s(lease) or 0)
        return any(later > earlier for earlier, later in itertools.pairwise(seen))

    waiting.until(
        renewed,
        LEASE_S,
        lambda: AssertionError(f"not renewed within {LEASE_S} s; seconds left: {seen}"),
        POLL_S,
    )
    after = next(entry for entry in dynamo_workers.keys().entries if entry.key == key)
    assert after == before, "renewal is no write"
    record.numbers("left of the lease when renewed", [min(seen)], "s", what="leases", note=f"of {LEASE_S} s")


@pytest.mark.parametrize("number", WORKERS)
def test_health_names_the_endpoints(dynamo_workers: DynamoDeployment, number: int) -> None:
    """A worker's /health says of each endpoint that it registered that it is ready, and of no other."""
    worker = dynamo_workers.workers[number]
    registered = {
        entry.key.split("/")[4]
        for entry in dynamo_workers.keys().entries
        if entry.key.endswith(f"/{worker.instance}")
    }
    assert worker.endpoints() == dict.fromkeys(registered, "ready")


def test_metrics_are_the_engines(dynamo_workers: DynamoDeployment) -> None:
    """A worker exposes every counter that a proof needs, as vLLM's own server does, and tells itself from
    others.

    One thing is missing, the start of the process. When it made its counters stands for that: the same at
    every scrape, and another one in each process.
    """
    first = [worker.metrics() for worker in dynamo_workers.workers]
    second = [worker.metrics() for worker in dynamo_workers.workers]
    for snapshot in first:
        for metric in METRICS:
            if CONNECTOR not in metric:
                snapshot.value(metric)
    starts = [snapshot.value(PROCESS_START) for snapshot in first]
    assert starts == [snapshot.value(PROCESS_START) for snapshot in second]
    assert len(set(starts)) == len(starts), starts


@pytest.mark.parametrize("number", WORKERS)
def test_a_request_moves_one_workers_counters(
    dynamo_workers: DynamoDeployment, kv_routed: Topology, number: int
) -> None:
    """A request that is addressed to one worker is counted by that worker, and by no other.

    The address is the number of the lease. So the figures of an arm belong to the worker that they are shown
    for.
    """
    worker: Worker = dynamo_workers.workers[number]
    prompt = openai.prompt_of(40, secrets.randbelow(40_000))
    before = ledger.read(kv_routed)
    answer = openai.complete(
        kv_routed.router.url, on_worker(body(kv_routed.served_name, prompt, OUTPUT_TOKENS), worker)
    )
    after = ledger.settle(kv_routed, before, 1)
    for name, snapshot in after.snapshots.items():
        grown = {
            one: snapshot.value(one) - before.snapshots[name].value(one) for one in (FINISHED, PROMPT_TOKENS)
        }
        mine = name == worker.name
        assert grown == {FINISHED: int(mine), PROMPT_TOKENS: len(prompt) * mine}, (
            f"{name}, asked: {worker.name}"
        )
    assert answer.prompt_tokens == len(prompt)

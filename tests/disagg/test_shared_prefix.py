"""Requests with the same system prompt: what prefix caches save, in prefill and on the link.

The oracle is threefold: the servers say how many prompt tokens they found in their caches, all but the first
requests can have found the prefix and must have, and the bytes that the connector moved follow from it
exactly (disagglab/measure/ledger.py, with_shared_prefix).
"""

from __future__ import annotations

import pytest

from disagglab.config.schema import Lab
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.measure.run import measure
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.topology import Topology
from disagglab.stats.metric import percentile

SEED = 62_000


@pytest.mark.usefixtures("prefix_cache")
def test_a_shared_prefix_moves_once(
    engine: LoadEngine,
    replicated: Topology,
    disaggregated: Topology,
    lab: Lab,
    shape: KvShape,
    store: Store,
    record: Recorder,
) -> None:
    """The KV blocks of a common beginning cross the link for the first requests only.

    Like a file that a cache near the reader has already: only the rest is fetched. Two replicas have to
    compute the prefix once each.
    """
    workload = lab.workload("shared-prefix")
    for topology in (replicated, disaggregated):
        run = measure(engine, topology, workload, SEED, 0, shape)
        store.add_run(run)
        assert run.invalid is None, run.invalid
        book = run.ledger
        assert book is not None
        share = book.cached_tokens / sum(run.prompt_tokens)
        record.numbers(
            "prompt tokens found in the prefix cache of the server that decodes",
            [share],
            "share",
            arm=topology.name,
            command=run.command,
            note=f"{workload.shared_prefix_tokens} of {workload.prompt_tokens} tokens are shared by"
            f" {workload.requests} requests",
        )
        ttft = percentile(run.ttft_s, 50)
        assert ttft is not None
        record.numbers("TTFT, shared prefix", run.ttft_s, "s", arm=topology.name, what="requests")
        assert share > 0, "no request found the prefix that all of them share"
    alone = layout(shape, lab.block_size).bytes_to_move(workload.prompt_tokens, lab.vllm.version)
    assert book is not None
    record.numbers("KV bytes moved", [book.kv_bytes], "B", arm=disaggregated.name, what="run")
    record.numbers("KV bytes without sharing", [alone * workload.requests], "B", what="computed")
    assert book.kv_bytes < alone * workload.requests

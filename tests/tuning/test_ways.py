"""Every way of the lab file, played by real servers: the path, the options, the blocks.

The oracles are the servers' own: counters for the path (disagglab/measure/ledger.py), the line of the log in
which vLLM says with which options it was started, and the number of blocks that it made of its memory, which
arithmetic on the model's shape on one rank foretells. A way whose option never reached its servers would be
measured all the same, and be equal to the lab's own settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from disagglab.config import way
from disagglab.config.arms import DISAGGREGATED, OWN, SINGLE_AGAIN
from disagglab.config.schema import Lab, NodeSection
from disagglab.config.way_section import WaySection
from disagglab.config.workload import Workload
from disagglab.experiments.turns import Contender, Load, by_start
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.run import measure
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.records import Run
from disagglab.variables import CPU_KV_SPACE_VARIABLE

pytestmark = pytest.mark.lab_has("tuning")

PROMPT, OUTPUT, REQUESTS = 300, 4, 6  # not a whole number of blocks; every server of two gets three
SEED = 89_000
STARTED_WITH = re.compile(r"non-default args: (\{.*\})")
PLAIN = re.compile(r"'(\w+)': '?([^',{}\[\]()]+)")  # a key and its number, word or text; no nested value
GIB = 2**30


@dataclass(frozen=True)
class Server:
    """What one server says of itself. ``options``: those that it was started with; ``wanted``: of its way."""

    name: str
    node: NodeSection
    blocks: int
    block_size: int
    options: Mapping[str, str]
    wanted: Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Played:
    """A way that was played. ``ranks``: of each of its servers."""

    contender: Contender
    run: Run
    ranks: int
    servers: tuple[Server, ...]


@pytest.fixture(scope="module")
def played(live: Session, load: Load, lab: Lab) -> dict[str, Played]:
    """Six requests through every way of the lab file and of its own settings; with ``--short`` through the
    first sharded way and the first with options of a role alone.
    """
    asked = Workload(
        name="ways", prompt_tokens=PROMPT, output_tokens=OUTPUT, requests=REQUESTS, concurrency=2
    )
    ways = list(lab.ways)
    if live.short:
        sharded = [one for one in ways if one.kind == way.SHARDED]
        by_role = [one for one in ways if one.prefill.args or one.decode.args]
        ways = [*sharded[:1], *by_role[:1]]
    own = [] if live.short else [kind for kind in OWN if kind != SINGLE_AGAIN]
    contenders = [*map(Contender.of, own), *map(Contender.of, ways)]
    found = {}
    with live.uncaptured():
        for group in by_start(load.fleet, contenders):
            for contender, topology in zip(group, load.ready(group, [asked]), strict=True):
                run = measure(load.engine, topology, asked, SEED, 0, load.shape)
                load.store.add_run(run)
                servers = []
                for server in topology.servers:
                    cache = ledger.cache_config(server.metrics())
                    said = STARTED_WITH.search("\n".join(server.process.lines_so_far()))
                    assert said is not None, f"{server.name} does not say what it was started with"
                    args = contender.way.args if isinstance(contender.way, WaySection) else {}
                    wanted = {**lab.vllm.args, **args, **server.plan.node.args}
                    servers.append(
                        Server(
                            server.name,
                            server.plan.node,
                            int(cache["num_gpu_blocks"]),
                            int(cache["block_size"]),
                            dict(PLAIN.findall(said[1])),
                            wanted,
                        )
                    )
                found[contender.arm] = Played(contender, run, topology.ranks, tuple(servers))
    return found


def test_every_way_takes_its_path(played: dict[str, Played], record: Recorder) -> None:
    """Requests, tokens and bytes of each way add up in its servers' counters; KV moves in disaggregated ways
    alone, and there exactly as many bytes as its blocks have.
    """
    for arm, one in played.items():
        assert one.run.invalid is None, f"{arm}: {one.run.invalid}"
        book = one.run.ledger
        assert book is not None
        assert (book.kv_bytes > 0) == (one.contender.kind == DISAGGREGATED), f"{arm}: {book.kv_bytes} B"
        assert sum(book.finished.values()) == REQUESTS * (2 if one.contender.kind == DISAGGREGATED else 1)
        record.numbers(
            "KV bytes moved", [book.kv_bytes], "B", arm=arm, what="counter", command=one.run.command
        )


def test_every_server_was_started_with_the_options_of_its_way(
    played: dict[str, Played], record: Recorder
) -> None:
    """vLLM's own line of its options has those of the way, and of the server's role, and no other way's.

    Options are compared under vLLM's names for them, with underscores.
    """
    every = {key for one in played.values() for server in one.servers for key in server.wanted}
    for arm, one in played.items():
        for server in one.servers:
            for key in every:
                name = key.replace("-", "_")
                if key in server.wanted:
                    said = server.options.get(name, "False")  # the line has what is not default
                    assert str(said) == str(server.wanted[key]), f"{arm}, {server.name}: {name} is {said}"
                else:
                    assert name not in server.options, f"{arm}, {server.name}: {name} belongs to another way"
            ranks = int(server.options.get("tensor_parallel_size", 1))
            assert ranks == one.ranks, f"{arm}, {server.name}: {ranks} ranks"
        record.numbers(
            "servers", [len(one.servers)], "servers", arm=arm, what="count", note=f"{one.ranks} ranks each"
        )


@pytest.mark.lab_has("fixed_budget")
def test_blocks_of_every_server_are_those_of_one_rank(
    played: dict[str, Played], lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """Memory for the KV cache, divided by the bytes that a block takes on one rank, is the number of blocks.

    A rank keeps its share of the KV heads (disagglab/kv/shape.py: on_rank), and has the whole of the memory
    that the lab file gives a server: with two ranks a cache of the same size holds twice as many tokens.
    """
    for arm, one in played.items():
        for server in one.servers:
            env = {**lab.vllm.env, **server.node.env}
            memory = float(env[CPU_KV_SPACE_VARIABLE]) * GIB
            block = layout(shape.on_rank(one.ranks), server.block_size).bytes_per_block
            assert server.blocks == memory // block, (
                f"{arm}, {server.name}: {server.blocks} blocks, {memory:,.0f} B hold {memory // block:,.0f}"
                f" of {block:,} B on each of {one.ranks} ranks"
            )
        tokens = [server.blocks * server.block_size for server in one.servers]
        record.numbers("tokens that the KV cache holds", tokens, "tokens", arm=arm, what="servers")

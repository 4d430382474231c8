"""Any number of prefill and decode nodes: each takes its share, and each pair can hand a prompt over.

A proof over sums cannot see a node that was left out, nor one link of several that is broken while others
carry the load. So the shares are those of each server's own counters, and every pair of prefill and decode
node is asked directly, because the router makes only some of them: it deals the k-th request to prefill node
k mod P and decode node k mod D. With one node of each role the claims hold all the same, and take seconds.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from disagglab.config.schema import Lab
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, tokens_from_prefill
from disagglab.measure import ledger
from disagglab.measure.same_answer import DIFFERENT, GAP_NATS, agree
from disagglab.measure.transfer import transfer
from disagglab.results.recorder import Recorder
from disagglab.results.records import Ledger, Sent
from disagglab.serving import openai
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import Topology
from disagglab.serving.vllm import VllmServer
from disagglab.stats.metric import percentile

TURNS = 3  # of the round robin
OUTPUT_TOKENS = 4
SALT = 33_000  # prompts of this module alone
MORE_THAN_BLOCKS = 2, 7  # blocks and tokens of a prompt: a part of the last block has to move too
REPEATS = 3  # transfers of a pair whose times count, after one for the handshake
ANSWER_TOKENS = 8
COMPARED_SHARE = 0.6  # of the tokens; below it the probes prove too little
PROBES = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "January, February, March, April,",
)


def pairs(topology: Topology) -> list[tuple[VllmServer, VllmServer]]:
    """Every prefill server with every decode server."""
    return list(itertools.product(topology.prefill, topology.decode))


def named(prefill: VllmServer, decode: VllmServer) -> str:
    """A pair as the report calls it."""
    return f"{prefill.name} to {decode.name}"


def test_every_node_takes_its_share(
    disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """Requests through the router are spread evenly over the nodes of each role, in work and in bytes.

    One round of the router is as many requests as it takes to come back to the first pair; all requests of a
    round are under way at once. After whole rounds, shares are not just close but equal: requests finished,
    prompt tokens by source, and bytes moved, on each server by its own counters.
    """
    block = ledger.block_size(disaggregated.decode[0].metrics())
    length = MORE_THAN_BLOCKS[0] * block + MORE_THAN_BLOCKS[1]
    count = TURNS * disaggregated.cycle
    requests = [
        openai.body(disaggregated.served_name, openai.prompt_of(length, SALT + number), OUTPUT_TOKENS)
        for number in range(count)
    ]
    before = ledger.read(disaggregated)
    with ThreadPoolExecutor(disaggregated.cycle) as pool:
        answers = list(pool.map(lambda one: openai.complete(disaggregated.router.url, one), requests))
    after = ledger.settle(disaggregated, before, count)
    sent = [Sent(answer.prompt_tokens, answer.output_tokens) for answer in answers]
    book = ledger.prove(disaggregated, before, after, sent, shape, lab.vllm.version)

    def computed_by(server: VllmServer, source: str) -> float:
        snapshots = before.snapshots[server.name], after.snapshots[server.name]
        return delta(*snapshots, ledger.BY_SOURCE, source=source)

    for role, source, of_a_prompt in (
        (disaggregated.prefill, "local_compute", length),
        (disaggregated.decode, "external_kv_transfer", tokens_from_prefill(length)),
    ):
        share = count // len(role)
        for server in role:
            record.numbers(
                f"requests finished by a {server.plan.node.role} node, {lab.ratio}",
                [book.finished[server.name]],
                "requests",
                arm=server.name,
                what="count",
                note=f"of {count}; as computed",
                command=disaggregated.router.command,
            )
            assert book.finished[server.name] == share, f"{server.name}: shares are {dict(book.finished)}"
            assert computed_by(server, source) == share * of_a_prompt, f"{server.name}: tokens by {source}"
    each = layout(shape, block).bytes_to_move(length, lab.vllm.version)
    movers = [server for server in disaggregated.servers if book.transfers_by[server.name]]
    assert {server.plan.node.role for server in movers} in ({"decode"}, {"prefill"}), dict(book.transfers_by)
    for server in movers:
        moved = book.kv_bytes_by[server.name]
        record.numbers(
            f"KV bytes moved by a {server.plan.node.role} node, {lab.ratio}",
            [moved],
            "B",
            arm=server.name,
            what="count",
            note=f"{book.finished[server.name]} requests of {each:,} B, as computed",
        )
        assert moved == book.finished[server.name] * each, f"{server.name}: {dict(book.kv_bytes_by)}"


@pytest.mark.usefixtures("prefix_cache")
def test_every_pair_transfers(disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Each prefill node hands a prompt to each decode node, asked directly, and the bytes are exact.

    The first transfer of a pair holds the handshake between its two engines and does not count for the time.
    Pairs take turns, so that a slow minute of the machine meets all of them.
    """
    block = ledger.block_size(disaggregated.decode[0].metrics())
    length = MORE_THAN_BLOCKS[0] * block + MORE_THAN_BLOCKS[1]
    books: dict[str, list[Ledger]] = {}
    for number in range(1 + REPEATS):
        for prefill, decode in pairs(disaggregated):
            name = named(prefill, decode)
            book = transfer(
                disaggregated, length, number, lab, shape, block, f"-{name}", prefill=prefill, decode=decode
            )
            taken = {server for server, finished in book.finished.items() if finished}
            assert taken == {prefill.name, decode.name}, f"{name}: {sorted(taken)} finished a request"
            books.setdefault(name, []).append(book)
    assert len(books) == len(disaggregated.prefill) * len(disaggregated.decode)
    seconds = {name: [book.transfer_s for book in each] for name, each in books.items()}
    for name, times in seconds.items():
        sizes = sorted({book.kv_bytes for book in books[name]})
        assert len(sizes) == 1, f"{name}: transfers of one prompt moved {sizes} B"
        record.numbers(
            f"transfer time of a pair, {length} tokens",
            times[1:],
            "s",
            arm=name,
            what="transfers",
            note=f"{sizes[0]:,} B each; the first, with the handshake, took {times[0]:.4f} s",
        )
    medians = {name: percentile(times[1:], 50) or 0.0 for name, times in seconds.items()}
    slowest = max(medians, key=lambda name: medians[name])
    record.numbers(
        "slowest pair / fastest pair, median transfer time",
        [medians[slowest] / min(medians.values())],
        "ratio",
        what=f"{len(medians)} pairs",
        note=f"slowest: {slowest}",
    )


@pytest.mark.lab_has("real_weights")
def test_every_pair_says_the_same(
    single: Topology, disaggregated: Topology, lab: Lab, record: Recorder
) -> None:
    """Greedy answers are the single server's, token for token up to a near tie, whichever pair served.

    The rule for near ties is that of the content tests (measure/same_answer.py). The answer of one pair is no
    proof for another: each has its own link, handshake and block tables.
    """
    url, model = single.servers[0].url, single.served_name
    prompts = [openai.tokenize(url, model, text) for text in PROBES]
    right = [
        openai.complete(url, openai.body(model, ids, ANSWER_TOKENS) | {"cache_salt": "ratio-alone"})
        for ids in prompts
    ]
    compared = 0
    for prefill, decode in pairs(disaggregated):
        name = named(prefill, decode)
        for ids, reference in zip(prompts, right, strict=True):
            request = openai.body(disaggregated.served_name, ids, ANSWER_TOKENS)
            request |= {"cache_salt": f"ratio-{name}"}
            before = ledger.read(disaggregated)
            answer = openai.decode(decode.url, request, openai.prefill(prefill.url, request))
            after = ledger.settle(disaggregated, before, 1)
            assert ledger.compare(disaggregated, before, after).transfers == 1, f"{name}: no KV moved"
            found = agree(reference, answer)
            assert found.outcome != DIFFERENT, f"{name} differs from the single server: {found}"
            compared += found.compared
    wanted = len(pairs(disaggregated)) * sum(len(one.token_ids) for one in right)
    assert compared >= COMPARED_SHARE * wanted, (
        f"near ties left only {compared} of {wanted} tokens to compare; choose other probes"
    )
    record.numbers(
        f"tokens of all pairs that equal the single server's, {lab.ratio}",
        [compared],
        "tokens",
        what="count",
        note=f"of {wanted}, {len(pairs(disaggregated))} pairs; the rest follows a near tie ({GAP_NATS} nat)",
    )

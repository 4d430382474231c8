"""Routing once prefill and decode are apart: whose prefix cache a prompt meets is up to the router.

With one prefill and one decode server there is nothing to choose, whatever the policy. With two prefill
servers the policy decides which of them computes a turn, and so whether it finds its history there. The
oracle is each server's own counter of finished requests, read after every turn.

The first takes one pair of any lab. The second needs two prefill nodes (``--lab two-to-one`` on a small
machine).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

import pytest

from disagglab.config.traffic import dialogue
from disagglab.experiments.routing import Finisher, require_no_failure
from disagglab.measure import ledger
from disagglab.measure.talk import Talk, talk
from disagglab.predict.strategies import STRATEGIES, Strategy
from disagglab.pytest_plugin.session import Session
from disagglab.results.recorder import Recorder
from disagglab.results.records import Ledger
from disagglab.serving.topology import Deployment, Topology

pytestmark = [pytest.mark.lab_has("ipv4"), pytest.mark.usefixtures("prefix_cache")]

CONVERSATIONS, TURNS, OUTPUT_TOKENS = 3, 2, 4
SEED = 0  # of the order: dealt in turn to two servers, every conversation moves
POLICIES = ("round_robin", "session_hash", "cache_aware")
SHORT = POLICIES[:2]  # of one pair


def in_roles(name: str) -> Strategy:
    """A strategy with its policy named for each role as well, as P/D mode has it."""
    strategy = STRATEGIES[name]
    roles = ("--prefill-policy", strategy.policy, "--decode-policy", strategy.policy)
    return dataclasses.replace(strategy, options=(*strategy.options, *roles))


def hold(topology: Topology, session_header: bool) -> tuple[Talk, Ledger]:
    """A short dialogue, each turn's prefill server noted, and what the counters say of all of it."""
    said = dialogue(
        CONVERSATIONS,
        TURNS,
        shared_system=False,
        nonce=f"Desk {secrets.token_hex(3)}",
        seed=SEED,
        output_tokens=OUTPUT_TOKENS,
    )
    before = ledger.read(topology)
    found = talk(
        topology.router.url,
        topology.served_name,
        said,
        session_header=session_header,
        served_by=Finisher(topology.prefill),
    )
    after = ledger.settle(topology, before, len(said.order))
    require_no_failure(topology.name, found, len(said.order))
    book = ledger.compare(topology, before, after)
    assert (book.failed, book.expired) == (0, 0)
    assert book.transfers == len(said.order), f"{book.transfers} transfers for {len(said.order)} requests"
    return found, book


def places(found: Talk, names: Sequence[str]) -> list[int]:
    """Which prefill server took each request, in the order in which they were sent."""
    return [names.index(str(turn.server)) for turn in found.turns]


@pytest.mark.parametrize("name", POLICIES)
def test_one_pair_leaves_nothing_to_choose(
    deployment: Deployment, live: Session, name: str, record: Recorder
) -> None:
    """With one prefill and one decode server every request takes that pair, under any policy.

    The ledgers of 1P1D are the same whatever the router is told, so a routing policy is no setting of it.
    """
    if live.short and name not in SHORT:
        pytest.skip("SHORT: two policies are enough where none of them has a choice")
    prefill = [server for server in deployment.servers if server.plan.node.role == "prefill"][:1]
    decode = [server for server in deployment.servers if server.plan.node.role == "decode"][:1]
    with deployment.routed(in_roles(name), prefill=prefill, decode=decode) as topology:
        _, book = hold(topology, STRATEGIES[name].session_header)
    requests = CONVERSATIONS * TURNS
    assert dict(book.finished) == {prefill[0].name: requests, decode[0].name: requests}
    record.numbers(
        "requests finished by each server of 1P1D", list(book.finished.values()), "requests", arm=name
    )


@pytest.mark.lab_has("two_prefill")
@pytest.mark.parametrize("name", POLICIES)
def test_prefill_servers_follow_the_policy(deployment: Deployment, name: str, record: Recorder) -> None:
    """Of two prefill servers a turn gets the one that the prefill policy names, one request at a time.

    Round robin deals them in turn, so that a history lies on one server and its next turn comes to the other.
    A session hash keeps a conversation where it began. The router's own tree of prompts sends what it does
    not know to the least loaded server: without any load that is always the same one.
    """
    prefill = [server for server in deployment.servers if server.plan.node.role == "prefill"]
    decode = [server for server in deployment.servers if server.plan.node.role == "decode"]
    with deployment.routed(in_roles(name), prefill=prefill, decode=decode) as topology:
        found, book = hold(topology, STRATEGIES[name].session_header)
        command = topology.router.command
    taken = places(found, [server.name for server in prefill])
    conversations = [turn.conversation for turn in found.turns]
    note = f"conversations: {conversations}; finished: {dict(book.finished)}"
    record.numbers(
        "prefill server of each request", taken, "place in the list", arm=name, what="requests",
        command=command, note=note,
    )  # fmt: skip
    record.numbers("prompt tokens that prefill computed", [book.prefill_computed_tokens], "tokens", arm=name)
    moved = [one for one in set(conversations) if len({turn.server for turn in found.of(one)}) > 1]
    match name:
        case "round_robin":
            in_turn = [taken[number % len(prefill)] for number in range(len(taken))]
            assert taken == in_turn, f"servers {taken} are not in turn; {note}"
            assert len(set(taken)) == len(prefill), f"servers {taken}: not all took part; {note}"
            assert moved, "dealt in turn, and yet each conversation kept its server: choose another SEED"
        case "session_hash":
            assert not moved, f"conversations {moved} moved between prefill servers {taken}; {note}"
        case "cache_aware":
            assert len(set(taken)) == 1, f"without load all go to one server, these went to {taken}; {note}"

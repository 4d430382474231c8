"""One arm of routing: a dialogue through a router, and what each server found of it in its prefix cache.

Figures are the growth of the servers' own counters. Three accounts have to agree before an arm is believed:
the counters, what the answers say of themselves (``usage``), and, for requests one at a time, a replay of the
real token ids on a model of each server's cache (kv/prefixcache.py). A router's own counters show that
it chose by what it claims to choose by, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagglab import waiting
from disagglab.config.checks import WORKERS
from disagglab.config.schema import Lab, NodeSection
from disagglab.config.traffic import Dialogue
from disagglab.config.way import GPU_SHARE
from disagglab.errors import InvalidRun
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv.prefixcache import Request
from disagglab.measure import ledger
from disagglab.measure.ledger import FINISHED, FOUND, QUERIED
from disagglab.measure.talk import Spoken, Talk, talk
from disagglab.predict.hitforecast import replay
from disagglab.predict.strategies import Strategy
from disagglab.results.records import Reading, Snapshot
from disagglab.serving.prometheus import delta
from disagglab.serving.router import Router
from disagglab.serving.topology import Deployment, Topology
from disagglab.serving.vllm import VllmServer

TAG = "@routing"
BLOCK_SIZE = 32  # tokens; the smallest that vLLM takes on CPUs, so a history of some hundred tokens is many
MAX_MODEL_LEN = 2048  # tokens
LOOKUPS = "vllm_router_kv_placement_lookups_total"
HIT = "hit"
SERVED_DEADLINE_S = 10.0  # counters follow the last token by an engine step
POLL_S = 0.02


@dataclass(frozen=True)
class Size:
    """How much is said, and the KV blocks of a worker: what is said fits two of them, and not one."""

    conversations: int
    turns: int
    output_tokens: int
    blocks: int


FULL = Size(conversations=10, turns=5, output_tokens=16, blocks=113)
SHORT = Size(conversations=6, turns=4, output_tokens=4, blocks=65)


def workers_lab(lab: Lab, size: Size) -> Lab:
    """The lab with settings of plain servers whose caches are small; on GPUs beside the lab's own servers.

    ``enable-scale-out`` gives them the path that a router asks for a prompt's token ids. Without it
    vllm-router places by load alone, and says nothing.
    """
    args: dict[str, str | int | float | bool] = {
        **lab.vllm.args,
        "block-size": BLOCK_SIZE,
        "num-gpu-blocks-override": size.blocks,
        "enable-prompt-tokens-details": True,
        "enable-scale-out": True,
    }
    if any(node.gpus for node in lab.nodes):
        own = float(lab.vllm.args.get("gpu-memory-utilization", GPU_SHARE))
        args["gpu-memory-utilization"] = round(GPU_SHARE - own, 3) if own < GPU_SHARE else own
    model = lab.model.model_copy(update={"max_model_len": min(MAX_MODEL_LEN, lab.model.max_model_len)})
    return lab.model_copy(update={"model": model, "vllm": lab.vllm.model_copy(update={"args": args})})


def workers_nodes(lab: Lab) -> tuple[NodeSection, ...]:
    """Where the workers run."""
    return lab.nodes[:WORKERS]


def workers(hosts: Hosts, lab: Lab, model: Model, size: Size) -> Deployment:
    """Equal servers on the lab's first nodes, without a KV connector, with small caches and KV events; they
    are not started yet.
    """
    return Deployment(
        hosts,
        workers_lab(lab, size),
        model,
        connector=False,
        nodes=workers_nodes(lab),
        tag=TAG,
        events=True,
    )


@dataclass(frozen=True)
class Held:
    """One dialogue through one router, proved. Tokens and requests by server; ``lookups`` by result.

    ``hits``: prompt tokens found in the prefix cache; ``queries``: prompt tokens that were looked for.
    """

    name: str
    talk: Talk
    requests: Mapping[str, int]
    hits: Mapping[str, int]
    queries: Mapping[str, int]
    lookups: Mapping[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Hit tokens over prompt tokens, all servers together."""
        return sum(self.hits.values()) / sum(self.queries.values())

    def servers_of(self, conversation: int) -> tuple[str | None, ...]:
        """Who answered each turn of a conversation; None where that was not asked."""
        return tuple(turn.server for turn in self.talk.of(conversation))


def run_arm(
    topology: Topology,
    dialogue: Dialogue,
    strategy: Strategy | None = None,
    *,
    concurrency: int = 1,
    ids: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Held:
    """Hold a dialogue through a topology's router, and prove what the servers' counters say of it.

    The dialogue's nonce has to be new: then no block of an earlier arm is found, and since each of those lies
    before all of this arm's in the queue of free blocks, the caches are as good as empty.

    Args:
        strategy: what the router chooses by; its session header is sent, its events are demanded.
        concurrency: most requests under way. Only with one of them is it known who answered which, so only
            then are the counters held against a replay.
        ids: whether token ids are asked for; without them there is no replay.
        extra: see :func:`disagglab.measure.talk.talk`.

    Raises:
        InvalidRun: if a request failed, or the accounts do not agree; with both figures.
    """
    alone = concurrency == 1
    before, looked_up = ledger.read(topology), lookups(topology.router)
    found = talk(
        topology.router.url,
        topology.served_name,
        dialogue,
        session_header=strategy is not None and strategy.session_header,
        concurrency=concurrency,
        served_by=Finisher(topology.servers) if alone else None,
        ids=ids,
        extra=extra,
    )
    require_no_failure(topology.name, found, len(dialogue.order))
    after = ledger.settle(topology, before, len(found.turns))
    grown = {key: count - looked_up.get(key, 0) for key, count in lookups(topology.router).items()}
    arm = prove(topology, before, after, found, grown)
    if alone and ids:
        prove_replay(topology, after, arm)
    if strategy is not None and strategy.events:
        require_events(arm)
    return arm


class Finisher:
    """Tells after each request, one at a time, which server has finished one more."""

    def __init__(self, servers: Sequence[VllmServer]) -> None:
        self._servers = servers
        self._seen = {server.name: server.metrics() for server in servers}

    def __call__(self) -> str:
        """The server's name.

        Raises:
            InvalidRun: if none has after 10 s, or more than one request was finished.
        """
        return waiting.until(
            self._finished,
            SERVED_DEADLINE_S,
            lambda: InvalidRun(f"a request was answered, and no server counts it in {SERVED_DEADLINE_S:g} s"),
            POLL_S,
        )

    def _finished(self) -> str:
        """The server that has finished one request more; empty while none has."""
        now = {server.name: server.metrics() for server in self._servers}
        grown = {name: round(delta(self._seen[name], now[name], FINISHED)) for name in now}
        if sum(grown.values()) > 1:
            raise InvalidRun(f"one request was answered, and servers finished {grown}; who else asks them?")
        if not any(grown.values()):
            return ""
        self._seen = now
        return next(name for name, count in grown.items() if count)


def lookups(router: Router) -> dict[str, int]:
    """How often vllm-router looked a prompt up among KV events, by result; empty where it never did."""
    if not router.metrics_url:
        return {}
    found: dict[str, int] = {}
    for name, labels, value in router.metrics().samples:
        if name == LOOKUPS:
            result = dict(labels)["result"]
            found[result] = found.get(result, 0) + round(value)
    return found


def require_no_failure(where: str, found: Talk, requests: int) -> None:
    """Refuse a talk in which anything went wrong: latencies and hit rates of what is left mean nothing.

    Raises:
        InvalidRun: with the number of failures and the first of them.
    """
    if found.failures:
        first = found.failures[0]
        raise InvalidRun(
            f"{where}: failed requests: expected 0 of {requests}, got {len(found.failures)};"
            f" conversation {first.conversation}, turn {first.turn}: {first.what}"
        )
    _equal(where, "answers", len(found.turns), requests)


def prove(
    topology: Topology, before: Reading, after: Reading, found: Talk, grown: Mapping[str, int] | None = None
) -> Held:
    """Hold the growth of the servers' counters against what the answers say of themselves.

    Raises:
        InvalidRun: if requests or tokens do not add up, or the answers do not say what was cached.
    """
    where = topology.name
    book = ledger.compare(topology, before, after)

    def by_server(metric: str) -> dict[str, int]:
        return {
            server.name: round(delta(before.snapshots[server.name], after.snapshots[server.name], metric))
            for server in topology.servers
        }

    arm = Held(where, found, dict(book.finished), by_server(FOUND), by_server(QUERIED), dict(grown or {}))
    silent = [turn for turn in found.turns if turn.cached_tokens is None]
    if silent:
        raise InvalidRun(
            f"{where}: {len(silent)} of {len(found.turns)} answers do not say how many prompt tokens were"
            " cached; start the servers with enable-prompt-tokens-details"
        )
    cached = sum(turn.cached_tokens or 0 for turn in found.turns)
    prompts = sum(turn.prompt_tokens for turn in found.turns)
    _equal(where, "requests finished", sum(arm.requests.values()), len(found.turns))
    _equal(where, "prompt tokens counted", sum(book.prompt_tokens.values()), prompts)
    _equal(where, "prompt tokens looked for in prefix caches", sum(arm.queries.values()), prompts)
    _equal(where, "prompt tokens found in prefix caches", sum(arm.hits.values()), cached)
    output = sum(turn.output_tokens for turn in found.turns)
    _equal(where, "tokens generated", sum(book.generated.values()), output)
    return arm


def prove_replay(topology: Topology, after: Reading, arm: Held) -> None:
    """Hold every request's hits, and each server's counter, against a replay of the token ids.

    Raises:
        InvalidRun: naming the first request, or the server, that differs.
    """
    names = [server.name for server in topology.servers]
    turns = arm.talk.turns
    servers = [names.index(str(turn.server)) for turn in turns]
    sizes = {cache_size(after.snapshots[name]) for name in names}
    if len(sizes) != 1:
        raise InvalidRun(f"{arm.name}: servers with different caches (blocks, block size): {sorted(sizes)}")
    hits = replay([request_of(turn) for turn in turns], servers, *sizes.pop())
    for turn, expected in zip(turns, hits, strict=True):
        what = f"conversation {turn.conversation}, turn {turn.turn}, on {turn.server}: cached tokens"
        _equal(arm.name, what, turn.cached_tokens or 0, expected)
    for place, name in enumerate(names):
        expected = sum(count for count, server in zip(hits, servers, strict=True) if server == place)
        _equal(arm.name, f"prompt tokens that {name} found, by replay", arm.hits[name], expected)


def cache_size(snapshot: Snapshot) -> tuple[int, int]:
    """KV blocks of a server, and tokens per block, as it reports them.

    Raises:
        InvalidRun: if it reports none.
    """
    config = ledger.cache_config(snapshot)
    return int(config["num_gpu_blocks"]), int(config["block_size"])


def request_of(turn: Spoken) -> Request:
    """A turn as the cache model takes it.

    Raises:
        InvalidRun: if the server did not give the token ids.
    """
    if len(turn.prompt_ids) != turn.prompt_tokens or len(turn.token_ids) != turn.output_tokens:
        raise InvalidRun(
            f"conversation {turn.conversation}, turn {turn.turn}: {len(turn.prompt_ids)} ids of"
            f" {turn.prompt_tokens} prompt tokens and {len(turn.token_ids)} of {turn.output_tokens} output"
            " tokens came back; leave return_token_ids on"
        )
    return Request(turn.conversation, turn.turn, turn.prompt_ids, turn.token_ids)


def require_events(arm: Held) -> None:
    """Refuse an arm that claims to go by KV events, and whose router never found a block by them.

    Raises:
        InvalidRun: with what its lookups gave.
    """
    if not arm.lookups.get(HIT):
        raise InvalidRun(
            f"{arm.name}: lookups that found blocks: expected 1 or more of {len(arm.talk.turns)}, got 0; the"
            f" router counts {dict(arm.lookups) or 'no lookup'}. It hears nothing: check the ports of"
            " --kv-event-source, that vLLM binds them (tcp://*:PORT), and that their topic is empty"
        )


@dataclass(frozen=True)
class TimesByHit:
    """TTFT of turns that follow another, s, by turn: of those that found their history, and of others."""

    hits: Mapping[int, tuple[float, ...]]
    misses: Mapping[int, tuple[float, ...]]


def times_by_hit(
    arms: Sequence[Held], block_size: int, time_s: Callable[[Spoken], float] = lambda turn: turn.ttft_s
) -> TimesByHit:
    """TTFT (or ``time_s``) of hits and misses apart, each at equal turn, since later prompts are longer.

    A turn is a hit if at least the whole blocks of its conversation's last prompt were found, and a miss if
    less was. First turns have no history and are neither.
    """

    def chosen(wanted: Callable[[Spoken, Spoken], bool]) -> dict[int, tuple[float, ...]]:
        rows: dict[int, list[float]] = {}
        for arm in arms:
            for turn in arm.talk.turns:
                last = next(
                    (one for one in arm.talk.of(turn.conversation) if one.turn == turn.turn - 1), None
                )
                if last is not None and wanted(turn, last):
                    rows.setdefault(turn.turn, []).append(time_s(turn))
        return {turn: tuple(times) for turn, times in sorted(rows.items())}

    def hit(turn: Spoken, last: Spoken) -> bool:
        return (turn.cached_tokens or 0) >= last.prompt_tokens // block_size * block_size

    return TimesByHit(chosen(hit), chosen(lambda turn, last: not hit(turn, last)))


def _equal(where: str, what: str, got: int, expected: int) -> None:
    if got != expected:
        raise InvalidRun(f"{where}: {what}: expected {expected:,}, got {got:,}")

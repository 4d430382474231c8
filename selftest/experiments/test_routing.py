"""Arms of routing: what the accounts have to agree on, what a router is told, and whose router runs when.

Oracles: two requests whose blocks can be counted by hand, with one number of one account changed at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.agent.supervisor import Process
from disagglab.config.labs import load_lab
from disagglab.errors import InvalidRun, StartError
from disagglab.experiments import routing
from disagglab.experiments.routing import Held
from disagglab.kv.shape import KvShape, Layer
from disagglab.measure import ledger
from disagglab.measure.talk import Failure, Spoken, Talk
from disagglab.predict.strategies import STRATEGIES
from disagglab.results.records import Reading, Sent, Snapshot
from disagglab.serving import prometheus, router, topology
from disagglab.serving.router import Hearing, Router, router_argv
from disagglab.serving.topology import REPLICATED, ROUTED, Deployment, Topology
from disagglab.serving.vllm import EventSource, VllmServer, events_config

NO_ROUTER: Any = None
COUNTERS = (
    ledger.FINISHED, ledger.PROMPT_TOKENS, ledger.GENERATED, ledger.QUERIED, ledger.FOUND, ledger.SERVED,
)  # fmt: skip
SOURCES = ("external_kv_transfer", "local_compute", "local_cache_hit")


def server(name: str) -> Any:
    """As much of a worker as a topology looks at."""
    return SimpleNamespace(
        name=name, plan=SimpleNamespace(connector=False, served_name="m", event_source=None)
    )


PAIR = Topology("kv_aware", ROUTED, "0.31.0", NO_ROUTER, (server("a"), server("b")))


def spoken(turn: int, prompt: int, cached: int | None, name: str, ttft_s: float = 1.0) -> Spoken:
    """An answer of three tokens to a prompt that counts up from 0, so that each holds the one before it."""
    answer = tuple(range(prompt, prompt + 3))
    return Spoken(
        text="", token_ids=answer, top2_gap=(), prompt_tokens=prompt, output_tokens=3, ttft_s=ttft_s,
        e2e_s=2.0, gaps_s=(), cached_tokens=cached, prompt_ids=tuple(range(prompt)), conversation=0,
        turn=turn, start_s=0.0, server=name,
    )  # fmt: skip


def talked(*turns: Spoken, failures: tuple[Failure, ...] = ()) -> Talk:
    return Talk(turns, failures, 1.0, None)


def snapshot(name: str, counters: Mapping[str, float]) -> Snapshot:
    """A scrape of a worker with eight blocks of four tokens, one of them set aside."""
    config = frozenset({("block_size", "4"), ("num_gpu_blocks", "9")})
    rows: list[tuple[str, frozenset[tuple[str, str]], float]] = [
        (prometheus.PROCESS_START, frozenset(), 1.0),
        (ledger.CACHE_CONFIG, config, 1.0),
    ]
    rows += [(key, frozenset(), counters.get(key, 0.0)) for key in COUNTERS]
    rows += [
        (ledger.BY_SOURCE, frozenset({("source", source)}), counters.get(source, 0.0)) for source in SOURCES
    ]
    return Snapshot(name, f"http://{name}/metrics", tuple(rows))


def readings(**by_server: Mapping[str, float]) -> tuple[Reading, Reading]:
    processes = {name: Process(100, 1) for name in by_server}
    before = Reading({name: snapshot(name, {}) for name in by_server}, processes)
    return before, Reading({name: snapshot(name, grown) for name, grown in by_server.items()}, processes)


# Ten tokens and three more, the last of which is not kept: 12 tokens, 3 blocks. The second prompt of 17 finds
# these three on the same server, and nothing on the other.
TOGETHER = (spoken(0, 10, 0, "a"), spoken(1, 17, 12, "a"))
COUNTED = {
    ledger.FINISHED: 2, ledger.PROMPT_TOKENS: 27, ledger.GENERATED: 6, ledger.QUERIED: 27, ledger.FOUND: 12,
}  # fmt: skip


def proved(turns: tuple[Spoken, ...] = TOGETHER, /, **changes: float) -> Held:
    """The arm of these turns, if server a counts what it should, changed by ``changes``."""
    grown = {key: value + changes.get(name_of(key), 0) for key, value in COUNTED.items()}
    before, after = readings(a=grown, b={})
    arm = routing.prove(PAIR, before, after, talked(*turns), {"hit": 1, "miss": 1})
    routing.prove_replay(PAIR, after, arm)
    return arm


def name_of(counter: str) -> str:
    return next(name for name in vars(ledger) if getattr(ledger, name) == counter)


def test_accounts_that_agree_make_an_arm() -> None:
    """Counters, usage and replay say the same; the rate is theirs."""
    arm = proved()
    assert (arm.hits, arm.queries, arm.requests) == ({"a": 12, "b": 0}, {"a": 27, "b": 0}, {"a": 2, "b": 0})
    assert arm.rate == pytest.approx(12 / 27)
    assert arm.servers_of(0) == ("a", "a")


@pytest.mark.parametrize("counter", ["FINISHED", "PROMPT_TOKENS", "GENERATED", "QUERIED", "FOUND"])
def test_a_counter_that_says_otherwise_is_refused(counter: str) -> None:
    """One more than the answers hold, of any of the five."""
    with pytest.raises(InvalidRun, match=r"expected .*, got"):
        proved(**{counter: 1})


def test_a_request_that_found_what_it_cannot_have_found_is_refused() -> None:
    """Counters and usage agree with each other, and not with where the requests went."""
    apart = (spoken(0, 10, 0, "b"), spoken(1, 17, 12, "a"))
    with pytest.raises(InvalidRun, match="conversation 0, turn 1, on a: cached tokens: expected 0, got 12"):
        proved(apart)


def test_answers_that_do_not_tell_are_refused() -> None:
    """A server without enable-prompt-tokens-details says nothing of its cache, which is no zero."""
    silent = (spoken(0, 10, None, "a"), spoken(1, 17, None, "a"))
    with pytest.raises(InvalidRun, match="2 of 2 answers do not say"):
        proved(silent)


def test_a_turn_without_ids_cannot_be_replayed() -> None:
    """The replay needs every token of prompt and answer."""
    with pytest.raises(InvalidRun, match="0 ids of 10 prompt tokens"):
        routing.request_of(dataclasses.replace(TOGETHER[0], prompt_ids=()))


@pytest.mark.parametrize("seen", [{}, {"miss": 2}, {"index_unavailable": 2}])
def test_a_router_that_found_nothing_by_events_is_refused(seen: dict[str, int]) -> None:
    """All answers were 200 and all accounts agree; it just did not choose by events."""
    with pytest.raises(InvalidRun, match="expected 1 or more of 2, got 0"):
        routing.require_events(dataclasses.replace(proved(), lookups=seen))
    routing.require_events(dataclasses.replace(proved(), lookups={**seen, "hit": 1}))


def test_one_failure_refuses_the_talk() -> None:
    """Errors and latency are gated together: the latencies of what is left are those of an easier talk."""
    failed = Failure(3, 1, 0.0, "HTTP 500")
    with pytest.raises(InvalidRun, match="expected 0 of 3, got 1; conversation 3, turn 1: HTTP 500"):
        routing.require_no_failure("arm", talked(*TOGETHER, failures=(failed,)), 3)
    with pytest.raises(InvalidRun, match="answers: expected 3, got 2"):
        routing.require_no_failure("arm", talked(*TOGETHER), 3)


class Counting:
    """A worker whose counter of finished requests is set from outside."""

    def __init__(self, name: str) -> None:
        self.name, self.finished = name, 0

    def metrics(self) -> Snapshot:
        return snapshot(self.name, {ledger.FINISHED: self.finished})


def test_who_finished_is_told_by_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more on one server names it; none in time, or more than one, is refused."""
    monkeypatch.setattr(routing, "SERVED_DEADLINE_S", 0.05)
    a, b = Counting("a"), Counting("b")
    workers: Any = (a, b)
    ask = routing.Finisher(workers)
    for one in (a, b, b):
        one.finished += 1
        assert ask() == one.name
    with pytest.raises(InvalidRun, match="no server counts it"):
        ask()
    a.finished, b.finished = 2, 3
    with pytest.raises(InvalidRun, match="who else asks them"):
        ask()


def test_lookups_are_read_by_result() -> None:
    """vllm-router shows a counter only when it has counted; one without metrics has none."""
    text = f'{routing.LOOKUPS}{{result="hit"}} 3\n{routing.LOOKUPS}{{result="miss"}} 1\nother_total 9\n'

    def router(text: str, url: str = "http://r") -> Any:
        return SimpleNamespace(metrics_url=url, metrics=lambda: prometheus.parse("router", url, text))

    assert routing.lookups(router(text)) == {"hit": 3, "miss": 1}
    assert routing.lookups(router("other_total 9\n")) == {}
    assert routing.lookups(router(text, "")) == {}


def test_times_are_apart_at_equal_turn() -> None:
    """A hit found the whole blocks of its last prompt: 8 of 10 tokens, in blocks of four.

    First turns are neither.
    """
    first = spoken(0, 10, 0, "a", 9.0)
    found = routing.times_by_hit(
        [
            Held("x", talked(first, spoken(1, 17, 12, "a", 0.1), spoken(2, 24, 12, "a", 0.9)), {}, {}, {}),
            Held("y", talked(first, spoken(1, 17, 8, "a", 0.2)), {}, {}, {}),
            Held("z", talked(first, spoken(1, 17, 4, "b", 0.8)), {}, {}, {}),
        ],
        block_size=4,
    )
    assert found.hits == {1: (0.1, 0.2)}
    assert found.misses == {1: (0.8,), 2: (0.9,)}


def test_workers_have_small_caches_and_the_path_that_routers_ask() -> None:
    """Settings of the lab stay, a GPU's memory is shared with the lab's own servers."""
    lab = routing.workers_lab(load_lab("embedded"), routing.SHORT)
    assert lab.vllm.args["num-gpu-blocks-override"] == routing.SHORT.blocks
    assert lab.vllm.args["enforce-eager"] is True
    assert (lab.block_size, lab.model.max_model_len) == (routing.BLOCK_SIZE, routing.MAX_MODEL_LEN)
    assert "gpu-memory-utilization" not in lab.vllm.args
    assert routing.workers_lab(load_lab("two-gpus"), routing.FULL).vllm.args["gpu-memory-utilization"] == 0.4
    assert len(routing.workers_nodes(load_lab("four-h200-2p2d"))) == 2


def test_what_is_said_fits_two_caches_and_not_one() -> None:
    """Each size is under pressure by plan: about 205 + 70 a turn + answers, in whole blocks."""
    for size in (routing.FULL, routing.SHORT):
        tokens = 205 + size.turns * 70 + (size.turns - 1) * size.output_tokens
        wanted = size.conversations * -(-tokens // routing.BLOCK_SIZE)
        assert size.blocks - 1 < wanted <= 2 * (size.blocks - 1)


SOURCE = EventSource("http://a", "tcp://a:1")


def test_a_router_is_told_where_events_are() -> None:
    """For each worker; policy and options are the strategy's; retries stay off."""
    lab, strategy = load_lab("embedded"), STRATEGIES["kv_aware"]
    told = router_argv(
        lab, "/v/bin/python", 1, 2, ["http://a"], [], [], strategy, Hearing((SOURCE,), 32, "m-1")
    )
    assert told[told.index("--policy") + 1] == "kv_aware"
    assert told[told.index("--kv-event-source") + 1] == "http://a=tcp://a:1"
    assert told[told.index("--kv-event-block-size") + 1] == "32"
    assert told[told.index("--kv-event-model") + 1] == "m-1"
    assert "--disable-retries" in told
    assert told[-2:] == ["--worker-urls", "http://a"]
    assert "round_robin" in router_argv(lab, "/p", 1, 2, ["u"], [], [])


def test_events_are_published_where_vllm_binds() -> None:
    """An endpoint without an asterisk would be connected to; a topic would be left out by the router."""
    told = events_config(5, topic="")
    assert (told["endpoint"], told["topic"]) == ("tcp://*:5", "")


def test_a_routed_topology_has_a_router_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call starts one and ends it, also after an error; the next one gets its ports."""
    stopped: list[str] = []
    asked: list[tuple[Any, ...]] = []

    def start(_host: Any, _lab: Any, name: str, *rest: Any) -> Router:
        asked.append((name, *rest))
        process: Any = SimpleNamespace(stop=lambda: stopped.append(name), await_that=lambda *_: None)
        return Router(name, "http://r", (), process)

    monkeypatch.setattr(topology, "launch_router", start)
    ports = iter(range(100, 200))
    hosts: Any = SimpleNamespace(
        controller=SimpleNamespace(reserve_port=lambda _: next(ports)), router_ports=[]
    )
    model: Any = SimpleNamespace(name="m")
    lab = routing.workers_lab(load_lab("embedded"), routing.FULL)
    deployed = Deployment(hosts, lab, model, connector=False, tag="@t", events=True)
    a, b = server("a"), server("b")
    a.plan.event_source = b.plan.event_source = SOURCE
    deployed.servers = (a, b)

    def break_off() -> None:
        with deployed.routed(STRATEGIES["random"]):
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    with deployed.routed(STRATEGIES["kv_aware"]) as routed:
        assert (routed.kind, routed.name, routed.servers) == (ROUTED, "kv_aware", (a, b))
        assert stopped == ["random@t-1"]
        with deployed.routed(STRATEGIES["round_robin"], prefill=(a,), decode=(b,)) as split:
            assert (split.kind, split.prefill, split.decode) == ("disaggregated", (a,), (b,))
    names, workers, prefill, decode, _, hearing, given = zip(*asked, strict=True)
    assert names == ("random@t-1", "kv_aware@t-2", "round_robin@t-3")
    assert stopped == ["random@t-1", "round_robin@t-3", "kv_aware@t-2"]
    assert (workers[2], prefill[2], decode[2]) == ((), (a,), (b,))
    assert given == ((100, 101), (100, 101), (102, 103))
    assert hearing[0] is None
    assert hearing[1] == Hearing((SOURCE, SOURCE), 32, deployed.served_name)


def test_the_ports_of_a_router_that_does_not_come_up_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one gets them, of another deployment too; nothing runs on them."""
    given: list[tuple[int, int]] = []

    def start(*arguments: Any) -> Router:
        given.append(arguments[-1])
        if len(given) == 1:
            raise StartError("not ready")
        process: Any = SimpleNamespace(stop=lambda: None, await_that=lambda *_: None)
        return Router("r", "http://r", (), process)

    monkeypatch.setattr(topology, "launch_router", start)
    ports = iter((100, 101))
    hosts: Any = SimpleNamespace(
        controller=SimpleNamespace(reserve_port=lambda _: next(ports)), router_ports=[]
    )
    model: Any = SimpleNamespace(name="m")
    deployed = Deployment(hosts, load_lab("embedded"), model)
    with pytest.raises(StartError), deployed.routed(STRATEGIES["random"]):
        pass
    for one in (deployed, Deployment(hosts, load_lab("embedded"), model, tag="@other")):
        with one.routed(STRATEGIES["random"]):
            pass
    assert given == [(100, 101)] * 3


def test_a_router_that_does_not_come_up_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noted_process: Callable[..., Any]
) -> None:
    """Alive or not, its supervisor is told to end, so that its ports are free for the next one."""
    (tmp_path / "router-x.log").write_text("no worker\n")
    process = noted_process(tmp_path / "router-x.log", lives=False)
    host: Any = SimpleNamespace(suite_python="/v/bin/python", start=lambda *_: process)
    worker: Any = SimpleNamespace(url="http://a", plan=SimpleNamespace(served_name="m"))
    monkeypatch.setattr(router.Router, "is_ready", lambda _: False)
    with pytest.raises(StartError, match=r"router-x ended; command: (.|\n)*no worker"):
        router.launch_router(host, load_lab("embedded"), "x", [worker], ports=(1, 2)).brought_up(60.0)
    assert process.was_ended == ["stop"]


def test_servers_started_before_one_that_cannot_be_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command runs, the second cannot be executed: stop ends the first."""
    stopped: list[str] = []

    def named(node: Any) -> Any:
        return SimpleNamespace(process_name=f"vllm-{node.name}")

    def start(_host: Any, _lab: Any, plan: Any, _ports: Any) -> Any:
        if plan.process_name == "vllm-b":
            raise StartError("no such program")
        process = SimpleNamespace(has_died=lambda: False)
        end = {"ask_to_stop": lambda: None, "stop": lambda: stopped.append(plan.process_name)}
        return SimpleNamespace(process=process, **end)

    monkeypatch.setattr(VllmServer, "start", start)
    monkeypatch.setattr(topology, "plan_server", lambda _lab, node, *_: named(node))
    host = SimpleNamespace(reserve_port=lambda _: 1)
    hosts: Any = SimpleNamespace(of=lambda _: host, python_of=lambda *_: "/p", model_on=lambda *_: None)
    model: Any = SimpleNamespace(name="m")
    deployed = Deployment(hosts, load_lab("embedded"), model)
    assert [node.name for node in deployed.nodes] == ["a", "b"]
    with pytest.raises(StartError, match="no such program"):
        deployed.launch()
    deployed.stop()
    assert stopped == ["vllm-a"]


def test_a_ledger_demands_no_even_shares_of_a_routed_topology() -> None:
    """Both requests on one server, none on the other: how a router shares is what is measured."""
    before, after = readings(a={**COUNTED, "local_compute": 15, "local_cache_hit": 12}, b={})
    sent = [Sent(10, 3), Sent(17, 3, 12)]
    shape = KvShape((Layer(3, 64, 64),), "bfloat16")
    assert ledger.prove(PAIR, before, after, sent, shape, "0.31.0").finished == {"a": 2, "b": 0}
    alike = dataclasses.replace(PAIR, kind=REPLICATED)
    with pytest.raises(InvalidRun, match="did not alternate"):
        ledger.prove(alike, before, after, sent, shape, "0.31.0")

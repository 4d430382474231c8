"""Dynamo beside single, replicated and disaggregated serving, measured in turns: one report, the same rules.

Servers of ``vllm serve`` with the engine options of Dynamo's workers stand beside these, so the arms differ
in who routes and in which program runs the engine; and in that Dynamo's aggregated workers load no KV
connector.
Rounds, pairs, proofs and verdicts are those of the module disagg (experiments/comparison.py): every run is
held against the servers' counters, an invalid one is kept, shown and never aggregated, and a failed request
makes its run invalid. Then all arms hold conversations, because only there is a cache worth choosing a server
by.

No ratio fails a test, unless a gate of the lab file enforces it. What the notebooks expected of Dynamo is
judged by the intervals.

The short form keeps one workload, with as many requests as are under way at once, and one small round of
conversations on the arms with two equal workers. It shows that the path holds; it decides nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from disagglab.config.schema import Lab
from disagglab.errors import InvalidRun
from disagglab.experiments import routing
from disagglab.experiments.beside_dynamo import (
    DYNAMO_KV,
    DYNAMO_ROUND_ROBIN,
    PAIRS,
    TAG,
    alternating,
    compared,
    one_wave,
    rows_of,
    tagged,
)
from disagglab.experiments.comparison import Comparison, figure_rows, run_rounds
from disagglab.experiments.conversations import (
    CONVERSATIONS,
    E2E,
    FIGURES,
    HIT_RATE,
    TTFT,
    hold,
    talk_figures,
    talk_rounds,
    talk_rows,
    value,
)
from disagglab.experiments.match import LIMIT
from disagglab.experiments.routing import Held, Size
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.pytest_plugin.session import Session
from disagglab.results.gate import State
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.dynamo.deployment import DynamoDeployment, require_events
from disagglab.serving.dynamo.parts import engine_lab
from disagglab.serving.topology import (
    DISAGGREGATED,
    REPLICATED,
    SINGLE,
    SINGLE_AGAIN,
    TOPOLOGIES,
    Deployment,
    Topology,
    running,
)
from tests.dynamo.expectation import EXPECTATIONS, HITS, MISSES, expectation_rows, hits_and_misses

pytestmark = pytest.mark.lab_has("one_host", "ipv4", "gates")

SHORT = Size(conversations=4, turns=3, output_tokens=16, blocks=routing.SHORT.blocks)
AT_ONCE = 2  # requests under way in conversations: as many as workers
ARMS = (*map(tagged, TOPOLOGIES), DYNAMO_ROUND_ROBIN, DYNAMO_KV)
ALIKE = ("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype")
ALWAYS_KNOWN = ("ttft_p50", "tpot_p50", "e2e_p50", "output_tokens_per_s")


@dataclass(frozen=True)
class Beside:
    """The arms, by name; ``lab``: with the gates that are judged here, and on which engines."""

    arms: Mapping[str, Topology]
    lab: Lab
    engines: Lab


@pytest.fixture(scope="module")
def beside(
    live: Session,
    hosts: Hosts,
    weights: Model,
    store: Store,
    dynamo_workers: DynamoDeployment,
    round_robin: Topology,
    kv_routed: Topology,
) -> Iterator[Beside]:
    """The session's Dynamo workers behind two frontends, and servers with the same engines beside them."""
    fitting = compared(live.lab, dynamo_workers.lab, live.short)
    if not fitting.gates:
        pytest.skip(f"NO-GATES: {fitting.file} has no [[gate]] whose requests fit into Dynamo's workers")
    nodes = dynamo_workers.nodes
    if {node.role for node in nodes} != {"prefill", "decode"}:
        pytest.skip(f"NO-PAIR: nodes {[node.name for node in nodes]} do not both prefill and decode")
    pair = Deployment(hosts, dynamo_workers.lab, weights, nodes=nodes, tag=TAG, events=True)
    with contextlib.ExitStack() as ended:
        with live.uncaptured():
            ended.enter_context(running([pair], lambda _: live.progress(f"servers{TAG}")))
        arms = {tagged(name): pair.topology(name) for name in TOPOLOGIES}
        arms[tagged(SINGLE_AGAIN)] = dataclasses.replace(arms[tagged(SINGLE)], name=tagged(SINGLE_AGAIN))
        for server in pair.servers:
            store.commands[f"server {server.name}{TAG}"] = server.plan.command
        for name in map(tagged, TOPOLOGIES):
            store.commands[f"router {name}"] = arms[name].router.command
        arms[DYNAMO_ROUND_ROBIN] = alternating(dataclasses.replace(round_robin, name=DYNAMO_ROUND_ROBIN))
        require_events(kv_routed)
        arms[DYNAMO_KV] = dataclasses.replace(kv_routed, name=DYNAMO_KV)
        yield Beside(arms, fitting, dynamo_workers.lab)


@pytest.fixture(scope="module")
def measured(live: Session, beside: Beside, engine: LoadEngine, store: Store, shape: KvShape) -> Comparison:
    """All arms on the gated workloads, in interleaved rounds; figures and verdicts go to the store."""
    workloads = beside.lab.gated_workloads
    line = live.progress("comparison")
    with live.uncaptured():
        found = run_rounds(
            engine,
            list(beside.arms.values()),
            [one_wave(one) for one in workloads] if live.short else workloads,
            live.rounds,
            store,
            shape,
            line.show,
            slo=beside.lab.slo,
        )
        line.done(f"{len(found.runs)} runs, {len(found.invalid())} invalid")
    earlier = live.comparison.runs if live.comparison else []
    live.comparison = Comparison([*earlier, *found.runs], beside.lab.slo)
    if len(found.invalid()) == len(found.runs):
        raise InvalidRun(f"no run of the comparison is valid; the first says: {found.runs[0].invalid}")
    for row in rows_of(found, beside.lab):
        store.add(row)
    for figure in figure_rows(found):
        store.add(figure)
    return found


@pytest.fixture(scope="module")
def told(
    prefix_cache: None, live: Session, beside: Beside, measured: Comparison, store: Store, shape: KvShape
) -> dict[str, list[Held]]:
    """Conversations on every arm, in interleaved rounds, by arm; every request was answered, or there is no
    figure. After the comparison, whose runs would lengthen the first of them.
    """
    size = SHORT if live.short else routing.FULL
    chosen = (tagged(REPLICATED), DYNAMO_ROUND_ROBIN, DYNAMO_KV) if live.short else tuple(beside.arms)
    line = live.progress(CONVERSATIONS)
    with live.uncaptured():
        found = talk_rounds(
            [beside.arms[name] for name in chosen],
            1 if live.short else live.rounds,
            size,
            lambda arm, spoken: hold(arm, spoken, shape, AT_ONCE),
            line.show,
        )
        line.done(f"{sum(map(len, found.values()))} dialogues, every request answered")
    for row in [*talk_rows(found), *expectation_rows(found)]:
        store.add(row)
    for figure in talk_figures(found, size):
        store.add(figure)
    return found


def test_every_server_has_the_same_engine(beside: Beside, record: Recorder) -> None:
    """All servers, Dynamo's and the others, run one vLLM release with equal options and equally large caches.

    The options stand in every command; the cache is as each server reports it. What differs is recorded: the
    servers of the other arms load a KV connector, which Dynamo's aggregated workers do not.
    """
    servers = [*beside.arms[tagged(REPLICATED)].servers, *beside.arms[DYNAMO_KV].servers]
    node = beside.lab.nodes[0]
    given = [*engine_lab(beside.engines).vllm.args, "dtype", "max-model-len"]

    caches = [ledger.cache_config(server.metrics()) for server in servers]
    options = [{name: option(server.plan.argv, name) for name in given} for server in servers]

    assert len({arm.version for arm in beside.arms.values()}) == 1
    assert [{key: cache[key] for key in ALIKE} for cache in caches] == [
        {key: caches[0][key] for key in ALIKE}
    ] * len(servers)
    assert options == [options[0]] * len(servers)
    assert any(options[0].values()), f"no engine option of {node.name} was found in {servers[0].plan.command}"
    tokens = int(caches[0]["num_gpu_blocks"]) * int(caches[0]["block_size"])
    for server in servers:
        note = f"{'with' if server.plan.connector else 'without'} a KV connector loaded"
        record.numbers(
            "KV cache", [tokens], "tokens", arm=server.plan.process_name, what="servers", note=note
        )


def test_threads_of_every_server_stay_on_its_cores(beside: Beside) -> None:
    """Every thread of a server may run only on the cores of its node, in Dynamo's workers as elsewhere.

    A worker whose threads may go to the neighbour's core would win or lose by that alone.
    """
    servers = [*beside.arms[tagged(REPLICATED)].servers, *beside.arms[DYNAMO_KV].servers]

    allowed = {
        server.plan.process_name: (set(server.plan.node.cpus), server.process.cores_of_threads())
        for server in servers
        if server.plan.node.cpus
    }

    assert all(threads for _, threads in allowed.values()), "no thread was seen"
    strays = {
        name: {thread: sorted(cores) for thread, cores in threads.items() if not cores <= given}
        for name, (given, threads) in allowed.items()
    }
    assert not any(strays.values()), strays


def test_every_run_took_the_path_it_claims(measured: Comparison, beside: Beside) -> None:
    """No run is invalid: counters agree with the client on every arm, and round robin alternates on both.

    Each arm has a run of each workload in each round.
    """
    invalid = measured.invalid()
    assert not invalid, (
        f"{len(invalid)} of {len(measured.runs)} runs are invalid; first: {invalid[0].invalid}"
    )
    rounds = {
        (workload.name, arm): [run.round for run in measured.valid(workload.name, arm)]
        for workload in beside.lab.gated_workloads
        for arm in beside.arms
    }
    assert all(found == list(range(len(found))) and found for found in rounds.values()), rounds
    assert len(set(map(len, rounds.values()))) == 1, rounds


def test_the_client_was_not_what_was_measured(
    measured: Comparison, told: dict[str, list[Held]], record: Recorder
) -> None:
    """The client was watched in every run and dialogue; none kept it busy for nine tenths of the time."""
    loads = [run.client for run in measured.runs]
    talks = [arm.talk.client for made in told.values() for arm in made]

    seen = [load for load in (*loads, *talks) if load is not None]

    assert len(seen) == len(loads) + len(talks), "the client was not watched in every run"
    record.numbers("CPU of the client / wall time", [load.cpu_share for load in seen], "share")
    record.numbers("event loop late by, p99 of a run", [load.lag_p99_s for load in seen], "s")


def test_figures_of_every_arm_are_recorded(measured: Comparison, beside: Beside, record: Recorder) -> None:
    """Every run-level figure of all five arms on each workload, a value a round, with the command."""
    rows = figure_rows(measured)

    for row in rows:
        command = measured.valid(row.workload, row.arm)[0].command
        record.numbers(f"{row.metric}, {row.workload}", row.values, row.unit, arm=row.arm, command=command)
    for gate in beside.lab.gates:
        series = {arm: measured.values(gate.workload, arm, gate.metric, gate.stream) for arm in ARMS}
        record.plot(
            f"{gate.figure}, {gate.workload}",
            "round",
            next(row.unit for row in rows if (row.workload, row.metric) == (gate.workload, gate.figure)),
            {arm: (range(1, len(values) + 1), values) for arm, values in series.items() if values},
            style="points",
            caption="One point a run; within a round all arms got the same prompts.",
        )
    found = {(row.workload, row.arm, row.metric) for row in rows}
    asked = {
        (workload.name, arm, name)
        for workload in beside.lab.gated_workloads
        for arm in ARMS
        for name in ALWAYS_KNOWN
    }
    assert asked <= found, f"no values for {sorted(asked - found)}"


def test_every_pair_has_a_verdict(measured: Comparison, beside: Beside, store: Store) -> None:
    """Dynamo against replicated, KV against round robin and the gates: each figure has interval and outcome.

    Beside each stands what two identical arms differ by. A loss is shown as a win is. A gate that the lab
    file enforces has to be met where the workloads are the lab's, which the short form's are not.
    """
    gates = [gate for gate in beside.lab.gates if gate.limit is None]
    kept = [row for row in store.verdicts if {row.candidate, row.baseline} & {*ARMS, tagged(SINGLE_AGAIN)}]

    judged = {(row.workload, row.metric, row.baseline, row.candidate) for row in kept}

    wanted = {
        (gate.workload, gate.figure, tagged(left), tagged(right))
        for gate in gates
        for left, right in (*PAIRS, (SINGLE, SINGLE_AGAIN), (gate.baseline or SINGLE, DISAGGREGATED))
    }
    assert wanted <= judged, f"no verdict on {sorted(wanted - judged)}"
    assert all(row.smallest_detectable is not None for row in kept if row.rounds > 1)
    beside_noise = [row for row in kept if row.workload != CONVERSATIONS and row.baseline != LIMIT]
    assert all(row.noise_floor is not None or row.floor_note for row in beside_noise if row.rounds > 1)
    whole = {one.definition for one in beside.lab.gated_workloads} <= {
        run.workload.definition for run in measured.runs
    }
    gated = [row for row in kept if row.gate.of_a_gate]
    failed = [
        f"{row.workload} {row.metric}: {row.standing}; alone {row.outcome}, {row.effect:+.1%}"
        for gate, row in zip(beside.lab.gates, gated, strict=True)
        if whole and gate.enforce and row.gate.state is State.NOT_MET
    ]
    assert not failed, "\n".join(failed)


def test_conversations_on_every_arm(told: dict[str, list[Held]], beside: Beside, record: Recorder) -> None:
    """Every turn of every dialogue was answered on every arm; hit rates are the engines' own.

    Hits of an arm are the growth of its servers' counters and agree with what the answers say was cached.
    That the KV frontend hears its workers' events was proved before: it would route without them, too.
    """
    turns = {name: {len(arm.talk.turns) for arm in made} for name, made in told.items()}

    assert {tagged(REPLICATED), DYNAMO_ROUND_ROBIN, DYNAMO_KV} <= set(told)
    assert len({count for counts in turns.values() for count in counts}) == 1, turns
    assert all(sum(arm.hits.values()) > 0 for made in told.values() for arm in made), "nothing was found"
    cache = ledger.cache_config(beside.arms[DYNAMO_KV].servers[0].metrics())
    note = (
        f"each worker has {int(cache['num_gpu_blocks']) - 1} usable KV blocks of {cache['block_size']} tokens"
    )
    for figure, metric in FIGURES.items():
        for name, made in told.items():
            values = [value(arm, figure) for arm in made]
            record.numbers(
                f"{figure}, {CONVERSATIONS}", values, metric.unit, arm=name, what="dialogues", note=note
            )
    for name, made in told.items():
        shares = [max(arm.requests.values()) / sum(arm.requests.values()) for arm in made]
        record.numbers("requests of the busiest server", shares, "share", arm=name, what="dialogues")
    for figure in (HIT_RATE, TTFT):
        record.plot(
            f"{figure}, {CONVERSATIONS}",
            "round",
            FIGURES[figure].unit,
            {
                name: (range(1, len(made) + 1), [value(arm, figure) for arm in made])
                for name, made in told.items()
            },
            style="points",
            caption=f"One point a dialogue, {AT_ONCE} requests under way; {note}.",
        )


def test_what_the_notebooks_expected(told: dict[str, list[Held]], store: Store, record: Recorder) -> None:
    """Each expectation whose two sides were measured is confirmed, refuted or open, by its interval.

    Latency of a hit and of a miss are those of the same turn of a conversation, on Dynamo's two arms.
    """
    measured = {*told, tagged("limit")}
    asked = {
        (one.figure, tagged(one.candidate), tagged(one.baseline))
        for one in EXPECTATIONS
        if {tagged(one.candidate), tagged(one.baseline)} <= measured
    }

    rows = [row for row in store.verdicts if row.gate.state is State.EXPECTED]

    assert asked
    assert asked <= {(row.metric, row.candidate, row.baseline) for row in rows}
    assert all(row.gate.answer in ("confirmed", "refuted", "open") for row in rows)
    for figure in (E2E, TTFT):
        for position, what in enumerate((MISSES, HITS)):
            values = [pair[position] for pair in hits_and_misses(told, figure)]
            if values:
                record.numbers(f"{figure.partition('_')[0]} of {what}", values, "s", what="rounds")


def option(argv: tuple[str, ...], name: str) -> str | None:
    """What a command gives an option; its bare name counts as given, and a negated one as itself."""
    for flag in (f"--{name}", f"--no-{name}"):
        if flag in argv:
            following = argv[argv.index(flag) + 1 : argv.index(flag) + 2]
            return next((word for word in following if not word.startswith("--")), flag)
    return None

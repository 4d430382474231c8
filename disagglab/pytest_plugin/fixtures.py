"""Fixtures hand out ready, proved things; what they started is gone afterwards, and that is asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from disagglab.config.labs import check_against_model
from disagglab.config.schema import Lab
from disagglab.errors import InvalidRun
from disagglab.experiments import routing
from disagglab.experiments.budgeted import entrants, run_in_time
from disagglab.experiments.calibration import Calibration, calibrate
from disagglab.experiments.comparison import (
    Comparison,
    figure_rows,
    run_rounds,
)
from disagglab.experiments.trials import TrialPlan, with_outlook
from disagglab.experiments.verdicts import undecided_workloads, verdict_rows, way_rows
from disagglab.hosts import identity
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model, find
from disagglab.kv import attention, modelconfig
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.pytest_plugin.plugin import SESSION, module_of
from disagglab.pytest_plugin.session import Session
from disagglab.results import fingerprint, resume
from disagglab.results.recorder import Recorder, timing_into
from disagglab.results.report import not_judged
from disagglab.results.run_folder import Store
from disagglab.results.seconds import Phase, spends
from disagglab.serving import fleet
from disagglab.serving.boot import USUAL_START_S
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
from disagglab.serving.vllm import keeps_prefixes


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest) -> Session:
    """The lab session."""
    session: Session = request.config.stash[SESSION]
    return session


@pytest.fixture(scope="session")
def lab(live: Session) -> Lab:
    """The lab file of this session, checked."""
    return live.lab


@pytest.fixture(scope="session")
def store(live: Session) -> Store:
    """The folder of this run."""
    return live.store


@pytest.fixture(scope="session")
def shape(lab: Lab) -> KvShape:
    """The model's KV shape: from its folder where it is on this machine, else from the config shipped for its
    id.
    """
    if lab.model.id in modelconfig.shipped():
        config = modelconfig.shipped_config(lab.model.id)
    else:
        config = find(lab).config
    return attention.shape(config, lab.kv_dtype, lab.model.id)


@pytest.fixture(scope="session")
def one_table(lab: Lab, shape: KvShape) -> None:
    """For tests whose arithmetic is that of one block table a request; skipped where layers have several."""
    if len(layout(shape, lab.block_size).groups) > 1:
        pytest.skip("HYBRID: sliding layers free blocks while a request runs, so hits follow another rule")


@pytest.fixture(scope="session")
def prefix_cache(lab: Lab, shape: KvShape) -> None:
    """For tests of blocks that are found again; skipped where the servers keep none, which
    tests/kvcache/test_arithmetic.py holds against their own word.
    """
    if not keeps_prefixes(lab, shape):
        pytest.skip("NO-PREFIX-CACHE: switched off by the lab file, or by vLLM: latent attention on a CPU")


@pytest.fixture(scope="session")
def hosts(live: Session) -> Iterator[Hosts]:
    """The lab's hosts, cleared of what earlier sessions left, and of this one when it ends."""
    if any(host.namespace for host in live.lab.hosts) and os.geteuid() != 0:
        pytest.skip(f"NOT-ROOT: lab {live.lab.name} makes its hosts, which needs root")
    found = Hosts(live.run_id, live.lab, live.store.logs)
    try:
        with spends(Phase.HOSTS):
            with live.uncaptured():
                found.open()
            if found.reaped:
                live.store.write_meta(reaped=found.reaped)
            know_lab(live, found.survey())
        live.hosts = found
        yield found
    finally:
        with spends(Phase.ENDS):
            live.causes.look()
            live.hosts = None
            found.close()


def know_lab(live: Session, survey: Mapping[str, Mapping[str, str]]) -> None:
    """Complete the session's fingerprint by what its hosts are.

    Raises:
        ConfigError: before anything is measured, if ``--resume`` named sessions of another lab.
    """
    live.store.facts.update({title: dict(facts) for title, facts in survey.items()})
    whole = fingerprint.of_lab(live.store.meta["fingerprint"], identity.of(live.lab, survey))
    live.store.write_meta(fingerprint=whole)
    resume.require_same_lab(live.earlier, whole)


@pytest.fixture(scope="session")
def weights(live: Session) -> Model:
    """The model on disk; converted first if a package ships it in another format."""
    with live.uncaptured():
        found = find(live.lab, live.progress("model"))
    check_against_model(live.lab, found.max_positions)
    live.store.write_meta(model=found.name)
    return found


@pytest.fixture(scope="session")
def deployment(live: Session, hosts: Hosts, weights: Model, engine: LoadEngine) -> Iterator[Deployment]:
    """The lab's servers, ready and proved to be ours."""
    deployed = Deployment(hosts, live.lab, weights)
    deployed.beside = fleet.beside(deployed, live.ways)
    started = tuple(dict.fromkeys((deployed, *deployed.beside.values())))
    live.deployments += started
    with contextlib.ExitStack() as ended:
        with live.uncaptured():
            ended.enter_context(
                running(started, lambda each: live.progress(f"servers{each.tag}", USUAL_START_S))
            )
        for each in started:
            for server in each.servers:
                name = f"{server.name}{each.tag}"
                live.store.commands[f"server {name}"] = server.plan.command
                starts = live.store.meta.get("ready_s", {})
                live.store.write_meta(ready_s={**starts, name: server.ready_s})
        yield deployed


@pytest.fixture(scope="session")
def engine(hosts: Hosts, lab: Lab, weights: Model, store: Store) -> LoadEngine:
    """``vllm bench serve``, imported beside the booting servers, fed jobs."""
    tokenizer = hosts.on_controller(weights).tokenizer
    load_engine = LoadEngine(hosts.controller, tokenizer, lab.controller.cpus, store.folder / "traces")
    load_engine.start()
    return load_engine


def _topology(live: Session, deployment: Deployment, name: str) -> Topology:
    topology = deployment.topology(name, live.routed)
    live.store.commands[f"router {name}"] = topology.router.command
    return topology


def kept_arms(live: Session, deployment: Deployment) -> list[Topology]:
    """The arms of the lab's own settings that this session compares, in the order of a round; no router of
    another is started.
    """
    own = [_topology(live, deployment, name) for name in TOPOLOGIES if name in live.arms.kept]
    if SINGLE_AGAIN in live.arms.kept:
        own.append(dataclasses.replace(deployment.topology(SINGLE, live.routed), name=SINGLE_AGAIN))
    return own


@pytest.fixture(scope="session")
def single(live: Session, deployment: Deployment) -> Topology:
    """The first prefill node alone, behind the router: a reference with a part of the hardware."""
    return _topology(live, deployment, SINGLE)


@pytest.fixture(scope="session")
def replicated(live: Session, deployment: Deployment) -> Topology:
    """Every node as an equal server, round robin."""
    return _topology(live, deployment, REPLICATED)


@pytest.fixture(scope="session")
def disaggregated(live: Session, deployment: Deployment) -> Topology:
    """Prefill and decode on their own nodes, KV over NixlConnector."""
    return _topology(live, deployment, DISAGGREGATED)


@pytest.fixture(scope="session")
def ways(live: Session, deployment: Deployment) -> list[Topology]:
    """The topology of each ``--way``, on servers beside the lab's own; empty without any."""
    found = [fleet.arm_of(deployment.beside[one.arm], one.kind, one.arm) for one in live.ways]
    for topology in found:
        live.store.commands[f"router {topology.name}"] = topology.router.command
    return found


@pytest.fixture(scope="session")
def comparison(
    live: Session,
    deployment: Deployment,
    ways: list[Topology],
    engine: LoadEngine,
    store: Store,
    shape: KvShape,
) -> Comparison:
    """The arms that are kept, on the workloads of the lab's gates, in interleaved rounds; verdicts go to the
    store.
    """
    topologies = [*kept_arms(live, deployment), *ways]
    judged = live.arms.judged(live.lab)
    live.store.write_meta(not_judged=not_judged(live.lab, live.arms), rule=live.rule, budget_s=live.budget_s)
    line = live.progress("comparison")
    plan: TrialPlan | None = None
    names = [one.name for one in topologies]
    with live.uncaptured():
        if live.budget_s is None:
            live.comparison = run_rounds(
                engine,
                topologies,
                live.lab.gated_workloads,
                live.rounds,
                store,
                shape,
                line.show,
                cap=live.max_rounds,
                slo=live.lab.slo,
                open_workloads=lambda found: undecided_workloads(found, judged),
                earlier=resume.begin(live.earlier, lambda _: names, store, line.show),
            )
        else:
            who = entrants(topologies, judged)
            live.comparison, plan = run_in_time(
                engine,
                who,
                judged.gated_workloads,
                live.budget_s,
                store,
                shape,
                line.show,
                line.tell,
                earlier=resume.begin(live.earlier, who.needed, store, line.show, also=who.arms),
                rule=live.rule,
            )
        line.done(f"{len(live.comparison.runs)} runs, {len(live.comparison.invalid())} invalid")
    if len(live.comparison.invalid()) == len(live.comparison.runs):
        if live.comparison.died:
            raise live.comparison.died
        raise InvalidRun(
            f"no run of the comparison is valid; the first says: {live.comparison.runs[0].invalid}"
        )
    rows = verdict_rows(live.comparison, judged, live.rule)
    if plan is not None:
        rows = with_outlook(rows, plan)
    for verdict in [
        *rows,
        *way_rows(live.comparison, live.lab, [one.name for one in ways], live.rule),
    ]:
        store.add(verdict)
    for figure in figure_rows(live.comparison):
        store.add(figure)
    if live.comparison.died:
        raise live.comparison.died
    return live.comparison


@pytest.fixture(scope="session")
def calibration(
    live: Session,
    lab: Lab,
    engine: LoadEngine,
    single: Topology,
    replicated: Topology,
    disaggregated: Topology,
    shape: KvShape,
    store: Store,
) -> Calibration:
    """The speeds of this lab, measured once: prompts alone, through both kinds of node, batches of steps."""
    line = live.progress("speeds")
    longest = lab.model.max_model_len
    with live.uncaptured():
        return calibrate(
            engine, single, replicated, disaggregated, shape, longest, store, line.show, live.short
        )


@pytest.fixture(scope="session")
def routing_size(live: Session) -> routing.Size:
    """How much the tests of routing say, here and behind Dynamo, and how small the workers' caches are."""
    return routing.SHORT if live.short else routing.FULL


@pytest.fixture
def record(store: Store, request: pytest.FixtureRequest) -> Recorder:
    """Records this test's numbers and plots."""
    return Recorder(store, module_of(request.node) or "", request.node.name)


@pytest.fixture
def timing(benchmark: Any) -> Callable[..., None]:
    """Stores measured seconds, one value a replicate, as pytest-benchmark rounds."""
    return timing_into(benchmark)

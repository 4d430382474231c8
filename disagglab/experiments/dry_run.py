"""The dry run of a session: every command that it would run on every host, as one would type it.

``disagglab plan --lab LAB``, ``pytest --plan --lab LAB``. The session's own code runs, on hosts that only
note what they are asked (hosts/recording.py); what only a running host can tell is a word in capitals.
Nothing is started, connected to or written.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from disagglab.config import ipv4
from disagglab.config.arms import Arms
from disagglab.config.labs import with_release
from disagglab.config.schema import Lab
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem
from disagglab.experiments import routing
from disagglab.experiments.trials import arms_needed
from disagglab.hosts import linkspeed, shaping
from disagglab.hosts.recording import RUN, WORDS, NothingRan, RecordingHosts, Word
from disagglab.hosts.weights import PACKAGE_PREFIX, Model
from disagglab.install.environments import dynamo_python
from disagglab.measure.bench import HASH_SEED, LoadEngine, bench_options
from disagglab.measure.oracles import kvprobe, nixlprobe
from disagglab.paths import ROOT
from disagglab.predict import memory
from disagglab.predict.breakeven_map import config_of
from disagglab.predict.strategies import STRATEGIES
from disagglab.progress import ProgressLine
from disagglab.serving import fleet
from disagglab.serving.dynamo import etcd, nats
from disagglab.serving.dynamo.deployment import PAIR_TAG, WORKERS_TAG, DynamoDeployment
from disagglab.serving.dynamo.parts import AGGREGATED, KV, ROUND_ROBIN, Planes
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, TOPOLOGIES, Deployment, Topology

SHAPED_BIT_S = 1e9
PROBE = nixlprobe.Read(2**20)
PROBE_REPEATS = 5
LIMIT_S = 60.0  # nothing takes any time
SPEED_S = 5  # of a measurement of the link


@dataclass(frozen=True)
class Started:
    """A deployment of the session and the topologies that are made of it. ``what``: for a heading."""

    what: str
    deployment: Deployment
    topologies: tuple[Topology, ...]
    compared: bool = True


def lines(
    lab: Lab,
    against: str = "",
    dedicated: bool = False,
    ways: Sequence[WaySection] = (),
    arms: Arms | None = None,
) -> list[str]:
    """The plan of a session with a lab, host by host; comments begin with ``#``.

    Args:
        against: the vLLM version of ``--against``.
        dedicated: whether servers without connector are started as well.
        ways: those of ``--way``.
        arms: of the comparison; all by default.

    Raises:
        StartError: if ~/.ssh/config cannot be read.
    """
    hosts = rehearse(lab, against, dedicated, ways, arms)
    found = [*_head(lab), *_left_out(arms)]
    for name, sheet in hosts.sheets.items():
        nodes = lab.nodes_on(name)
        parts = [f"{node.role} node {node.name}" for node in nodes]
        parts += ["routers and load engine"] if lab.controller.host == name else []
        found += ["", f"# ===== {name}: {', '.join(parts) or 'runs pytest'}", *sheet.lines]
    return found


def rehearse(
    lab: Lab,
    against: str = "",
    dedicated: bool = False,
    ways: Sequence[WaySection] = (),
    arms: Arms | None = None,
) -> RecordingHosts:
    """Go through a session on hosts that only take notes; return them with what they noted."""
    hosts = RecordingHosts(lab)
    hosts.open()
    hosts.heading("environments, and facts (by testinfra)")
    hosts.survey()
    model = model_of(lab)
    hosts.heading("load engine: `vllm bench serve`, kept imported in one process; models, tokenizer")
    tokenizer = hosts.on_controller(model).tokenizer
    LoadEngine(hosts.controller, tokenizer, lab.controller.cpus, Path("TRACES")).start()
    stages = deploy(hosts, lab, against, dedicated, ways, arms)
    for stage in stages:
        if stage.compared:
            _load(hosts, lab, stage, tokenizer)
    _route(hosts, lab, model)
    _dynamo(hosts, lab, model)
    _probe(hosts, lab)
    return hosts


def deploy(
    hosts: RecordingHosts,
    lab: Lab,
    against: str = "",
    dedicated: bool = False,
    ways: Sequence[WaySection] = (),
    arms: Arms | None = None,
) -> tuple[Started, ...]:
    """The deployments of a session in the order in which they start."""
    model = model_of(lab)
    kinds = [kind for kind in TOPOLOGIES if arms is None or kind in arms.kept]
    found = [_stage(hosts, Deployment(hosts, lab, model), kinds, "servers and routers")]
    own = found[0].deployment
    for one, beside in zip(ways, fleet.beside(own, ways).values(), strict=True):
        if beside.servers:
            hosts.heading(f"[[way]] {one.arm}: the servers above, a router of its own")
            stage = Started(one.arm, beside, (fleet.arm_of(beside, one.kind, one.arm),))
        else:
            stage = _stage(hosts, beside, (one.kind,), f"[[way]] {one.arm}")
        found.append(stage)
    _memory(hosts, lab, list(dict.fromkeys(stage.deployment for stage in found)))
    if dedicated:
        plain = Deployment(hosts, lab, model, connector=False)
        found.append(_stage(hosts, plain, (SINGLE, REPLICATED), "without connector (--dedicated)", False))
    if against:
        other = Deployment(hosts, with_release(lab, against), model, tag=f"@{against}")
        found.append(_stage(hosts, other, (SINGLE, DISAGGREGATED), "--against"))
    return tuple(found)


def _memory(hosts: RecordingHosts, lab: Lab, beside: Sequence[Deployment]) -> None:
    """Note what servers beside each other take of each GPU, where the lab file says how large caches are."""
    if memory.BYTES_KEY not in lab.vllm.args:
        return
    hosts.heading("memory of each GPU, estimated; held against what is free before any of them starts")
    try:
        weights = memory.weights_gib(lab, config_of(lab)[1])
    except ConfigError:
        weights = None
    for node in lab.nodes:
        for number in node.gpus:
            demands = [
                memory.of_gpu(one.lab, f"{node.name}{one.tag}", weights, total_gib=0.0) for one in beside
            ]
            total = sum(demand.sum_gib for demand in demands)
            hosts.sheets[node.host].note(f"GPU {number}: {total:.1f} GiB", *memory.table(demands))


def _stage(
    hosts: RecordingHosts, deployed: Deployment, kinds: Sequence[str], what: str, compared: bool = True
) -> Started:
    """Start a deployment and its routers."""
    title = f"{what}: vLLM {deployed.lab.vllm.version}"
    hosts.heading(title)
    deployed.served_name = f"{deployed.model.name}-{RUN}"
    deployed.start(_nowhere())
    topologies = tuple(deployed.topology(kind) for kind in kinds)
    return Started(title, deployed, topologies, compared)


def _load(hosts: RecordingHosts, lab: Lab, stage: Started, tokenizer: Path | None) -> None:
    """The load engine's jobs on one stage."""
    hosts.heading(f"jobs of the load engine in each round: {stage.what}")
    sheet = hosts.sheets[lab.controller.host]
    for workload in lab.gated_workloads:
        gates = [gate for gate in lab.gates if gate.workload == workload.name]
        arms = dict.fromkeys((*TOPOLOGIES, *(topology.name for topology in stage.topologies)))
        needed = arms_needed(gates, arms=list(arms))
        traces = Path("TRACES", f"{workload.name}.SEED.{workload.total_requests}.jsonl")
        for topology in stage.topologies:
            options = bench_options(topology, workload, traces, tokenizer or Path("MODEL"), "SALT")
            only = (
                ""
                if {topology.kind, topology.name} & {*needed}
                else " (with --rounds N: no gate compares it)"
            )
            sheet.note(f"{workload.name} on {topology.name}{only}")
            sheet.command(f"PYTHONHASHSEED={HASH_SEED} vllm bench serve {shlex.join(options)}")


def _route(hosts: RecordingHosts, lab: Lab, model: Model) -> None:
    """As tests/routing has them: equal plain servers, and a router of each strategy in turn."""
    hosts.heading(f"tests/routing (with --short {routing.SHORT.blocks} blocks): one router at a time")
    if _over_ipv6(hosts, lab, ipv4.problems(lab, routing.workers_nodes(lab), ipv4.KV_EVENTS)):
        return
    deployed = routing.workers(hosts, lab, model, routing.FULL)
    deployed.served_name = f"{model.name}-{RUN}"
    deployed.start(_nowhere())
    for strategy in STRATEGIES.values():
        with deployed.routed(strategy):
            pass


def _dynamo(hosts: RecordingHosts, lab: Lab, model: Model) -> None:
    """As tests/dynamo has them: the two stores, equal workers, and a pair."""
    elsewhere = [host.name for host in hosts.all if not host.is_local]
    if elsewhere:
        hosts.heading("tests/dynamo")
        hosts.sheets["local"].note(f"nothing: Dynamo runs on one host alone, and this lab has {elsewhere}")
        return
    hosts.heading("tests/dynamo: etcd, NATS")
    if _over_ipv6(hosts, lab, ipv4.problems(lab, lab.nodes, ipv4.DYNAMO, controller=True)):
        return
    python = str(dynamo_python(ROOT))
    registry = etcd.start_etcd(hosts.controller, lab, etcd.find_etcd(hosts.controller))
    nats.start_nats(hosts.controller, lab, nats.find_nats(hosts.controller, str(Path(python).parent)))
    planes = Planes(etcd=registry.url)
    small = routing.workers_lab(lab, routing.FULL)
    for own, mode, nodes, tag in (
        (small, AGGREGATED, routing.workers_nodes(lab), WORKERS_TAG),
        (lab, DISAGGREGATED, (lab.prefill[0], lab.decode[0]), PAIR_TAG),
    ):
        hosts.heading(f"tests/dynamo: {mode} workers, frontends in turn")
        deployed = DynamoDeployment(hosts, own, model, python, planes, mode, nodes=nodes, tag=tag)
        deployed.namespace, deployed.served_name = f"lab-{RUN}", f"{model.name}-{RUN}"
        deployed.start(_nowhere())
        for router_mode in (ROUND_ROBIN, KV) if mode == AGGREGATED else (KV,):
            with deployed.routed(router_mode):
                pass


def _over_ipv6(hosts: RecordingHosts, lab: Lab, problems: Iterable[Problem]) -> bool:
    """Note why nothing runs, where an address stands in the way."""
    found = [problem.wrong for problem in problems]
    if found:
        hosts.sheets[lab.controller.host].note(f"nothing: {found[0]}")
    return bool(found)


def _probe(hosts: RecordingHosts, lab: Lab) -> None:
    """What single tests ask of nodes and link."""
    prefill, decode = lab.prefill[0], lab.decode[0]
    node, server = lab.nodes[0], hosts.of(decode)
    jobs = [{"name": lab.model.id, "config": {"of": lab.model.id}}]
    asked: dict[str, Callable[[], object]] = {
        "tests/kvcache: vLLM's own accounting": lambda: kvprobe.ask(
            hosts.of(node), hosts.python_of(node, lab.vllm.version), jobs, LIMIT_S
        ),
        "tests/environment: NIXL between the nodes": lambda: nixlprobe.between_nodes(
            hosts, lab, "nixlprobe", [PROBE], PROBE_REPEATS, LIMIT_S, seed=Word("SEED")
        ),
    }
    if prefill.kv_address != decode.kv_address:
        asked["tests/environment: TCP between the nodes"] = lambda: linkspeed.measure_iperf3(
            server,
            hosts.of(prefill),
            decode.kv_address,
            server.reserve_port(decode.kv_address),
            SPEED_S,
            client_address=prefill.kv_address,
            server_cpus=decode.cpus,
            client_cpus=prefill.cpus,
        )
    for heading, ask in asked.items():
        hosts.heading(heading)
        with contextlib.suppress(NothingRan):
            ask()
    made = [host.name for host in lab.hosts if host.namespace]
    hosts.heading("tests/disagg/test_link_rates.py: rate of the link, here 1 Gbit/s; afterwards lifted")
    for shaped in lab.nodes:
        if shaped.host in made:
            for rate in (SHAPED_BIT_S, None):
                hosts.sheets[shaped.host].command(shlex.join(shaping.command(shaped, rate)))


def model_of(lab: Lab) -> Model:
    """The lab's model by its id: its folder differs from host to host, and is looked up there."""
    source = lab.model.id.removeprefix(PACKAGE_PREFIX)
    tokenizer = Path(lab.model.tokenizer) if lab.model.tokenizer else None
    return Model(PurePosixPath(source).name, Path(lab.model.id), {}, tokenizer)


def _nowhere() -> ProgressLine:
    """A progress line that nobody sees."""
    return ProgressLine("plan", stream=io.StringIO())


def _left_out(arms: Arms | None) -> Iterator[str]:
    if arms and arms.left_out:
        yield f"# Left out of the comparison: {', '.join(arms.left_out)}. A test of another module that wants"
        yield "# such a topology starts its router all the same."


def _head(lab: Lab) -> Iterator[str]:
    yield f"# Plan of a session with lab {lab.name} ({lab.file}), vLLM {lab.vllm.version}: nothing is run."
    yield f"# Ports are allocated at start, on each host the lowest free ones of {lab.ports.first} to"
    yield f"# {lab.ports.last}; shown are those of a host where all are free."
    yield f"# Models and tokenizers are looked up on each host; {lab.model.id} stands for the folder."
    yield "# Relative paths on a remote host start at the account's home. Words in capitals:"
    for word, meaning in WORDS.items():
        yield f"#   {word}: {meaning}"
    yield "# Not shown: what is asked of servers over HTTP, and what single tests break or slow down."

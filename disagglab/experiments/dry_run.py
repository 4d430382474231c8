"""The dry run of a session: every command that it would run on every host, as one would type it.

``pytest --plan --lab LAB``. The commands come from the very functions that a session calls; what only a
running host can tell is a word in capitals. Nothing is started, and nothing is connected to.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from disagglab.config import variant
from disagglab.config.labs import with_release
from disagglab.config.schema import HostSection, Lab, NodeSection, VariantSection
from disagglab.experiments import routing
from disagglab.hosts import facts, namespaces, release, remote, shaping
from disagglab.hosts.host import HostProcess
from disagglab.hosts.ssh import Target, target
from disagglab.hosts.weights import PACKAGE_PREFIX, Model
from disagglab.measure.bench import HASH_SEED, bench_options
from disagglab.predict.strategies import STRATEGIES
from disagglab.serving.router import Hearing, Router, router_argv
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, ROUTED, SINGLE, TOPOLOGIES, Topology
from disagglab.serving.vllm import ServerPlan, VllmServer, plan_server

LOCAL = "local"
WORDS = {
    "RUN": "digits that differ from session to session",
    "SALT": "the same from load run to load run",
    "SEED": "the round's seed",
    "TRACES": "folder of the trace files: in the run's folder, or in the load engine's SCRATCH",
    "SCRATCH": "a folder that is removed with its process",
    "IF": "the interface that the answer before it names",
    "PID-HOST": "pid of the process that holds a made host",
}
NOBODY = cast(HostProcess, None)  # stands where a process would be
SHAPED_BIT_S = 1e9


@dataclass(frozen=True)
class Deployed:
    """Servers and routers of one vLLM version, none of them running. ``tag``: see topology.Deployment.

    ``what``: what sets them apart, for a comment.
    """

    lab: Lab
    tag: str
    connector: bool
    servers: tuple[VllmServer, ...]
    topologies: tuple[Topology, ...]
    what: str = ""


class Ports:
    """The ports that a session takes where the whole range is free: the lowest, by host and address."""

    def __init__(self, lab: Lab) -> None:
        self._first = lab.ports.first
        self._taken: dict[tuple[str, str], int] = {}

    def reserve(self, host: str, address: str) -> int:
        """The next one."""
        taken = self._taken.get((host, address), 0)
        self._taken[host, address] = taken + 1
        return self._first + taken


def lines(
    lab: Lab, against: str = "", dedicated: bool = False, variants: Sequence[VariantSection] = ()
) -> list[str]:
    """The plan of a session with a lab, host by host; comments begin with ``#``.

    Args:
        against: the vLLM version of ``--against``.
        dedicated: whether servers without connector are started as well.
        variants: those of ``--variant``.

    Raises:
        StartError: if ~/.ssh/config cannot be read.
    """
    deployments = deploy(lab, against, dedicated, variants)
    names = dict.fromkeys([LOCAL, *lab.host_names])
    found = list(_head(lab))
    for name in names:
        found += ["", *_host(lab, name, deployments)]
    return found


def deploy(
    lab: Lab, against: str = "", dedicated: bool = False, variants: Sequence[VariantSection] = ()
) -> tuple[Deployed, ...]:
    """The deployments of a session in the order in which they start."""
    ports = Ports(lab)
    found = [_deployed(lab, ports, "", True, TOPOLOGIES)]
    for one in variants:
        found.append(_deployed(variant.changed(lab, one), ports, f"@{one.name}", True, (DISAGGREGATED,)))
    if dedicated:
        found.append(_deployed(lab, ports, "", False, (SINGLE, REPLICATED)))
    if against:
        other = with_release(lab, against)
        found.append(_deployed(other, ports, f"@{against}", True, (SINGLE, DISAGGREGATED)))
    return (*found, _workers(lab, ports))


def _deployed(lab: Lab, ports: Ports, tag: str, connector: bool, kinds: Sequence[str]) -> Deployed:
    model = _model(lab)
    name = f"{model.name}-RUN"
    servers = []
    for node in lab.nodes:
        port = ports.reserve(node.host, node.address)
        side_channel = ports.reserve(node.host, node.kv_address) if connector else None
        python = server_python(lab, node)
        servers.append(
            VllmServer(plan_server(lab, node, model, name, port, side_channel, python, tag), NOBODY)
        )
    topologies = tuple(_topology(lab, ports, kind, tag, tuple(servers)) for kind in kinds)
    what = "" if connector else ", without connector (--dedicated)"
    return Deployed(lab, tag, connector, tuple(servers), topologies, what)


def _workers(own: Lab, ports: Ports) -> Deployed:
    """As the fixture ``workers`` has them: two plain servers, and a router of each strategy in turn."""
    lab = routing.workers_lab(own, routing.FULL)
    model = _model(lab)
    name = f"{model.name}-RUN"
    plans = []
    for node in routing.workers_nodes(lab):
        port, events = (ports.reserve(node.host, node.address) for _ in range(2))
        python = server_python(lab, node)
        plans.append(plan_server(lab, node, model, name, port, None, python, routing.TAG, events))
    servers = tuple(VllmServer(plan, NOBODY) for plan in plans)
    sources = tuple(plan.event_source for plan in plans if plan.event_source)
    hearing = Hearing(sources, lab.block_size, name)
    controller = lab.controller
    port, metrics = (ports.reserve(controller.host, controller.address) for _ in range(2))
    url = f"http://{controller.address}:{port}"
    topologies = []
    for number, strategy in enumerate(STRATEGIES.values(), start=1):
        argv = router_argv(
            lab,
            suite_python(lab, controller.host),
            port,
            metrics,
            [server.url for server in servers],
            [],
            [],
            strategy,
            hearing if strategy.events else None,
        )
        router = Router(f"{strategy.name}{routing.TAG}-{number}", url, tuple(argv), NOBODY)
        topologies.append(Topology(strategy.name, ROUTED, lab.vllm.version, router, servers))
    what = f", for tests/routing (with --short {routing.SHORT.blocks} blocks)"
    return Deployed(lab, routing.TAG, False, servers, tuple(topologies), what)


def _topology(lab: Lab, ports: Ports, kind: str, tag: str, servers: tuple[VllmServer, ...]) -> Topology:
    """As topology.Deployment routes it."""
    prefill = tuple(server for server in servers if server.plan.node.role == "prefill")
    decode = tuple(server for server in servers if server.plan.node.role == "decode")
    split = kind == DISAGGREGATED
    workers = () if split else prefill[:1] if kind == SINGLE else servers
    controller = lab.controller
    port, metrics = (ports.reserve(controller.host, controller.address) for _ in range(2))
    argv = router_argv(
        lab,
        suite_python(lab, controller.host),
        port,
        metrics,
        [server.url for server in workers],
        [server.url for server in prefill],
        [server.url for server in decode],
    )
    router = Router(kind + tag, f"http://{controller.address}:{port}", tuple(argv), NOBODY)
    taking_part = servers if split else workers
    return Topology(
        kind + tag,
        kind,
        lab.vllm.version,
        router,
        taking_part,
        prefill if split else (),
        decode if split else (),
    )


def _model(lab: Lab) -> Model:
    """The lab's model by its id: its folder differs from host to host, and is looked up there."""
    source = lab.model.id.removeprefix(PACKAGE_PREFIX)
    tokenizer = Path(lab.model.tokenizer) if lab.model.tokenizer else None
    return Model(PurePosixPath(source).name, Path(lab.model.id), {}, tokenizer)


def _section(lab: Lab, name: str) -> HostSection | None:
    return next((host for host in lab.hosts if host.name == name), None)


def suite_python(lab: Lab, host: str) -> str:
    """As Hosts has it; relative paths start at the home of the account there."""
    section = _section(lab, host)
    if section is None or section.namespace:
        return sys.executable
    return release.suite_python_there(section)


def server_python(lab: Lab, node: NodeSection) -> str:
    """As Hosts.python_of has it."""
    section = _section(lab, node.host)
    if section is None or section.namespace:
        return release.python_of(lab)
    return release.python_there(section, lab.vllm.version)


def _head(lab: Lab) -> Iterator[str]:
    yield f"# Plan of a session with lab {lab.name} ({lab.file}), vLLM {lab.vllm.version}: nothing is run."
    yield f"# Ports are allocated at start, on each host the lowest free ones of {lab.ports.first} to"
    yield f"# {lab.ports.last}; shown are those of a host where all are free."
    yield f"# Models and tokenizers are looked up on each host; {lab.model.id} stands for the folder."
    yield "# Relative paths on a remote host start at the account's home. Words in capitals:"
    for word, meaning in WORDS.items():
        yield f"#   {word}: {meaning}"
    yield "# Not shown: what single tests add (NIXL probe, link speed, KV accounting, reference model)."


def _host(lab: Lab, name: str, deployments: Sequence[Deployed]) -> Iterator[str]:
    section = _section(lab, name)
    nodes = lab.nodes_on(name)
    parts = [f"{node.role} node {node.name}" for node in nodes]
    parts += ["routers and load engine"] if lab.controller.host == name else []
    yield f"# ===== {name}: {', '.join(parts) or 'runs pytest'}"
    if section is None:
        yield "# this machine: pytest starts each process below through a supervisor of its own"
        yield "# reaping: leases of earlier sessions are read, and what still lives of them is ended"
        yield from _made(lab)
    else:
        yield from _connection(lab, section, nodes)
    if nodes or lab.controller.host == name:
        yield from _versions(lab, nodes)
        yield from _facts(lab, name, nodes)
    yield from _lookups(lab, section, nodes)
    for deployed in deployments:
        yield from _servers(deployed, name)
    if lab.controller.host == name:
        for deployed in deployments:
            yield from _routers(deployed)
        yield from _load(lab, deployments)
    if section is not None and section.namespace:
        yield "# rate of the link in tests/disagg/test_link_rates.py, here 1 Gbit/s; afterwards lifted"
        for node in nodes:
            yield shlex.join(shaping.command(node, SHAPED_BIT_S))
            yield shlex.join(shaping.command(node, None))


def _made(lab: Lab) -> Iterator[str]:
    """What makes the hosts that are made on this machine."""
    made = [host for host in lab.hosts if host.namespace]
    if not made:
        return
    nodes = [lab.nodes_on(host.name)[0] for host in made]
    for host in made:
        yield f"# made host {host.name}: namespaces and an SSH server{_bound(host.cpus)}"
        yield shlex.join(
            [*namespaces.UNSHARE, "sh", "-c", namespaces.BOOT, "sh", host.name, "/usr/sbin/sshd"]
        )
    yield "# their links"
    for line in namespaces.outer_script(nodes, cast(Sequence[int], [f"PID-{host.name}" for host in made])):
        yield f"ip {line}"
    for host, node in zip(made, nodes, strict=True):
        for line in namespaces.inner_script(node):
            yield f"nsenter --net=/proc/PID-{host.name}/ns/net -- ip {line}"


def _connection(lab: Lab, section: HostSection, nodes: Sequence[NodeSection]) -> Iterator[str]:
    if section.namespace:
        update = {
            "address": nodes[0].address,
            "port": namespaces.SSH_PORT,
            "user": "root",
            "key_file": "SCRATCH/client_key",
            "known_hosts": "SCRATCH/known_hosts",
        }
        section = section.model_copy(update=update)
    yield "# connection (by paramiko; what one would type), and the deputy's files on its standard input"
    ssh = ssh_command(lab, section)
    digest, archive = remote.bundle()
    yield f"{ssh} {shlex.quote(remote.INSTALL.format(digest=digest))} < DEPUTY.tar   # {len(archive):,} B"
    folder = '"${XDG_STATE_HOME:-$HOME/.local/state}"/disagglab/deputy/' + digest
    command = f"{remote.SEARCH_PATH}; exec {shlex.quote(section.python)} -E -s -S {folder}"
    yield "# the deputy: owns every process below, and ends them when the connection ends, or when it has"
    yield f"# heard nothing for {section.heartbeat_s:g} s"
    yield f"{ssh} {shlex.quote(command)}"
    first = {
        "run_id": "RUN",
        "ports": [lab.ports.first, lab.ports.last],
        "heartbeat_s": section.heartbeat_s,
        "exclusive": True,
    }
    yield "# what it is told first: this session; and to end what earlier ones left (reaping)"
    yield f"#   {json.dumps({'id': 0, **first})}"
    yield f"#   {json.dumps({'id': 1, 'method': 'reap', 'args': []})}"


def ssh_command(lab: Lab, section: HostSection) -> str:
    """How one would log in to a host by hand, with what the lab file and ~/.ssh/config say."""
    where = target(section)
    words = ["ssh", "-p", str(where.port)]
    words += [word for key in where.keys for word in ("-i", key)]
    words += ["-o", f"UserKnownHostsFile={' '.join(where.known_hosts)}"]
    words += ["-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={where.connect_s:g}"]
    hops: list[Target] = []
    hop = section.jump
    while hop is not None:
        through = _section(lab, hop)
        assert through is not None  # the lab file was checked
        hops.insert(0, target(through))
        hop = through.jump
    if hops:
        words += ["-J", ",".join(f"{one.user}@{one.address}:{one.port}" for one in hops)]
    return shlex.join([*words, f"{where.user}@{where.address}"])


def _versions(lab: Lab, nodes: Sequence[NodeSection]) -> Iterator[str]:
    """As Hosts.require_environments asks."""
    for node in nodes:
        yield f"# whether the environment of {node.name} holds vLLM {lab.vllm.version}"
        yield shlex.join([server_python(lab, node), "-c", release.ASK])


def _facts(lab: Lab, name: str, nodes: Sequence[NodeSection]) -> Iterator[str]:
    python = server_python(lab, nodes[0]) if nodes else suite_python(lab, name)
    yield "# facts (by testinfra)"
    yield from fact_commands(name, nodes, python)


def fact_commands(name: str, nodes: Sequence[NodeSection], python: str) -> list[str]:
    """The commands of facts.collect, noted by a host that answers just enough for all to be asked."""
    from testinfra.backend.base import BaseBackend
    from testinfra.host import Host

    noted: list[str] = []
    addresses = [{"ifname": "IF", "mtu": 0, "addr_info": [{"local": node.kv_address} for node in nodes]}]
    answers = {
        "uname -s": "Linux",
        "/proc/meminfo": "MemTotal: 0 kB\nMemAvailable: 0 kB\n",
        "importlib.metadata": "{}",
        "libcuda": '{"modules": [], "gpus": [], "error": ""}',
        "ip -json": json.dumps(addresses),
    }

    class Backend(BaseBackend):  # type: ignore[misc]
        """Notes commands instead of running them."""

        NAME = "plan"

        def run(self, command: str, *args: str, **_: Any) -> Any:
            text = self.get_command(command, *args)
            if text not in noted:
                noted.append(text)
            said = next((answer for part, answer in answers.items() if part in text), "")
            return self.result(0, text.encode(), said.encode(), b"")

    try:
        facts.collect(Host(Backend(name)), name, nodes, python)
    except (ValueError, LookupError) as error:  # a fact that is no fact without a real answer
        noted.append(f"# and what follows from the answer to that ({error})")
    return noted


def _lookups(lab: Lab, section: HostSection | None, nodes: Sequence[NodeSection]) -> Iterator[str]:
    """Where the model lies, asked on a host that does not share this machine's files."""
    if section is None or section.namespace:
        return
    python = (
        server_python(lab, nodes[0]) if nodes and section.environments else suite_python(lab, section.name)
    )
    argv = [python, "-m", "disagglab.hosts.weights", lab.model.model_dump_json(), lab.file]
    yield "# where the model lies there"
    yield f"HF_HUB_OFFLINE=1 {shlex.join(argv)}"


def _servers(deployed: Deployed, host: str) -> Iterator[str]:
    for server in deployed.servers:
        plan: ServerPlan = server.plan
        if plan.node.host == host:
            version = deployed.lab.vllm.version
            yield f"# server {plan.process_name}: vLLM {version}{deployed.what}{_bound(plan.node.cpus)}"
            yield plan.command


def _routers(deployed: Deployed) -> Iterator[str]:
    for topology in deployed.topologies:
        kind = ", one at a time" if topology.kind == ROUTED else "" if deployed.connector else ", dedicated"
        yield f"# router: {topology.name}{kind}{_bound(deployed.lab.controller.cpus)}"
        yield f"NO_COLOR=1 {topology.router.command}"


def _load(lab: Lab, deployments: Sequence[Deployed]) -> Iterator[str]:
    cpus = lab.controller.cpus
    yield f"# load engine: `vllm bench serve`, kept imported in one process{_bound(cpus)}"
    worker = [suite_python(lab, lab.controller.host), "-m", "disagglab.measure.loadworker"]
    yield f"HF_HUB_OFFLINE=1 PYTHONHASHSEED={HASH_SEED} {shlex.join(worker)}"
    workloads = lab.gated_workloads
    if workloads:
        yield "# its jobs, each round on each topology: the workloads that the gates name"
    tokenizer = _model(lab).tokenizer
    for workload in workloads:
        traces = Path("TRACES", f"{workload.name}.SEED.{workload.total_requests}.jsonl")
        for deployed in deployments:
            for topology in deployed.topologies if deployed.connector else ():
                options = bench_options(topology, workload, traces, tokenizer, "SALT")
                yield f"# {workload.name} on {topology.name}"
                yield f"PYTHONHASHSEED={HASH_SEED} vllm bench serve {shlex.join(options)}"


def _bound(cpus: Sequence[int]) -> str:
    return f", bound to cores {','.join(map(str, cpus))}" if cpus else ""

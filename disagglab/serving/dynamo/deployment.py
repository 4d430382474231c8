"""A deployment of NVIDIA Dynamo: workers on the lab's nodes that come and go, frontends in front of them.

Other than :class:`serving.topology.Deployment` it may grow and shrink while a frontend serves, because what
joins its parts is the registry and not a list of addresses in a command.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Self

from disagglab import waiting
from disagglab.address import url_of
from disagglab.config import ipv4
from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import InvalidRun
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.progress import ProgressLine
from disagglab.results.seconds import Phase, spends
from disagglab.serving import boot, openai, room
from disagglab.serving.dynamo.etcd import EtcdClient, Listing
from disagglab.serving.dynamo.parts import (
    AGGREGATED,
    BACKEND,
    BLOCK_SIZE,
    DRAIN_S,
    EVENTS_APPLIED,
    KV,
    PREFILL,
    Frontend,
    Planes,
    Worker,
    WorkerPorts,
    body,
    frontend_argv,
    frontend_env,
    on_worker,
    plan_worker,
    settings,
)
from disagglab.serving.service import POLL_S, await_that
from disagglab.serving.topology import DISAGGREGATED, ROUTED, Topology

WORKERS_TAG, PAIR_TAG = "@dynamo", "@dynamo-pd"  # of the deployments that tests/dynamo shares
FOUND_DEADLINE_S = 60.0  # for a worker's key, and for a frontend that finds it: 1 s where nothing else runs
EVENT_WAIT_S = 1.0  # an event takes milliseconds
EVENT_PROMPTS = 5


class DynamoDeployment:
    """Dynamo's workers, and the frontends that were asked for.

    Each deployment has a namespace of its own in the registry, so that several stand side by side.

    Args:
        lab: its nodes, model and [vllm.args] are those of the workers.
        python: Python that has Dynamo, at the same place on every host.
        mode: AGGREGATED: every worker does all; DISAGGREGATED: each node in its role, KV by [transport].
        nodes: one worker each; all of the lab's by default.
        events_host: see :func:`disagglab.serving.dynamo.parts.plan_worker`.
        drain_s: what a worker that is asked to go leaves its requests.
        tag: tells its processes and logs from another deployment's.
    """

    def __init__(
        self,
        hosts: Hosts,
        lab: Lab,
        model: Model,
        python: str,
        planes: Planes,
        mode: str = AGGREGATED,
        *,
        nodes: Sequence[NodeSection] | None = None,
        events_host: str = "*",
        drain_s: float = DRAIN_S,
        tag: str = "",
    ) -> None:
        self.hosts = hosts
        self.lab = lab
        self.model = model
        self.python = python
        self.planes = planes
        self.mode = mode
        self.events_host = events_host
        self.drain_s = drain_s
        self.tag = tag
        self.nodes = tuple(nodes or lab.nodes)
        self.namespace = f"lab-{secrets.token_hex(4)}"
        self.served_name = f"{model.name}-{secrets.token_hex(4)}"
        self.workers: tuple[Worker, ...] = ()
        self._launched: list[Worker] = []
        self._opened = 0  # frontends so far

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, line: ProgressLine) -> DynamoDeployment:
        """Start a worker on every node; return when all are ready and registered.

        Raises:
            StartError: see :meth:`launch` and :meth:`wait`.
            ConfigError: if an address of the lab is IPv6, or memory is short.
        """
        ipv4.require(self.lab, self.nodes, ipv4.DYNAMO, controller=True)
        room.require(self.tenants(self.nodes))
        for node in self.nodes:
            self.launch(node)
        self.wait(line)
        return self

    def tenants(self, nodes: Sequence[NodeSection]) -> list[room.Tenant]:
        """A worker on each of these nodes, as those that are to have room."""
        return [
            room.Tenant(self.hosts.of(node), self.lab, node, f"{node.name}{self.tag}", self.model.config)
            for node in nodes
        ]

    def launch(self, node: NodeSection | None = None) -> Worker:
        """Start one worker more; it is not ready yet.

        Args:
            node: where; by default the first node. Those beyond one a node get a number to their name.

        Raises:
            StartError: if the command cannot be executed.
        """
        place, number = node or self.nodes[0], len(self._launched) + 1
        if any(earlier.name == place.name for earlier in self._launched):
            place = place.model_copy(update={"name": f"{place.name}-{number}"})
        host = self.hosts.of(place)
        ports = WorkerPorts(
            system=host.reserve_port(place.address),
            requests=host.reserve_port(place.address),
            events=host.reserve_port(place.address),
            side_channel=host.reserve_port(place.kv_address) if self.mode == DISAGGREGATED else None,
        )
        plan = plan_worker(
            self.lab,
            place,
            self.hosts.model_on(place, self.model, self.python),
            self.served_name,
            ports,
            self.python,
            settings(self.planes, self.namespace, place.address),
            mode=self.mode,
            events_host=self.events_host,
            drain_s=self.drain_s,
            tag=self.tag,
        )
        worker = Worker.launch(host, self.lab, plan, ports.all)
        self._launched.append(worker)
        self.workers = (*self.workers, worker)
        return worker

    def wait(self, line: ProgressLine) -> None:
        """Return when every worker is ready, runs the lab's vLLM and has its key in etcd.

        Raises:
            StartError: see :func:`serving.boot.wait_ready`; if another vLLM runs, or a key is missing.
        """
        fresh = [worker for worker in self.workers if worker.ready_s is None]
        boot.wait_ready(fresh, self.lab, line)
        for worker in fresh:
            worker.require_release(self.lab.vllm.version)
            if self.planes.etcd:
                self._await_key(worker)

    def remove(self, worker: Worker) -> None:
        """Ask a worker to go (SIGTERM); return when it has gone.

        It gives up its keys at once, and what it still answers after ``drain_s``.

        Raises:
            StartError: if something of it is still alive after the deadline.
        """
        self.workers = tuple(one for one in self.workers if one is not worker)
        worker.stop()

    def kill(self, worker: Worker) -> None:
        """End a worker as a crash would (SIGKILL), without a goodbye to etcd or to anybody."""
        self.workers = tuple(one for one in self.workers if one is not worker)
        worker.kill()

    def key(self, worker: Worker) -> str:
        """Under what a worker's address stands in etcd."""
        return f"v1/instances/{self.namespace}/{worker.plan.component}/generate/{worker.instance}"

    def keys(self, kind: str = "instances") -> Listing:
        """What etcd holds of this deployment. ``kind``: instances, mdc (model cards)."""
        registry = EtcdClient(self.planes.etcd)
        try:
            return registry.get_prefix(f"v1/{kind}/{self.namespace}/")
        finally:
            registry.close()

    def _await_key(self, worker: Worker) -> None:
        key = self.key(worker)
        await_that(
            worker,
            lambda: key in self.keys().values,
            FOUND_DEADLINE_S,
            lambda: f"etcd {self.planes.etcd} has no key {key}",
        )

    @contextlib.contextmanager
    def routed(self, router_mode: str, migration_limit: int = 0) -> Iterator[Topology]:
        """The present workers behind a new frontend, which has found all of them; it ends with the block.

        Args:
            router_mode: KV, ROUND_ROBIN, or another of ``--router-mode``.
            migration_limit: how often a request may go on on another worker when its own is lost.

        Raises:
            StartError: if the frontend does not come up, or does not find them.
        """
        frontend = self._open(router_mode, migration_limit)
        name, kind, version = f"dynamo-{router_mode}{self.tag}", ROUTED, self.lab.vllm.version
        prefill: tuple[Worker, ...] = ()
        decode: tuple[Worker, ...] = ()
        if self.mode == DISAGGREGATED:
            kind = DISAGGREGATED
            prefill = tuple(worker for worker in self.workers if worker.plan.component == PREFILL)
            decode = tuple(worker for worker in self.workers if worker.plan.component == BACKEND)
        try:
            yield Topology(name, kind, version, frontend, self.workers, prefill, decode)
        finally:
            frontend.stop()

    @spends(Phase.ROUTERS)
    def _open(self, router_mode: str, migration_limit: int) -> Frontend:
        host, address = self.hosts.controller, self.lab.controller.address
        port, answers = host.reserve_port(address), host.reserve_port(address)
        self._opened += 1
        name = f"frontend-{router_mode}-{self._opened}{self.tag}"
        argv = frontend_argv(self.python, address, port, router_mode, migration_limit)
        env = frontend_env(settings(self.planes, self.namespace, address), answers)
        process = host.start(name, argv, env, self.lab.controller.cpus, [port, answers])
        base = url_of(address, port)
        wanted = frozenset(worker.instance for worker in self.workers)
        frontend = Frontend(
            name,
            base,
            tuple(argv),
            process,
            metrics_url=base,
            serves=self.served_name,
            env=env,
            wanted=wanted,
            hears=len(wanted) if router_mode == KV and self.mode == AGGREGATED else 0,
        )
        return frontend.brought_up(FOUND_DEADLINE_S)

    @spends(Phase.ENDS)
    def stop(self) -> None:
        """End all workers, at once, and all of them even where one does not end."""
        self.workers = ()
        with contextlib.ExitStack() as ended:
            for worker in reversed(self._launched):
                ended.callback(worker.stop)
            for worker in self._launched:
                worker.ask_to_stop()


def require_events(topology: Topology) -> None:
    """Refuse a frontend that does not hear what its workers' caches hold: it would route by chance.

    Each worker gets prompts of two blocks that nobody else has, addressed to it alone, until the frontend has
    counted an event that blocks were stored. One may not do, since what is published while a subscriber joins
    is lost to it (ZeroMQ's "slow joiner"); Dynamo sees the gap at the next event and asks for what it missed.

    Raises:
        InvalidRun: naming the worker that is not heard.
    """
    frontend = topology.router
    assert isinstance(frontend, Frontend)
    size = round(frontend.metrics().value(BLOCK_SIZE))
    for worker in topology.servers:
        assert isinstance(worker, Worker)
        before, prompts = _stored(frontend), 0
        while _stored(frontend) <= before:
            if prompts == EVENT_PROMPTS:
                raise InvalidRun(
                    f"{topology.name}: {worker.name} stored {2 * prompts} blocks, and {frontend.name} has"
                    " heard of none; vLLM publishes only where it binds: endpoint tcp://*:PORT in"
                    f" --kv-events-config; command: {worker.plan.command}"
                )
            prompt = openai.prompt_of(2 * size + 1, secrets.randbelow(40_000))
            openai.complete(frontend.url, on_worker(body(topology.served_name, prompt, 1), worker))
            prompts += 1
            _await_stored(frontend, before)


def _await_stored(frontend: Frontend, before: float) -> None:
    """Return when a frontend has heard of blocks stored since; after EVENT_WAIT_S in any case."""
    waiting.last_answer(lambda: _stored(frontend) > before, EVENT_WAIT_S, POLL_S)


def _stored(frontend: Frontend) -> float:
    """Events of stored blocks that a frontend has taken in. It has no such counter before the first."""
    found = frontend.metrics().samples
    wanted = {("event_type", "stored"), ("status", "ok")}
    return sum(value for name, labels, value in found if name == EVENTS_APPLIED and wanted <= labels)

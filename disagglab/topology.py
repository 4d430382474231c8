"""Three views on the same servers: single, replicated, disaggregated, each behind its own router.

A server that is never sent ``kv_transfer_params`` behaves as a plain server, so one pair plays all three
parts: equal memory, equal code, and measurable in turns within one minute.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from disagglab import boot, release
from disagglab.hosts import Hosts
from disagglab.model import Model
from disagglab.progress import ProgressLine
from disagglab.router import Router, start_router
from disagglab.section import Lab, NodeSection
from disagglab.server import VllmServer, plan_server, require_memory

SINGLE, REPLICATED, DISAGGREGATED = "single", "replicated", "disaggregated"
TOPOLOGIES = (SINGLE, REPLICATED, DISAGGREGATED)
SINGLE_AGAIN = "single-again"  # the same servers and router as SINGLE: what differs between the two is noise


@dataclass(frozen=True)
class Topology:
    """One way of serving. Requests go to ``router.url``; ``servers`` are those that take part.

    ``kind``: one of TOPOLOGIES; ``name``: how this one is told from others of its kind. ``version``: of vLLM.
    """

    name: str
    kind: str
    version: str
    router: Router
    servers: tuple[VllmServer, ...]
    prefill: tuple[VllmServer, ...] = ()
    decode: tuple[VllmServer, ...] = ()

    @property
    def served_name(self) -> str:
        """Model name to put into requests; differs from run to run."""
        return self.servers[0].plan.served_name

    @property
    def cycle(self) -> int:
        """Requests in which a round robin visits every server, and every pair that it makes of them.

        vllm-router 0.1.17 chooses prefill and decode server together when a request arrives, each role in
        turn: the k-th gets prefill server k mod P and decode server k mod D, whatever the load. So it comes
        back to a pair after lcm(P, D) requests, and where P and D share a factor it never makes the others.
        """
        return math.lcm(len(self.prefill), len(self.decode)) if self.decode else len(self.servers)

    @property
    def commands(self) -> tuple[str, ...]:
        """Every command that makes up this topology."""
        return (*(server.plan.command for server in self.servers), self.router.command)


class Deployment:
    """The servers of a lab, started in parallel, with the routers in front of them.

    Args:
        connector: False starts plain servers without any KV connector (``--dedicated``).
        nodes: the nodes to start; all of the lab's by default.
        tag: tells its topologies, processes and logs from those of another deployment, as in ``@0.30.0``.
    """

    def __init__(
        self,
        hosts: Hosts,
        lab: Lab,
        model: Model,
        connector: bool = True,
        nodes: Sequence[NodeSection] | None = None,
        tag: str = "",
    ) -> None:
        self.hosts = hosts
        self.lab = lab
        self.model = model
        self.connector = connector
        self.tag = tag
        self.nodes = tuple(nodes or lab.nodes)
        self.served_name = f"{model.name}-{secrets.token_hex(4)}"
        self.servers: tuple[VllmServer, ...] = ()
        self.beside: dict[str, Deployment] = {}  # of variants, by name
        self._topologies: dict[str, Topology] = {}

    def start(self, line: ProgressLine) -> Deployment:
        """Start all servers at once; return when every one is ready and proved to be ours.

        Raises:
            StartError: see :meth:`launch` and :meth:`wait`.
        """
        require_memory_for([self])
        self.launch()
        return self.wait(line)

    def launch(self) -> None:
        """Start all servers at once; they are not ready yet. See :func:`require_memory_for` before.

        Raises:
            StartError: if a command cannot be executed. What was started is ended by the host's close.
        """
        started = []
        for node in self.nodes:
            host = self.hosts.of(node)
            port = host.reserve_port(node.address)
            side_channel = host.reserve_port(node.kv_address) if self.connector else None
            python = self.hosts.python_of(node, self.lab.vllm.version)
            found = self.hosts.model_on(node, self.model, python)
            plan = plan_server(self.lab, node, found, self.served_name, port, side_channel, python, self.tag)
            ports = [port] if side_channel is None else [port, side_channel]
            started.append(VllmServer.start(host, self.lab, plan, ports))
        self.servers = tuple(started)

    def wait(self, line: ProgressLine) -> Deployment:
        """Return when every server is ready and proved to be ours.

        Raises:
            StartError: see :func:`disagglab.boot.wait_ready`.
        """
        boot.wait_ready(self.servers, self.lab, line)
        for server in self.servers:
            release.require_served(server.name, server.url, self.lab.vllm.version)
        return self

    def topology(self, name: str) -> Topology:
        """A topology on these servers, by its kind; its router is started when first asked for.

        Raises:
            StartError: if the router does not come up.
        """
        if name not in self._topologies:
            self._topologies[name] = self._route(name)
        return self._topologies[name]

    def _route(self, name: str) -> Topology:
        prefill = tuple(server for server in self.servers if server.plan.node.role == "prefill")
        decode = tuple(server for server in self.servers if server.plan.node.role == "decode")
        version = self.lab.vllm.version
        label = (name if self.connector else f"{name}-dedicated") + self.tag
        if name == DISAGGREGATED:
            router = start_router(self.hosts.controller, self.lab, label, prefill=prefill, decode=decode)
            return Topology(name + self.tag, name, version, router, self.servers, prefill, decode)
        servers = prefill[:1] if name == SINGLE else self.servers
        router = start_router(self.hosts.controller, self.lab, label, workers=servers)
        return Topology(name + self.tag, name, version, router, servers)

    def stop(self) -> None:
        """End routers and servers of this deployment."""
        for topology in self._topologies.values():
            topology.router.process.stop()
        self._topologies.clear()
        for server in self.servers:
            server.process.stop()
        self.servers = ()


def require_memory_for(deployments: Sequence[Deployment]) -> None:
    """Refuse to start so many servers on hosts that lack the memory; asked once for all of them, because
    servers that have just been launched hold little yet.

    Raises:
        StartError: see :func:`disagglab.server.require_memory`.
    """
    places = [(one.hosts.of(node), one.lab) for one in deployments for node in one.nodes]
    for host, lab in {id(host): (host, lab) for host, lab in places}.values():
        require_memory(host, lab, sum(each is host for each, _ in places))

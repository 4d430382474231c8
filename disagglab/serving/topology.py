"""Three views on the same servers: single, replicated, disaggregated, each behind its own router.

A server that is never sent ``kv_transfer_params`` behaves as a plain server, so one pair plays all three
parts: equal memory, equal code, and measurable in turns within one minute.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from disagglab.config import arms, ipv4, way
from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import StartError
from disagglab.hosts.host import Host
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.predict.strategies import Strategy
from disagglab.progress import ProgressLine
from disagglab.results.seconds import Phase, spends
from disagglab.serving import boot, death, room
from disagglab.serving.router import READY_DEADLINE_S, Hearing, Router, launch_router
from disagglab.serving.vllm import EventSource, VllmServer, plan_server

SINGLE, REPLICATED, DISAGGREGATED = arms.SINGLE, arms.REPLICATED, arms.DISAGGREGATED
SINGLE_AGAIN = arms.SINGLE_AGAIN
TOPOLOGIES = (SINGLE, REPLICATED, DISAGGREGATED)
ROUTED = "routed"  # equal servers, between which a router chooses in its own way


@dataclass(frozen=True)
class Topology:
    """One way of serving. Requests go to ``router.url``; ``servers`` are those that take part.

    ``kind``: one of TOPOLOGIES, or ROUTED; ``name``: how this one is told from others of its kind.
    ``version``: of vLLM. ``ranks``: of each server (tensor parallel). ``followers``: ranks of its server on
    other hosts, which nobody asks anything.
    """

    name: str
    kind: str
    version: str
    router: Router
    servers: tuple[VllmServer, ...]
    prefill: tuple[VllmServer, ...] = ()
    decode: tuple[VllmServer, ...] = ()
    ranks: int = 1
    followers: tuple[VllmServer, ...] = ()

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

    def require_alive(self) -> None:
        """Refuse to go on when a server or the router has died.

        Raises:
            Died: with which one, and how.
        """
        for server in (*self.servers, *self.followers):
            server.require_alive()
        death.require_alive(self.router.process)

    @property
    def commands(self) -> tuple[str, ...]:
        """Every command that makes up this topology."""
        servers = (*self.servers, *self.followers)
        return (*(server.plan.command for server in servers), self.router.command)


class Deployment:
    """The servers of a lab, started in parallel, with the routers in front of them.

    Args:
        connector: False starts plain servers without any KV connector (``--dedicated``).
        nodes: the nodes to start; all of the lab's by default.
        tag: tells its topologies, processes and logs from those of another deployment, as in ``@0.30.0``.
        events: whether its servers publish which KV blocks they store and drop.
    """

    def __init__(
        self,
        hosts: Hosts,
        lab: Lab,
        model: Model,
        connector: bool = True,
        nodes: Sequence[NodeSection] | None = None,
        tag: str = "",
        events: bool = False,
    ) -> None:
        self.hosts = hosts
        self.lab = lab
        self.model = model
        self.connector = connector
        self.tag = tag
        self.events = events
        self.nodes = tuple(nodes or lab.nodes)
        self.served_name = f"{model.name}-{secrets.token_hex(4)}"
        self.servers: tuple[VllmServer, ...] = ()
        self.followers: tuple[VllmServer, ...] = ()  # ranks of a server on other hosts, without HTTP
        self.beside: dict[str, Deployment] = {}  # of ways, by arm
        self.process_names: set[str] = set()  # of servers and lasting routers, ended ones included
        self._topologies: dict[str, Topology] = {}
        self._routed = 0  # routers that routed() has started
        self._ports: list[tuple[Host, str, int]] = []  # of its servers
        self._router_ports_held: list[tuple[int, int]] = []  # of the routers of its topologies

    def start(self, line: ProgressLine) -> Deployment:
        """Start all servers at once; return when every one is ready and proved to be ours.

        Raises:
            StartError: see :meth:`launch` and :meth:`wait`.
            ConfigError: see :func:`require_room_for`.
        """
        require_room_for([self])
        self.launch()
        return self.wait(line)

    def tenants(self) -> list[room.Tenant]:
        """Its servers, as those that are to have room."""
        return [
            room.Tenant(self.hosts.of(node), self.lab, node, f"{node.name}{self.tag}", self.model.config)
            for node in self.nodes
        ]

    @spends(Phase.SERVERS)
    def launch(self) -> None:
        """Start all servers at once; they are not ready yet. See :func:`require_room_for` before.

        Raises:
            StartError: if a command cannot be executed. What was started is in ``servers``, for :meth:`stop`.
            ConfigError: if servers are to publish KV events on an address that is IPv6.
        """
        if self.events:
            ipv4.require(self.lab, self.nodes, ipv4.KV_EVENTS)
        for node in self._placed():
            host = self.hosts.of(node)
            port = self._reserve(host, node.address)
            side_channel = self._reserve(host, node.kv_address) if self.connector else None
            events = self._reserve(host, node.address) if self.events else None
            python = self.hosts.python_of(node, self.lab.vllm.version)
            found = self.hosts.model_on(node, self.model, python)
            plan = plan_server(
                self.lab, node, found, self.served_name, port, side_channel, python, self.tag, events
            )
            ports = [number for number in (port, side_channel, events) if number is not None]
            server = VllmServer.start(host, self.lab, plan, ports)
            if node.args.get(way.HEADLESS_KEY):
                self.followers = (*self.followers, server)
            else:
                self.servers = (*self.servers, server)
            self.process_names.add(plan.process_name)

    def _placed(self) -> list[NodeSection]:
        """The nodes, with the port at which the parts of a server on several hosts meet."""
        if not any(node.args.get(way.HEADLESS_KEY) for node in self.nodes):
            return list(self.nodes)
        port = self._port_of_all(self.nodes[0])
        return [
            node.model_copy(update={"args": {**node.args, way.PORT_KEY: port}})
            for node in reversed(self.nodes)  # the first one last: it waits for the others
        ]

    def _reserve(self, host: Host, address: str) -> int:
        port = host.reserve_port(address)
        self._ports.append((host, address, port))
        return port

    def _port_of_all(self, node: NodeSection) -> int:
        """A port that is ours on both addresses of a node: PyTorch's store, by which ranks on several hosts
        find each other, listens on all of a host's.
        """
        host = self.hosts.of(node)
        ports = {address: self._reserve(host, address) for address in (node.address, node.kv_address)}
        while len(set(ports.values())) > 1:
            behind = min(ports, key=lambda address: ports[address])
            ports[behind] = self._reserve(host, behind)
        return ports[node.address]

    def wait(self, line: ProgressLine) -> Deployment:
        """Return when every server is ready and proved to be ours.

        Raises:
            StartError: see :func:`disagglab.serving.boot.wait_ready`.
        """
        boot.wait_ready(self.servers, self.lab, line, self.followers)
        for server in self.servers:
            server.require_release(self.lab.vllm.version)
        return self

    @spends(Phase.ROUTERS)
    def topology(self, name: str, along: Sequence[str] = ()) -> Topology:
        """A topology on these servers, by its kind; its router is started when first asked for.

        Args:
            along: kinds that will be asked for later. Routers of these that do not run yet are started at the
                same time; one that does not come up is ended, and started again when it is asked for.

        Raises:
            StartError: if the router of ``name`` does not come up.
        """
        if name not in self._topologies:
            self._bring_up([one for one in dict.fromkeys((name, *along)) if one not in self._topologies])
        return self._topologies[name]

    def _bring_up(self, names: Sequence[str]) -> None:
        """Start the routers of these kinds at once; return when each is ready, or ended but for the first."""
        launched: dict[str, Topology] = {}
        with contextlib.ExitStack() as failed:
            for name in names:
                launched[name] = self._route(name)
                failed.callback(launched[name].router.stop)
            for name, topology in launched.items():
                try:
                    topology.router.await_ready(READY_DEADLINE_S)
                except StartError:
                    if name == names[0]:
                        raise
                    topology.router.stop()
                else:
                    self._topologies[name] = topology
                    self.process_names.add(topology.router.process.name)
            failed.pop_all()

    def _route(self, name: str) -> Topology:
        """A topology whose router is not ready yet."""
        prefill = tuple(server for server in self.servers if server.plan.node.role == "prefill")
        decode = tuple(server for server in self.servers if server.plan.node.role == "decode")
        version = self.lab.vllm.version
        label = (name if self.connector else f"{name}-dedicated") + self.tag
        ports = self._router_ports()
        self._router_ports_held.append(ports)
        if name == DISAGGREGATED:
            router = launch_router(
                self.hosts.controller, self.lab, label, prefill=prefill, decode=decode, ports=ports
            )
            servers, ranks = self.servers, way.ranks(self.lab)
            return Topology(name + self.tag, name, version, router, servers, prefill, decode, ranks)
        servers = prefill[:1] if name == SINGLE else self.servers
        router = launch_router(self.hosts.controller, self.lab, label, workers=servers, ports=ports)
        ranks = way.ranks(self.lab)
        return Topology(
            name + self.tag, name, version, router, servers, ranks=ranks, followers=self.followers
        )

    @contextlib.contextmanager
    def routed(
        self,
        strategy: Strategy,
        sources: Sequence[EventSource] | None = None,
        prefill: Sequence[VllmServer] = (),
        decode: Sequence[VllmServer] = (),
    ) -> Iterator[Topology]:
        """A topology on these servers whose router chooses by ``strategy``: a new one, ended with the block.

        Args:
            sources: where it hears of KV blocks, for a strategy that goes by them; by default what the
                servers publish.
            prefill, decode: servers to play these roles; where there are none, all servers are equal.

        Raises:
            StartError: if the router does not come up.
        """
        servers = (*prefill, *decode) or self.servers
        self._routed += 1
        label = f"{strategy.name}{self.tag}-{self._routed}"
        ports = self._router_ports()
        try:
            with spends(Phase.ROUTERS):
                router = launch_router(
                    self.hosts.controller,
                    self.lab,
                    label,
                    () if prefill else servers,
                    prefill,
                    decode,
                    strategy,
                    self._hearing(sources) if strategy.events else None,
                    ports,
                ).brought_up(READY_DEADLINE_S)
        except BaseException:
            self.hosts.router_ports.append(ports)
            raise
        kind, version = DISAGGREGATED if prefill else ROUTED, self.lab.vllm.version
        try:
            yield Topology(strategy.name, kind, version, router, servers, tuple(prefill), tuple(decode))
        finally:
            router.stop()
            self.hosts.router_ports.append(ports)

    def _hearing(self, sources: Sequence[EventSource] | None) -> Hearing:
        own = (server.plan.event_source for server in self.servers)
        heard = [source for source in own if source] if sources is None else sources
        return Hearing(tuple(heard), self.lab.block_size, self.served_name)

    def _router_ports(self) -> tuple[int, int]:
        """Of HTTP and metrics; those of a router that has ended first."""
        if self.hosts.router_ports:
            return self.hosts.router_ports.pop()
        host, address = self.hosts.controller, self.lab.controller.address
        return host.reserve_port(address), host.reserve_port(address)

    @spends(Phase.ENDS)
    def stop(self) -> None:
        """End routers and servers of this deployment, at once, and all of them even where one does not end.

        Raises:
            StartError: if something is still alive; see :meth:`disagglab.serving.service.Service.stop`.
        """
        routers = [topology.router for topology in self._topologies.values()]
        servers, self.servers = (*self.servers, *self.followers), ()
        self.followers = ()
        self._topologies.clear()
        with contextlib.ExitStack() as ended:
            for service in reversed((*routers, *servers)):
                ended.callback(service.stop)
            for service in (*routers, *servers):
                service.process.has_died()  # noted before it is asked to end, for who looks for the cause
            for service in (*routers, *servers):
                service.ask_to_stop()

    @property
    def alive(self) -> bool:
        """Whether it has servers, and all of them run, with the routers of its topologies."""
        routers = (topology.router for topology in self._topologies.values())
        everyone = (*self.servers, *self.followers, *routers)
        return bool(self.servers) and all(one.process.alive for one in everyone)

    def give_back_ports(self) -> None:
        """Let others have the ports of a deployment that has ended."""
        for host, address, port in self._ports:
            host.give_back_port(address, port)
        self.hosts.router_ports += self._router_ports_held
        self._ports, self._router_ports_held = [], []


@contextlib.contextmanager
def running(
    deployments: Sequence[Deployment], line_of: Callable[[Deployment], ProgressLine]
) -> Iterator[None]:
    """Servers of several deployments, started at once and ready; ended with the block, the last first, and
    as well where one of them does not come up.

    Raises:
        ConfigError: see :func:`require_room_for`.
        StartError: see :meth:`Deployment.launch` and :meth:`Deployment.wait`.
    """
    require_room_for(deployments)
    with contextlib.ExitStack() as ended:
        for each in deployments:
            ended.callback(each.stop)
        for each in deployments:
            each.launch()
        for each in deployments:
            each.wait(line_of(each))
        yield


def require_room_for(deployments: Sequence[Deployment]) -> None:
    """Refuse to start servers that do not fit beside each other; see :func:`disagglab.serving.room.require`.

    Raises:
        ConfigError: with a table for each host and GPU that is short.
    """
    room.require([tenant for deployment in deployments for tenant in deployment.tenants()])

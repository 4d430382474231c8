"""The servers of ways: beside each other, or taking turns where cores or memory hold few of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from disagglab.config import way
from disagglab.config.schema import Lab
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem, StartError
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv import attention
from disagglab.kv.attention import Config
from disagglab.progress import ProgressLine
from disagglab.serving.topology import Deployment, Topology

HEADS = "num_attention_heads"


def deployment_of(hosts: Hosts, lab: Lab, model: Model, one: WaySection, tag: str = "") -> Deployment:
    """The servers of a way, not started. A server over all nodes moves no KV, so it has no connector.

    Args:
        tag: of its processes; by default the way's own.

    Raises:
        ConfigError: if the model cannot be split over the ranks; see :func:`require_split`.
    """
    changed = way.changed(lab, one)
    index = lab.ways.index(one) if one in lab.ways else 0
    require_split(changed, model.config, f"way[{index}].kind", lab.where(f"way[{index}]"))
    return Deployment(hosts, changed, model, connector=one.kind != way.SHARDED, tag=tag or way.tag(one))


def beside(own: Deployment, ways: Sequence[WaySection]) -> dict[str, Deployment]:
    """The servers of each way by its arm, not started; ways that the same servers can play share them, also
    with the lab's ``own``.

    Raises:
        ConfigError: see :func:`deployment_of`.
    """
    by_start = {way.start_key(own.lab, None): own}
    found = {}
    for one in ways:
        key = way.start_key(own.lab, one)
        if key not in by_start:
            by_start[key] = deployment_of(own.hosts, own.lab, own.model, one)
        found[one.arm] = by_start[key]
    return found


def arm_of(deployment: Deployment, kind: str, arm: str) -> Topology:
    """A topology of a kind on these servers, called as its arm.

    Raises:
        StartError: see :meth:`disagglab.serving.topology.Deployment.topology`.
    """
    return dataclasses.replace(deployment.topology(kind), name=arm)


def require_split(lab: Lab, config: Config, key: str, file: str) -> None:
    """Refuse to spread a model over more ranks than its heads can be divided among.

    Args:
        lab: as the way has it; ``key``, ``file``: of the way that asks for it.

    Raises:
        ConfigError: with the heads that the model has. Of a model whose config is not known nothing is said.
    """
    ranks = way.ranks(lab)
    if ranks < 2 or not config:
        return
    mend = "remove the way, or take a model whose number of heads is a multiple"
    heads = attention.text_config(config).get(HEADS)
    if isinstance(heads, int) and heads % ranks:
        wrong = f"{heads} attention heads of {lab.model.id} cannot be divided among {ranks} ranks"
        raise ConfigError([Problem(file, key, wrong, mend)])
    whole = attention.shape(config, lab.kv_dtype, lab.model.id)
    try:
        whole.on_rank(ranks)
    except ConfigError as error:
        wrong = f"{ranks} ranks of {lab.model.id}: {error.problems[0].wrong}"
        raise ConfigError([Problem(file, key, wrong, mend)]) from error


class Fleet:
    """Servers of ways, started when a way's turn comes.

    At most ``resident`` deployments run at once; which of them ends when another one has to start is the one
    whose turn lies back furthest. Where all fit, none ends before the session does.

    Args:
        resident: deployments that may run at the same time, 1 or more.
        line_of: shows a start; asked with what starts.
        started: told of each deployment before it starts, so that its deaths are looked for, and of each
            command once it runs.
    """

    def __init__(
        self,
        hosts: Hosts,
        lab: Lab,
        model: Model,
        resident: int,
        line_of: Callable[[str], ProgressLine],
        started: Callable[[Deployment], None] = lambda _: None,
    ) -> None:
        self.hosts, self.lab, self.model = hosts, lab, model
        self.resident = max(1, resident)
        self.line_of, self.started = line_of, started
        self.starts = 0
        self._running: dict[str, Deployment] = {}  # by start key, the one with the last turn at the end

    def topology(self, one: WaySection | str, arm: str = "", again: bool = False) -> Topology:
        """A way's topology, its servers ready; they start now if they do not run.

        Args:
            one: a way, or the name of a kind in the lab's own settings.
            arm: what it is called; by default the way's own name.
            again: servers of their own, which no other way shares: the second start of an A/A pair.

        Raises:
            StartError: if a server or the router does not come up, or one that has to end does not.
            ConfigError: if servers do not fit into memory, or the model cannot be split.
        """
        section = one if isinstance(one, WaySection) else None
        kind = one.kind if isinstance(one, WaySection) else one
        name = arm or (one.arm if isinstance(one, WaySection) else one)
        key = self.key_of(one, again)
        if key in self._running and not self._running[key].alive:
            self._end(key)
        if key not in self._running:
            self._start(key, section, again)
        self._running[key] = self._running.pop(key)
        return arm_of(self._running[key], kind, name)

    def key_of(self, one: WaySection | str, again: bool = False) -> str:
        """Equal for ways that the same servers play."""
        section = one if isinstance(one, WaySection) else None
        return way.start_key(self.lab, section) + ("again" if again else "")

    def runs(self, key: str) -> bool:
        """Whether the servers of a key run now."""
        return key in self._running

    def _start(self, key: str, section: WaySection | None, again: bool) -> None:
        tag = (
            f"{way.tag(section) if section else '@own'}-{self.starts + 1}"  # a log of its own for each start
        )
        deployment = (
            deployment_of(self.hosts, self.lab, self.model, section, tag)
            if section
            else Deployment(self.hosts, self.lab, self.model, tag=tag)
        )  # before another one ends for it: a model that cannot be split ends nobody
        while len(self._running) >= self.resident:
            self._end(next(iter(self._running)))
        self.starts += 1
        self.started(deployment)
        try:
            deployment.start(self.line_of(f"servers{tag}"))
        except BaseException:
            deployment.stop()
            deployment.give_back_ports()
            raise
        self._running[key] = deployment

    def _end(self, key: str) -> None:
        deployment = self._running.pop(key)
        deployment.stop()
        deployment.give_back_ports()

    def stop(self) -> None:
        """End all servers and routers, the last first, even where one does not end.

        Raises:
            StartError: if something is still alive.
        """
        failed: list[StartError] = []
        for key in reversed(list(self._running)):
            try:
                self._end(key)
            except StartError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def __iter__(self) -> Iterator[Deployment]:
        """The deployments that run now."""
        return iter(self._running.values())

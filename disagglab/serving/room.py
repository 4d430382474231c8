"""Room for servers beside each other: what all of them take, held against each host and each GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import ConfigError, Problem
from disagglab.hosts import gpu
from disagglab.hosts.host import Host
from disagglab.kv.attention import Config
from disagglab.predict import memory


@dataclass(frozen=True)
class Tenant:
    """A server that is to start. ``name``: as reports have it; ``config``: the model's, empty if unknown."""

    host: Host
    lab: Lab
    node: NodeSection
    name: str
    config: Config

    @property
    def weights_gib(self) -> float | None:
        """The weights of its model; None where they are not computed."""
        return memory.weights_gib(self.lab, self.config)


def require(tenants: Sequence[Tenant]) -> None:
    """Refuse to start servers that do not fit beside each other, and beside what runs already.

    Asked once for all that start together, because servers that have just been launched hold little yet.

    Raises:
        ConfigError: with a table for each host and GPU that is short, the key, and its largest value.
    """
    hosts = {id(tenant.host): tenant.host for tenant in tenants}
    found: list[Problem] = []
    for key, host in hosts.items():
        here = [tenant for tenant in tenants if id(tenant.host) == key]
        found += [*_short_host(host, here), *_short_gpus(host, here)]
    if found:
        raise ConfigError(found)


def _short_host(host: Host, tenants: Sequence[Tenant]) -> Iterator[Problem]:
    free_gib = host.memory_available() / memory.GIB
    demands = [memory.of_host(one.lab, one.node, one.name, one.weights_gib) for one in tenants]
    yield from memory.too_much(tenants[0].lab, memory.Room(_name(host), free_gib, free_gib), demands)


def _short_gpus(host: Host, tenants: Sequence[Tenant]) -> Iterator[Problem]:
    numbers = sorted({number for tenant in tenants for number in tenant.node.gpus})
    cards = gpu.read_memory(host.facts) if numbers else ()
    for number in numbers if cards else ():
        here = [tenant for tenant in tenants if number in tenant.node.gpus]
        if number >= len(cards):
            yield _absent(host, here[0], number, len(cards))
            continue
        card = cards[number]
        if card is None:  # it takes the host's memory, which was asked for
            continue
        demands = [memory.of_gpu(one.lab, one.name, one.weights_gib, card.total_gib) for one in here]
        room = memory.Room(f"GPU {number} of {_name(host)}", card.total_gib, card.free_gib)
        yield from memory.too_much(here[0].lab, room, demands)


def _absent(host: Host, tenant: Tenant, number: int, have: int) -> Problem:
    names = [node.name for node in tenant.lab.nodes]
    key = f"node[{names.index(tenant.node.name)}].gpus"
    wrong = f"GPU {number}, but {_name(host)} has {have} (0 to {have - 1})"
    return Problem(tenant.lab.where(key), key, wrong, "name GPUs that it has: nvidia-smi -L")


def _name(host: Host) -> str:
    return "this machine" if host.name == "local" else host.name

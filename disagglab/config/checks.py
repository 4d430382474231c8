"""What contradicts itself in a lab file whose sections are each valid."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from disagglab.address import is_loopback
from disagglab.config import madehosts, reserved, search_checks, transports, ways_check
from disagglab.config.arms import BEST, DISAGGREGATED, OWN, SINGLE_AGAIN, kind_of
from disagglab.config.schema import (
    ControllerSection,
    GateSection,
    HostSection,
    ModelSection,
    NodeSection,
    PortsSection,
    ScaleSection,
    TransportSection,
    VllmSection,
)
from disagglab.config.workload import load_workload
from disagglab.errors import ConfigError, Problem
from disagglab.kv.layout import RULE_MEND, has_rule
from disagglab.paths import WORKLOADS
from disagglab.stats.metric import METRICS

WORKERS = 2  # servers that a routing strategy chooses between, on the lab's first nodes
PORTS_PER_SERVER = 3  # HTTP, the NIXL side channel, and HTTP of its twin without connector (--dedicated)
ROUTER_PORTS = 10  # three topologies and two dedicated ones, each with an HTTP and a metrics port
ROUTING_PORTS = 2 * WORKERS + 2  # HTTP and KV events of each worker; one router at a time


def ports_needed(nodes: int, releases: int = 1) -> int:
    """TCP ports that a run takes at most; a second release has no twins and fewer routers."""
    return PORTS_PER_SERVER * nodes + ROUTER_PORTS + ROUTING_PORTS + (releases - 1) * (2 * nodes + 4)


def contradictions(parts: dict[str, Any], file: str, unread: Collection[str] = ()) -> Iterator[Problem]:
    """What no single section shows: checked on whatever sections are valid in themselves.

    ``unread``: the lists, such as ``node``, of which an entry is not; nothing is missed that it may hold.
    """
    nodes: tuple[NodeSection, ...] = parts.get("nodes", ())
    hosts: tuple[HostSection, ...] = parts.get("hosts", ())
    if "node" not in unread:
        yield from _role_problems(nodes, file)
    yield from _node_problems(nodes, hosts, parts.get("controller"), file)
    if "host" not in unread:
        yield from _host_problems(hosts, nodes, parts.get("controller"), file)
    if not {"node", "host"} & set(unread):
        yield from madehosts.problems(hosts, nodes, parts.get("transport"), file)
    vllm: VllmSection | None = parts.get("vllm")
    yield from reserved.problems(vllm.args if vllm else {}, "vllm.args", file)
    if vllm is not None and not has_rule(vllm.version):
        wrong = (
            f"which KV blocks vLLM {vllm.version} moves is not known (BLOCK_RULE in disagglab/kv/layout.py)"
        )
        yield Problem(file, "vllm.version", wrong, RULE_MEND)
    ports: PortsSection | None = parts.get("ports")
    if ports is not None:
        have, need = ports.last - ports.first + 1, ports_needed(len(nodes))
        if have < need:
            yield Problem(
                file,
                "ports",
                f"{ports.first} to {ports.last} holds {max(have, 0)} ports, this lab needs {need}",
                f"set last to {ports.first + need - 1} or more",
            )
    transport: TransportSection | None = parts.get("transport")
    if transport is not None:
        yield from transports.problems(transport, nodes, "transport", file)
    yield from _gate_problems(parts, file, unread)
    yield from search_checks.problems(parts, file)
    known = () if "node" in unread else nodes
    yield from ways_check.problems(parts.get("ways", ()), transport, known, file)


def _side_problems(
    gate: GateSection, where: str, arms: Collection[str], whole: bool, file: str
) -> Iterator[Problem]:
    """What is wrong with candidate and baseline of a gate.

    Args:
        whole: whether ``arms`` are all of the lab's; else what is not among them may be right.
    """
    for key, name, words in (("candidate", gate.candidate, ()), ("baseline", gate.baseline, (BEST,))):
        known = (*arms, *words)
        if name is None or name in known or not whole:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean {close[0]}?" if close else f"name one of {', '.join(known)}, or add its [[way]]"
        yield Problem(file, f"{where}.{key}", f"no arm is called {name}", mend)
    if gate.candidate == gate.baseline:
        wrong = f"{gate.baseline} is the candidate itself"
        yield Problem(file, f"{where}.baseline", wrong, f'name another arm, or write "{BEST}"')
    if not METRICS[gate.metric].needs_transfer:
        return
    if kind_of(gate.candidate) != DISAGGREGATED:
        wrong = f"no KV moves in {gate.candidate}, so it has no {gate.metric}"
        yield Problem(file, f"{where}.candidate", wrong, f"remove it, or name a {DISAGGREGATED} arm")
    if gate.baseline is not None and kind_of(gate.baseline) != DISAGGREGATED:
        wrong = "no KV moves in a baseline, so there is nothing to compare with"
        yield Problem(file, f"{where}.baseline", wrong, "remove it and write limit = 0.1")


def _gate_problems(parts: dict[str, Any], file: str, unread: Collection[str] = ()) -> Iterator[Problem]:
    arms = [arm for arm in OWN if arm != SINGLE_AGAIN] + [one.arm for one in parts.get("ways", ())]
    model: ModelSection | None = parts.get("model")
    scale: ScaleSection | None = parts.get("scale")
    seen: set[tuple[str, ...]] = set()
    sharing = any(node.share_cpus or node.share_gpus for node in parts.get("nodes", ()))
    if parts.get("gates") and sharing:
        wrong = "nodes share cores or GPUs, so servers measure each other and a verdict means nothing"
        yield Problem(file, "gate", wrong, "remove the gates, or share_cpus and share_gpus from every node")
    for index, gate in enumerate(parts.get("gates", ())):
        where = f"gate[{index}]"
        known = (gate.workload, gate.figure, gate.candidate, str(gate.baseline), str(gate.limit))
        if known in seen:
            yield Problem(file, where, "the same gate twice", "remove one of the two")
        seen.add(known)
        if (gate.baseline is None) == (gate.limit is None):
            mend = 'write baseline = "replicated" (or "best"), or limit = 0.1'
            yield Problem(file, where, "wants either a baseline or a limit", mend)
        yield from _side_problems(gate, where, arms, "way" not in unread, file)
        if gate.stream and not METRICS[gate.metric].by_stream:
            wrong = f"{gate.metric} is a figure of all requests"
            yield Problem(file, f"{where}.stream", wrong, "remove it")
        if METRICS[gate.metric].needs_slo and "slo" not in parts:
            yield Problem(file, f"{where}.metric", f"{gate.metric} without [slo]", "add [slo] ttft_s, tpot_s")
        if not (WORKLOADS / f"{gate.workload}.toml").is_file():
            wrong = f"no file workloads/{gate.workload}.toml"
            yield Problem(file, f"{where}.workload", wrong, "name a workload that exists")
            continue
        try:
            full = load_workload(gate.workload)
        except ConfigError as error:
            yield from error.problems
            continue
        if gate.stream and full.steady is None:
            wrong = f"{gate.workload} has no steady requests"
            yield Problem(file, f"{where}.stream", wrong, "remove it, or name another workload")
        workload = full.scaled(**scale.model_dump()) if scale else full
        if model is not None and scale is not None and workload.tokens > model.max_model_len:
            wrong = (
                f"{gate.workload} takes {workload.tokens} tokens here, max_model_len is {model.max_model_len}"
            )
            yield Problem(file, f"{where}.workload", wrong, "lower [scale] prompt, output or steady")


def _role_problems(nodes: Sequence[NodeSection], file: str) -> Iterator[Problem]:
    for role in ("prefill", "decode"):
        if nodes and not any(node.role == role for node in nodes):
            yield Problem(
                file, "node.role", f"no node has the role {role}", f'set role = "{role}" on one node'
            )


def _node_problems(
    nodes: tuple[NodeSection, ...],
    hosts: tuple[HostSection, ...],
    controller: ControllerSection | None,
    file: str,
) -> Iterator[Problem]:
    here = {"local", *(host.name for host in hosts if host.namespace)}  # on cores of this machine
    seen: dict[str, str] = {}
    owners: dict[tuple[str, str, int], NodeSection] = {}
    for index, node in enumerate(nodes):
        key = f"node[{index}]"
        if node.args:
            wrong = "options of one node alone, with which the lab's replicas would not be equal"
            mend = "[vllm.args] for all servers, or for one role: [[way]] with prefill = { args = { … } }"
            yield Problem(file, f"{key}.args", wrong, mend)
        if node.name in seen:
            yield Problem(file, f"{key}.name", f"{node.name} is used twice", "give each node its own name")
        seen[node.name] = key
        if not node.cpus and not node.gpus:
            yield Problem(file, key, "neither cpus nor gpus", "add cpus = [0] or gpus = [0]")
        for kind, units, share in (("cpus", node.cpus, "share_cpus"), ("gpus", node.gpus, "share_gpus")):
            for unit in units:
                machine = "local" if node.host in here else node.host
                owner = owners.setdefault((machine, kind, unit), node)
                shared = getattr(owner, share) and getattr(node, share)
                if unit < 0:
                    yield Problem(file, f"{key}.{kind}", f"{unit} is negative", "count from 0")
                elif owner is not node and not shared:
                    also = f"; {share} = true on both where only the path counts"
                    yield Problem(
                        file,
                        f"{key}.{kind}",
                        f"{kind[:-1]} {unit} of {node.host} belongs to {owner.name} already",
                        f"give each node its own, or the comparison is void{also}",
                    )
    if controller is not None and controller.host == "local" and not is_loopback(controller.address):
        remote = [node for node in nodes if node.host != "local"]
        if not remote:
            yield Problem(
                file,
                "controller.address",
                f"{controller.address} with only local nodes",
                'set it to "127.0.0.1"',
            )


def _host_problems(
    hosts: tuple[HostSection, ...],
    nodes: tuple[NodeSection, ...],
    controller: ControllerSection | None,
    file: str,
) -> Iterator[Problem]:
    """Hosts that are named and not there, there twice, or reached through themselves."""
    known = [host.name for host in hosts]
    users = [(f"node[{index}].host", node.host) for index, node in enumerate(nodes)]
    users += [("controller.host", controller.host)] if controller is not None else []
    for where, name in users:
        if name != "local" and name not in known:
            close = difflib.get_close_matches(name, [*known, "local"], n=1)
            mend = f"did you mean {close[0]}?" if close else f'add [[host]] with name = "{name}"'
            yield Problem(file, where, f"no [[host]] is named {name}", mend)
    by_name = {host.name: host for host in hosts}
    for index, host in enumerate(hosts):
        where = f"host[{index}]"
        if host.name == "local":
            yield Problem(file, f"{where}.name", "local is this machine", "choose another name")
        if known.count(host.name) > 1 and known.index(host.name) != index:
            yield Problem(file, f"{where}.name", f"{host.name} is used twice", "give each its own name")
        if host.jump is not None and host.jump not in by_name:
            wrong = f"no [[host]] is named {host.jump}"
            yield Problem(file, f"{where}.jump", wrong, f'add [[host]] with name = "{host.jump}"')
        passed, hop = {host.name}, host.jump
        while hop in by_name:
            if hop in passed:
                yield Problem(file, f"{where}.jump", "leads back to the host itself", "remove one jump")
                break
            passed.add(hop)
            hop = by_name[hop].jump
    if controller is None or controller.host == "local":
        return
    if controller.host in by_name and by_name[controller.host].namespace:
        wrong = f"{controller.host} is a made host, which reaches no other host's control link"
        yield Problem(file, "controller.host", wrong, 'set it to "local"')
    if is_loopback(controller.address):
        wrong = f"{controller.address} on {controller.host} cannot be reached from here"
        yield Problem(file, "controller.address", wrong, "write an address of that host")

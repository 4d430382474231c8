"""What contradicts itself in a lab file whose sections are each valid."""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from disagglab.config import variant
from disagglab.config.schema import (
    ControllerSection,
    HostSection,
    ModelSection,
    NodeSection,
    PortsSection,
    ScaleSection,
    TransportSection,
    VariantSection,
    VllmSection,
    control_peer,
)
from disagglab.config.workload import load_workload
from disagglab.errors import ConfigError, Problem
from disagglab.kv.layout import RULE_MEND, has_rule
from disagglab.paths import WORKLOADS
from disagglab.problems import problems_of
from disagglab.stats.metric import METRICS

WORKERS = 2  # servers that a routing strategy chooses between, on the lab's first nodes
PORTS_PER_SERVER = 3  # HTTP, the NIXL side channel, and HTTP of its twin without connector (--dedicated)
ROUTER_PORTS = 10  # three topologies and two dedicated ones, each with an HTTP and a metrics port
ROUTING_PORTS = 2 * WORKERS + 2  # HTTP and KV events of each worker; one router at a time
RESERVED_ARGS = {
    "host": "the node's address",
    "port": "[ports]",
    "model": "[model] id",
    "served-model-name": "nothing: each run gives its own name, which proves whose server answers",
    "dtype": "[model] dtype",
    "max-model-len": "[model] max_model_len",
    "load-format": "[model] load_format",
    "tokenizer": "[model] tokenizer",
    "kv-transfer-config": "[transport]",
    "kv-events-config": "the suite, for servers whose router chooses by KV events",
}
LEASE_KEY = "kv_lease_duration"
SHARED_ARGS = {
    "gpu-memory-utilization": "the number of variants that share the GPU",
    "kv-cache-memory-bytes": "[memory] kv_beside_gib",
}  # beside variants


def ports_needed(nodes: int, releases: int = 1) -> int:
    """TCP ports that a run takes at most; a second release has no twins and fewer routers."""
    return PORTS_PER_SERVER * nodes + ROUTER_PORTS + ROUTING_PORTS + (releases - 1) * (2 * nodes + 4)


def contradictions(parts: dict[str, Any], file: str) -> Iterator[Problem]:
    """What no single section shows: checked on whatever sections are valid in themselves."""
    nodes: tuple[NodeSection, ...] = parts.get("nodes", ())
    hosts: tuple[HostSection, ...] = parts.get("hosts", ())
    yield from _node_problems(nodes, hosts, parts.get("controller"), file)
    yield from _host_problems(hosts, nodes, parts.get("controller"), file)
    yield from _made_host_problems(hosts, nodes, parts.get("transport"), file)
    vllm: VllmSection | None = parts.get("vllm")
    yield from _arg_problems(vllm.args if vllm else {}, "vllm.args", RESERVED_ARGS, file)
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
        yield from _transport_problems(transport, nodes, "transport", file)
    yield from _gate_problems(parts, file)
    yield from _variant_problems(parts.get("variants", ()), transport, nodes, file)


def _arg_problems(
    args: Mapping[str, Any], where: str, reserved: Mapping[str, str], file: str
) -> Iterator[Problem]:
    """Options of ``vllm serve`` that a lab file cannot give."""
    for arg in args:
        name = arg.lstrip("-").replace("_", "-")
        if arg.startswith("-"):
            wrong = "written with dashes in front"
            yield Problem(file, f"{where}.{arg}", wrong, f"write {arg.lstrip('-')} = …")
        elif name in reserved:
            mend = f"remove it; it comes from {reserved[name]}"
            yield Problem(file, f"{where}.{arg}", "set by the suite", mend)


def _transport_problems(
    transport: TransportSection, nodes: Sequence[NodeSection], where: str, file: str
) -> Iterator[Problem]:
    if transport.kv_buffer_device == "cuda" and any(not node.gpus for node in nodes):
        wrong = "cuda, but a node has no gpus"
        yield Problem(file, f"{where}.kv_buffer_device", wrong, 'set it to "cpu"')
    if transport.ucx_tls and "tcp" not in transport.ucx_tls and {"sm", "shm"} & set(transport.ucx_tls):
        mend = 'add "tcp": NIXL cannot connect without it'
        yield Problem(file, f"{where}.ucx_tls", "shared memory without tcp", mend)
    if LEASE_KEY in transport.extra:
        yield Problem(file, f"{where}.extra.{LEASE_KEY}", "has a key of its own", "write lease_s = … instead")


def _variant_problems(
    variants: Sequence[VariantSection],
    transport: TransportSection | None,
    nodes: Sequence[NodeSection],
    file: str,
) -> Iterator[Problem]:
    """What is wrong with a variant, and with the lab as it has it."""
    names = [one.name for one in variants]
    for index, one in enumerate(variants):
        where = f"variant[{index}]"
        if one.name in names[:index]:
            yield Problem(file, f"{where}.name", f"{one.name} is used twice", "give each its own name")
        if not (one.transport or one.args or one.env):
            yield Problem(file, where, "changes nothing", "add transport, args or env")
        yield from _arg_problems(one.args, f"{where}.args", {**RESERVED_ARGS, **SHARED_ARGS}, file)
        if transport is None:
            continue
        try:
            changed = variant.transport_of(transport, one)
        except ValidationError as error:
            yield from problems_of(error, file, TransportSection, f"{where}.transport")
            continue
        before = list(_transport_problems(transport, nodes, f"{where}.transport", file))
        found = _transport_problems(changed, nodes, f"{where}.transport", file)
        yield from (problem for problem in found if problem not in before)


def _gate_problems(parts: dict[str, Any], file: str) -> Iterator[Problem]:
    model: ModelSection | None = parts.get("model")
    scale: ScaleSection | None = parts.get("scale")
    seen: set[tuple[str, str, str, str]] = set()
    if parts.get("gates") and any(node.share_cpus for node in parts.get("nodes", ())):
        wrong = "nodes share cores, so servers measure each other and a verdict means nothing"
        yield Problem(file, "gate", wrong, "remove the gates, or share_cpus from every node")
    for index, gate in enumerate(parts.get("gates", ())):
        where = f"gate[{index}]"
        known = (gate.workload, gate.figure, str(gate.baseline), str(gate.limit))
        if known in seen:
            yield Problem(file, where, "the same gate twice", "remove one of the two")
        seen.add(known)
        if (gate.baseline is None) == (gate.limit is None):
            mend = 'write baseline = "replicated" (or "single"), or limit = 0.1'
            yield Problem(file, where, "wants either a baseline or a limit", mend)
        if METRICS[gate.metric].needs_transfer and gate.baseline is not None:
            wrong = "no KV moves in a baseline, so there is nothing to compare with"
            yield Problem(file, f"{where}.baseline", wrong, "remove it and write limit = 0.1")
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


def _node_problems(
    nodes: tuple[NodeSection, ...],
    hosts: tuple[HostSection, ...],
    controller: ControllerSection | None,
    file: str,
) -> Iterator[Problem]:
    here = {"local", *(host.name for host in hosts if host.namespace)}  # on cores of this machine
    for role in ("prefill", "decode"):
        if nodes and not any(node.role == role for node in nodes):
            yield Problem(
                file, "node.role", f"no node has the role {role}", f'set role = "{role}" on one node'
            )
    seen: dict[str, str] = {}
    owners: dict[tuple[str, str, int], NodeSection] = {}
    for index, node in enumerate(nodes):
        key = f"node[{index}]"
        if node.name in seen:
            yield Problem(file, f"{key}.name", f"{node.name} is used twice", "give each node its own name")
        seen[node.name] = key
        if not node.cpus and not node.gpus:
            yield Problem(file, key, "neither cpus nor gpus", "add cpus = [0] or gpus = [0]")
        for kind, units in (("cpus", node.cpus), ("gpus", node.gpus)):
            for unit in units:
                machine = "local" if node.host in here else node.host
                owner = owners.setdefault((machine, kind, unit), node)
                shared = kind == "cpus" and owner.share_cpus and node.share_cpus
                if unit < 0:
                    yield Problem(file, f"{key}.{kind}", f"{unit} is negative", "count from 0")
                elif owner is not node and not shared:
                    also = "" if kind == "gpus" else "; share_cpus = true on both where only the path counts"
                    yield Problem(
                        file,
                        f"{key}.{kind}",
                        f"{kind[:-1]} {unit} of {node.host} belongs to {owner.name} already",
                        f"give each node its own, or the comparison is void{also}",
                    )
        if node.host in here:
            have = os.cpu_count() or 1
            for cpu in (cpu for cpu in node.cpus if cpu >= have):
                yield Problem(
                    file,
                    f"{key}.cpus",
                    f"core {cpu}, but this machine has {have} (0 to {have - 1})",
                    "name a core it has",
                )
    if controller is not None and controller.host == "local" and controller.address != "127.0.0.1":
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
    if _is_loopback(controller.address):
        wrong = f"{controller.address} on {controller.host} cannot be reached from here"
        yield Problem(file, "controller.address", wrong, "write an address of that host")


def _is_loopback(address: str) -> bool:
    """Whether an address, or the name localhost, stays on its host."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _made_host_problems(
    hosts: tuple[HostSection, ...],
    nodes: tuple[NodeSection, ...],
    transport: TransportSection | None,
    file: str,
) -> Iterator[Problem]:
    """What is wrong with a lab that makes its hosts; nothing where it makes none."""
    made = [(index, host) for index, host in enumerate(hosts) if host.namespace]
    if not made:
        return
    first = f"host[{made[0][0]}]"
    on = {host.name: [i for i, node in enumerate(nodes) if node.host == host.name] for _, host in made}
    if len(made) != 2 or any(len(indexes) != 1 for indexes in on.values()):
        wrong = "two hosts with one node each can be made"
        yield Problem(file, f"{first}.namespace", wrong, "set namespace = true on two hosts, or on none")
        return
    names = {host.name for _, host in made}
    for index, node in enumerate(nodes):
        if node.host not in names:
            wrong = f"{node.host} beside made hosts"
            yield Problem(file, f"node[{index}].host", wrong, "put every node on a made host, or none")
    for index, host in made:
        for key in ("address", "port", "user", "key_file", "known_hosts", "jump"):
            if getattr(host, key) is not None:
                yield Problem(file, f"host[{index}].{key}", "given for a host that is made", "remove it")
    asked = [indexes[0] for indexes in on.values()]
    for index in asked:
        for name in ("data_address", "interface"):
            if getattr(nodes[index], name) is None:
                yield Problem(file, f"node[{index}].{name}", "missing on a made host", f"add {name} = …")
        try:
            control_peer(nodes[index])
        except ValueError as error:
            mend = "write a usable address of a /30 of its own, such as 198.18.1.2"
            yield Problem(file, f"node[{index}].address", str(error), mend)
    for name, bits, joined in (("address", 30, False), ("data_address", 24, True)):
        given = [getattr(nodes[index], name) for index in asked if getattr(nodes[index], name)]
        try:
            networks = {ipaddress.ip_network(f"{address}/{bits}", strict=False) for address in given}
        except ValueError as error:
            mend = "write an address, such as 198.18.9.1; a made host has no other names"
            yield Problem(file, f"node[{asked[0]}].{name}", str(error), mend)
            continue
        if len(given) == 2 and (len(networks) == 1) != joined:
            wrong = f"{' and '.join(given)} are {'not ' * joined}in one /{bits}"
            mend = "put them into one" if joined else "give each control link a network of its own"
            yield Problem(file, f"node[{asked[0]}].{name}", wrong, mend)
    if transport is not None and set(transport.ucx_tls or ["any"]) - {"tcp", "self"}:
        wrong = "shared memory does not join hosts"
        yield Problem(file, "transport.ucx_tls", wrong, 'set it to ["tcp", "self"]')

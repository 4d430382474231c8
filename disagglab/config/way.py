"""Ways to use a lab's nodes: what a ``[[way]]`` changes, and the lab as it then is."""

from __future__ import annotations

from collections.abc import Sequence

from disagglab.config.arms import DISAGGREGATED as DISAGGREGATED
from disagglab.config.schema import Lab, NodeSection, TransportSection
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem

SHARDED = "sharded"  # one server, tensor parallel over all nodes; the other kinds are in config/arms.py
RANKS_KEY = "tensor-parallel-size"
HOSTS_KEY, HEADLESS_KEY, PORT_KEY = "nnodes", "headless", "master-port"  # of vLLM's start on several hosts
BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"  # cores of each rank, ranks apart by "|"
GPU_SHARE = 0.9  # of a GPU's memory, for the servers of all deployments together
GIB = 2**30


def transport_of(transport: TransportSection, way: WaySection) -> TransportSection:
    """The lab's [transport] with the way's keys.

    Raises:
        ValidationError: if a key is unknown or a value is wrong.
    """
    own = transport.model_dump()
    for key, value in way.transport.items():
        own[key] = (
            {**own[key], **value} if isinstance(own.get(key), dict) and isinstance(value, dict) else value
        )
    return TransportSection.model_validate(own)


def changed(lab: Lab, way: WaySection) -> Lab:
    """The lab as the way has it; its ``args`` and ``env`` go before the lab's, those of a role before both.

    The nodes are those that it uses, in its roles; of a sharded way one, which stands for all.
    """
    vllm = lab.vllm.model_copy(
        update={"args": {**lab.vllm.args, **way.args}, "env": {**lab.vllm.env, **way.env}}
    )
    nodes = lab.nodes if way.kind == SHARDED else nodes_of(lab.nodes, way)
    found = lab.model_copy(
        update={"vllm": vllm, "transport": transport_of(lab.transport, way), "nodes": nodes}
    )
    return sharded(found) if way.kind == SHARDED else found


def nodes_of(nodes: Sequence[NodeSection], way: WaySection) -> tuple[NodeSection, ...]:
    """The nodes in the roles of a way, each with what its role has of its own; those in no role are left out
    where the way names nodes for both.
    """
    named = {name: role for role, section in way.roles.items() for name in section.nodes}
    whole = all(section.nodes for section in way.roles.values())
    found = []
    for node in nodes:
        if whole and node.name not in named:
            continue
        role = named.get(node.name, node.role)
        own = way.roles[role]
        changes = {"role": role, "args": {**node.args, **own.args}, "env": {**node.env, **own.env}}
        found.append(node.model_copy(update=changes))
    return tuple(found)


def ranks_on(nodes: Sequence[NodeSection]) -> int:
    """Ranks of one server over these nodes: one a GPU, or one a node without GPU."""
    return sum(len(node.gpus) or 1 for node in nodes)


def sharded(lab: Lab) -> Lab:
    """The lab with one node a host, in place of its nodes there: their cores or GPUs are the ranks of one
    server. On several hosts vLLM's own multi-node start joins them; the first has the HTTP server.
    """
    hosts = lab.host_names_of_nodes
    merged = [_merged(lab.nodes_on(host), number, len(hosts)) for number, host in enumerate(hosts)]
    leader = merged[0].kv_address
    if len(hosts) > 1:
        merged = [
            node.model_copy(update={"args": {**node.args, **_joined(leader, number, len(hosts))}})
            for number, node in enumerate(merged)
        ]
    args = {**lab.vllm.args, RANKS_KEY: ranks_on(lab.nodes)}
    vllm = lab.vllm.model_copy(update={"args": args})
    return lab.model_copy(update={"vllm": vllm, "nodes": tuple(merged)})


def _joined(leader: str, number: int, hosts: int) -> dict[str, str | int | bool]:
    """Options of vLLM's multi-node start on one host; the port of ``leader`` is allocated at the start."""
    found: dict[str, str | int | bool] = {
        HOSTS_KEY: hosts,
        "node-rank": number,
        "master-addr": leader,
        "distributed-executor-backend": "mp",
    }
    return found | ({HEADLESS_KEY: True} if number else {})


def _merged(nodes: Sequence[NodeSection], number: int, hosts: int) -> NodeSection:
    first = nodes[0]
    bound = {BIND_VARIABLE: "|".join(",".join(map(str, node.cpus)) for node in nodes)}
    env = {} if any(node.gpus for node in nodes) else bound
    if hosts > 1:
        env["VLLM_HOST_IP"] = first.kv_address
        if first.interface:
            env |= {"GLOO_SOCKET_IFNAME": first.interface, "NCCL_SOCKET_IFNAME": first.interface}
    return first.model_copy(
        update={
            "name": "-".join(node.name for node in nodes),
            "role": "decode" if number else "prefill",
            "cpus": [core for node in nodes for core in node.cpus],
            "gpus": [gpu for node in nodes for gpu in node.gpus],
            "env": {**env, **{key: value for node in nodes for key, value in node.env.items()}},
        }
    )


def bound(cores: Sequence[int], ranks: int) -> str:
    """Cores of each rank of a server, as vLLM wants them: ``0,1|2,3``. All of them where they cannot be
    divided evenly; vLLM says then what it misses.
    """
    share = len(cores) // ranks
    if share * ranks != len(cores):
        return ",".join(map(str, cores))
    parts = [cores[share * rank : share * (rank + 1)] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def ranks(lab: Lab) -> int:
    """Ranks of each server of a lab."""
    return int(lab.vllm.args.get(RANKS_KEY, 1))


def tag(way: WaySection) -> str:
    """What tells the processes of a way from those of others: ``@NAME`` of a disaggregated one."""
    kind = "" if way.kind == DISAGGREGATED else way.kind
    return f"@{'-'.join(filter(None, (kind, way.name)))}"


def start_key(lab: Lab, way: WaySection | None) -> str:
    """Equal for ways that can be played by the same servers: the command lines would be the same."""
    found = changed(lab, way) if way else lab
    kind = SHARDED if way and way.kind == SHARDED else ""
    parts = (found.vllm.model_dump_json(), found.transport.model_dump_json())
    return "\n".join([kind, *parts, *(node.model_dump_json() for node in found.nodes)])


def starts(lab: Lab, ways: Sequence[WaySection]) -> int:
    """How many deployments beside the lab's own play these ways."""
    return len({start_key(lab, one) for one in ways} - {start_key(lab, None)})


def chosen(lab: Lab, names: Sequence[str]) -> tuple[WaySection, ...]:
    """The ways of these names, in the order asked for: ``KIND@NAME``, or ``NAME`` for all kinds of it.

    Raises:
        ConfigError: if the lab file has none of that name, or the same is asked for twice.
    """
    problems = []
    found: dict[str, WaySection] = {}
    for name in names:
        here = [way for way in lab.ways if name in (way.arm, way.name)]
        if not here:
            known = ", ".join(dict.fromkeys(way.name or way.arm for way in lab.ways))
            mend = f"use one of {known}" if known else "add [[way]] sections to the lab file"
            problems.append(Problem(lab.file, f"--way {name}", "no such [[way]]", mend))
        for way in here:
            if way.arm in found:
                problems.append(Problem(lab.file, f"--way {name}", "asked for twice", "name it once"))
            found[way.arm] = way
    if problems:
        raise ConfigError(problems)
    return tuple(found.values())


def beside(lab: Lab, count: int) -> Lab:
    """The lab with servers so small that those of ``count`` ways fit beside them on the same GPUs.

    vLLM is given the size of its KV cache rather than a share of the GPU's memory, because servers that start
    at the same moment on one GPU disturb each other's measurement of what is free.

    Raises:
        ConfigError: if the lab has GPUs and does not say how large the caches are.
    """
    if not count or not any(node.gpus for node in lab.nodes):
        return lab
    if lab.memory.kv_beside_gib is None:
        wrong = "missing, and ways share the GPUs' memory"
        mend = "add kv_beside_gib = 8.0, say"
        raise ConfigError([Problem(lab.where("memory"), "memory.kv_beside_gib", wrong, mend)])
    room = {
        "gpu-memory-utilization": round(GPU_SHARE / (count + 1), 3),
        "kv-cache-memory-bytes": round(lab.memory.kv_beside_gib * GIB),
    }
    return lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"args": {**lab.vllm.args, **room}})})

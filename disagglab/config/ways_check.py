"""What is wrong with a ``[[way]]``, and with the lab as it has it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from disagglab.config import reserved, transports, way
from disagglab.config.arms import AGAIN, DISAGGREGATED, KINDS
from disagglab.config.schema import NodeSection, TransportSection
from disagglab.config.way_section import WaySection
from disagglab.errors import Problem
from disagglab.problems import problems_of


def problems(
    ways: Sequence[WaySection],
    transport: TransportSection | None,
    nodes: Sequence[NodeSection],
    file: str,
) -> Iterator[Problem]:
    """Everything that is wrong with the ways of a lab.

    Args:
        transport: the lab's; None where that is not valid itself.
        nodes: the lab's; none where one of them is not valid itself.
    """
    arms = [one.arm for one in ways]
    for index, one in enumerate(ways):
        where = f"way[{index}]"
        if one.arm in arms[:index]:
            yield Problem(file, f"{where}.name", f"{one.arm} is used twice", "give each a name of its own")
        if not one.name and one.kind != way.SHARDED:
            wrong = f"missing, and {one.kind} is the lab's own settings"
            yield Problem(file, f"{where}.name", wrong, 'add name = "chunk-128", say')
        if one.name in KINDS or one.name.endswith(AGAIN):
            other = (
                "of a kind of way" if one.name in KINDS else f"of the twin of {one.arm.removesuffix(AGAIN)}"
            )
            yield Problem(file, f"{where}.name", f"{one.name} is the name {other}", "choose another name")
        empty = all(section.empty for section in one.roles.values())
        if empty and not (one.transport or one.args or one.env) and one.kind != way.SHARDED:
            yield Problem(file, where, "changes nothing", "add transport, args, env, prefill or decode")
        own = {way.RANKS_KEY: "the number of nodes, or of their GPUs"} if one.kind == way.SHARDED else {}
        yield from reserved.problems(one.args, f"{where}.args", file, {**reserved.BESIDE_ARGS, **own})
        if one.kind == DISAGGREGATED:
            yield from _roles(one, where, nodes, file)
            yield from _transport(one, where, transport, nodes, file)
        else:
            yield from _without_roles(one, where, file)
        if one.kind == way.SHARDED:
            yield from _sharded(where, nodes, file)


def _without_roles(one: WaySection, where: str, file: str) -> Iterator[Problem]:
    """A kind that moves no KV and has no roles."""
    given = {"transport": bool(one.transport), **{role: not part.empty for role, part in one.roles.items()}}
    for key in (key for key, has in given.items() if has):
        wrong = f"of a {one.kind} way, which has no roles and moves no KV"
        yield Problem(file, f"{where}.{key}", wrong, f'remove it, or write kind = "{DISAGGREGATED}"')


def _roles(one: WaySection, where: str, nodes: Sequence[NodeSection], file: str) -> Iterator[Problem]:
    """What its roles name and set."""
    names = [node.name for node in nodes]
    for role, section in one.roles.items():
        key = f"{where}.{role}"
        equal = dict.fromkeys(reserved.ROLE_ARGS, f"{where}.args: both roles have to agree on it")
        yield from reserved.problems(section.args, f"{key}.args", file, {**reserved.BESIDE_ARGS, **equal})
        for name in dict.fromkeys(section.nodes) if names else ():
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                mend = f"did you mean {close[0]}?" if close else f"name one of {', '.join(names)}"
                yield Problem(file, f"{key}.nodes", f"no [[node]] is named {name}", mend)
            elif section.nodes.count(name) > 1:
                yield Problem(file, f"{key}.nodes", f"{name} twice", "name it once")
    both = set(one.prefill.nodes) & set(one.decode.nodes)
    for name in sorted(both):
        yield Problem(file, f"{where}.decode.nodes", f"{name} prefills already", "give each node one role")
    if both or not nodes:
        return
    left = {node.role for node in way.nodes_of(nodes, one)}
    for role in one.roles:
        if role not in left:
            mend = f'leave a node to it: {role} = {{ nodes = ["{names[0]}"] }}'
            yield Problem(file, f"{where}.{role}", f"no node is left to {role}", mend)


def _transport(
    one: WaySection,
    where: str,
    transport: TransportSection | None,
    nodes: Sequence[NodeSection],
    file: str,
) -> Iterator[Problem]:
    if transport is None:
        return
    try:
        changed = way.transport_of(transport, one)
    except ValidationError as error:
        yield from problems_of(error, file, TransportSection, f"{where}.transport")
        return
    before = list(transports.problems(transport, nodes, f"{where}.transport", file))
    found = transports.problems(changed, nodes, f"{where}.transport", file)
    yield from (problem for problem in found if problem not in before)


def _sharded(where: str, nodes: Sequence[NodeSection], file: str) -> Iterator[Problem]:
    """Whether one server can lie on all nodes."""
    if nodes and way.ranks_on(nodes) < 2:
        wrong = "sharded over one rank, which is a single server"
        yield Problem(file, f"{where}.kind", wrong, "add a [[node]], or gpus to it")
    if len({bool(node.gpus) for node in nodes}) > 1:
        wrong = "sharded over nodes of which some have GPUs and others none"
        yield Problem(file, f"{where}.kind", wrong, "a server's ranks are all on GPUs, or all on cores")
    if len({len(node.gpus) for node in nodes}) > 1:
        wrong = "sharded over nodes with different numbers of GPUs"
        yield Problem(file, f"{where}.kind", wrong, "give each node as many gpus")
    hosts = dict.fromkeys(node.host for node in nodes)
    on_each = {host: way.ranks_on([node for node in nodes if node.host == host]) for host in hosts}
    if len(set(on_each.values())) > 1:  # vLLM divides the ranks by the number of hosts
        told = ", ".join(f"{count} on {host}" for host, count in on_each.items())
        wrong = f"sharded over hosts with different numbers of ranks: {told}"
        yield Problem(file, f"{where}.kind", wrong, "give each host as many nodes, or gpus")

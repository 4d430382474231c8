"""What a lab file asks of its hosts and they have not: found when they are open, before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from disagglab.config.schema import Lab
from disagglab.errors import Problem


def missing_cores(lab: Lab, cores: Mapping[str, Collection[int]]) -> Iterator[Problem]:
    """Cores of nodes and controller that their hosts do not let us use.

    Args:
        cores: those that this account may use, by host; a host that is not in it is not looked at.
    """
    asked = [(f"node[{number}].cpus", node.host, node.cpus) for number, node in enumerate(lab.nodes)]
    asked.append(("controller.cpus", lab.controller.host, lab.controller.cpus))
    for key, host, wanted in asked:
        if host in cores:
            yield from _missing(lab, key, wanted, host, cores[host])


def missing_cores_to_make_hosts(lab: Lab, here: Collection[int]) -> Iterator[Problem]:
    """Cores of hosts that are made here, and of their nodes, that this machine does not let us use.

    ``here``: those that this account may use.
    """
    made = {host.name: number for number, host in enumerate(lab.hosts) if host.namespace}
    for number in made.values():
        yield from _missing(lab, f"host[{number}].cpus", lab.hosts[number].cpus, "this machine", here)
    for number, node in enumerate(lab.nodes):
        if node.host in made:
            yield from _missing(lab, f"node[{number}].cpus", node.cpus, "this machine", here)


def _missing(
    lab: Lab, key: str, wanted: Sequence[int], host: str, cores: Collection[int]
) -> Iterator[Problem]:
    absent = [core for core in wanted if core not in cores]
    if absent:
        name = "this machine" if host == "local" else host
        wrong = f"core {', '.join(map(str, absent))}, but {name} lets us use {ranges(cores)}"
        mend = "name cores of those; on the host: nproc, and taskset -p $$"
        yield Problem(lab.where(key), key, wrong, mend)


def ranges(numbers: Collection[int]) -> str:
    """``0-3, 7`` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"

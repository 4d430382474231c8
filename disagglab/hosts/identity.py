"""What of a survey tells one lab from another: hardware, drivers, packages and data links of every node.

Left out is what differs between two sessions on one lab: names and addresses, memory that is free, clock and
PCIe speeds of the moment (a card at rest lowers them), GIDs, words of tools. A link's nominal rate is in,
what was measured on it is not. Memory counts in whole GiB, because the kernel keeps a varying part of it.
The kernel counts with its patch level, as a package does: network and scheduling change with it. Which cores
and GPUs a node takes is asked by the lab file, which is compared by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from disagglab.config.schema import Lab, NodeSection
from disagglab.hosts.facts import PACKAGES, UCX, title_of

OF_A_HOST = ("memory", "kernel", "python", *PACKAGES, UCX, "GPUDirect RDMA")
OF_A_CPU = ("CPU", "architecture", "cores of the machine", "instruction sets")
OF_A_LINK = ("interface", "MTU", "speed")
OF_A_GPU = ("name", "memory", "driver")
OF_RDMA = ("", " rate", " interface")  # after a device's name: state, link layer and firmware; rate; MTU

Survey = Mapping[str, Mapping[str, str]]


def of(lab: Lab, survey: Survey) -> dict[str, dict[str, str]]:
    """The identity of a lab, by the titles of :meth:`.hosts.Hosts.survey`.

    Raises:
        LookupError: if the survey has not seen a node.
    """
    found = {
        title: {key: _steady(key, facts[key]) for key in OF_A_HOST if key in facts}
        for title, facts in survey.items()
        if title.startswith("host ")
    }
    for node in lab.nodes:
        title = title_of(node)
        if title not in survey:
            raise LookupError(f"{title} was not surveyed; there is: {', '.join(survey)}")
        facts = survey[title]
        found[title] = {
            **{key: facts[key] for key in (*OF_A_CPU, *OF_A_LINK) if key in facts},
            **dict(_devices(node, facts)),
        }
    return found


def _devices(node: NodeSection, facts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """RDMA devices; GPUs by their place in the node, because a card in another slot is no other card."""
    for place, number in enumerate(node.gpus):
        for key in OF_A_GPU:
            yield f"GPU {place} of the node, {key}", facts.get(f"GPU {number} {key}", "not seen")
    for name in node.rdma:
        for key in OF_RDMA:
            if f"{name}{key}" in facts:
                yield f"{name}{key}", facts[f"{name}{key}"]


def _steady(key: str, value: str) -> str:
    """A fact of a host without the part of it that swings."""
    if key == "memory":
        return f"{round(float(value.partition(' ')[0]))} GiB"
    return value.partition(":")[0] if key == "GPUDirect RDMA" else value

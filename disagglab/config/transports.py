"""What cannot be in the settings of KV transfers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from disagglab.config.schema import NodeSection, TransportSection
from disagglab.errors import Problem

LEASE_KEY = "kv_lease_duration"


def problems(
    transport: TransportSection, nodes: Sequence[NodeSection], where: str, file: str
) -> Iterator[Problem]:
    """What contradicts itself in [transport], or in the one of a way.

    Args:
        where: the key of the table.
    """
    if transport.kv_buffer_device == "cuda" and any(not node.gpus for node in nodes):
        wrong = "cuda, but a node has no gpus"
        yield Problem(file, f"{where}.kv_buffer_device", wrong, 'set it to "cpu"')
    if transport.ucx_tls and "tcp" not in transport.ucx_tls and {"sm", "shm"} & set(transport.ucx_tls):
        mend = 'add "tcp": NIXL cannot connect without it'
        yield Problem(file, f"{where}.ucx_tls", "shared memory without tcp", mend)
    if LEASE_KEY in transport.extra:
        yield Problem(file, f"{where}.extra.{LEASE_KEY}", "has a key of its own", "write lease_s = … instead")

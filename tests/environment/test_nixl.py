"""NIXL can move memory between two processes of this lab, with the settings that the servers will use.

The oracle is the content: every byte of a random pattern has to arrive. The speed is recorded as the budget
that KV transfers are later read against; it has no expectation.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagglab.config.schema import Lab
from disagglab.hosts.hosts import Hosts
from disagglab.measure.oracles import nixlprobe
from disagglab.results.recorder import Recorder

SIZES = (2**20, 2**24, 2**26)  # bytes: from below one KV block of the embedded lab to twenty-three
REPEATS = 5
LIMIT_S = 180.0


@pytest.mark.parametrize("size", SIZES)
def test_a_buffer_arrives_intact(
    hosts: Hosts, lab: Lab, record: Recorder, timing: Callable[..., None], size: int
) -> None:
    """NIXL registers host memory in two processes and reads one from the other, byte for byte.

    RDMA in one picture: one side says where its memory is, the other side's network card (here: UCX over the
    lab's transports) fetches it; no message with the data in it is ever sent by the owner.
    """
    read = nixlprobe.Read(size)
    (result,), command = nixlprobe.between_nodes(hosts, lab, f"nixlprobe-{size}", [read], REPEATS, LIMIT_S)
    assert result["equal"], f"{size} bytes were read, and differ from what the other process holds"
    record.numbers(
        f"NIXL read of {size / 2**20:.0f} MiB between two processes",
        [size / seconds / 1e9 for seconds in result["seconds"]],
        "GB/s",
        what="reads",
        command=command,
    )
    timing(result["seconds"], bytes=size)

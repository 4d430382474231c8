"""The wire's ledger on made-up counters: enough is enough, too little and too much are caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.schema import NodeSection
from disagglab.errors import InvalidRun, TransferError
from disagglab.hosts import facts, link_counters
from disagglab.hosts.link_counters import Wire

BEFORE = Wire("b", "/proc/net/dev", received=1_000, sent=50, mtu=1500)
KV_BYTES = 2_949_120
DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls
    lo:       0       0    0    0    0     0          0         0        7       0    0    0    0     0
 data0: 4711000      10    0    0    0     0          0         0     8150       9    0    0    0     0
"""


def node(**changes: Any) -> NodeSection:
    """A decode node."""
    return NodeSection(name="b", address="198.18.2.2", role="decode", cpus=[1], **changes)


def carried(count: int) -> Wire:
    """A later reading."""
    return replace(BEFORE, received=BEFORE.received + count)


class Host:
    """As much of a host as a wire is read from."""

    facts = SimpleNamespace()

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def read_text(self, path: str) -> str:
        """A made-up file."""
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]


@pytest.mark.parametrize("count", [KV_BYTES, KV_BYTES * 101 // 100, link_counters.most(KV_BYTES, 1, 1500)])
def test_connector_bytes_and_headers_are_believed(count: int) -> None:
    """From the connector's bytes to those with all headers."""
    assert link_counters.prove(BEFORE, carried(count), KV_BYTES, 1) == count


@pytest.mark.parametrize("count", [0, KV_BYTES - 1, link_counters.most(KV_BYTES, 1, 1500) + 1])
def test_too_little_and_too_much_are_caught(count: int) -> None:
    """A byte less than the connector says, or a byte more than headers explain."""
    with pytest.raises(TransferError, match="the wire carried"):
        link_counters.prove(BEFORE, carried(count), KV_BYTES, 1)


def test_overhead_is_that_of_the_headers() -> None:
    """66 B of headers beside 1,448 B of data in a frame of 1,500, 1 % for UCX, and 64 KiB a request."""
    assert link_counters.most(1_448_000, 2, 1500) == 1_448_000 + 66_000 + 14_480 + 2 * 65_536
    assert link_counters.most(KV_BYTES, 1, 9000) < link_counters.most(KV_BYTES, 1, 1500)


def test_a_counter_that_fell_makes_the_run_invalid() -> None:
    """A reset counter, or another interface, is no ledger."""
    with pytest.raises(InvalidRun, match="fell by 1 B"):
        link_counters.received(BEFORE, carried(-1))
    with pytest.raises(InvalidRun, match="read from"):
        link_counters.received(BEFORE, replace(carried(1), source="/proc/1/net/dev"))


def test_the_interface_is_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receive bytes are the first column, transmit bytes the ninth; the MTU is the interface's."""
    monkeypatch.setattr(facts, "network", lambda *_: {"MTU": "1500"})
    host: Any = Host({"/proc/net/dev": DEV})
    assert link_counters.read(host, node(interface="data0")) == Wire(
        "b", "/proc/net/dev", 4_711_000, 8_150, 1500
    )
    with pytest.raises(InvalidRun, match="no interface eth9"):
        link_counters.read(host, node(interface="eth9"))


def test_rdma_counters_are_words_of_four_bytes() -> None:
    """All named devices are added up; one without counters is an error that names it."""
    base = "/sys/class/infiniband/{}/ports/1/counters/port_{}_data"
    files = {base.format(d, side): "25\n" for d in ("mlx5_0", "mlx5_1") for side in ("rcv", "xmit")}
    host: Any = Host(files)
    found = link_counters.read(host, node(rdma=["mlx5_0", "mlx5_1"], interface="data0"))
    assert found is not None
    assert (found.received, found.sent) == (200, 200)
    with pytest.raises(InvalidRun, match="mlx5_9"):
        link_counters.read(host, node(rdma=["mlx5_9"]))


def test_a_node_without_a_named_link_has_no_wire() -> None:
    """Neither interface nor RDMA device: there is nothing to read, and nothing is made up."""
    host: Any = Host({})
    assert link_counters.read(host, node()) is None
    assert Path("/proc/net/dev").is_file(), "the file that is read exists on Linux"

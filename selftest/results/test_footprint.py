"""What ways occupy, on nodes with one, two and no GPUs."""

from __future__ import annotations

from disagglab.config.schema import NodeSection
from disagglab.results.footprint import Footprint


def node(name: str, *gpus: int, host: str = "local") -> NodeSection:
    return NodeSection(name=name, host=host, address="127.0.0.1", role="prefill", gpus=list(gpus))


A, B, C = node("a", 0), node("b", 1), node("c", 2, 3)


def test_every_server_does_both() -> None:
    assert Footprint.of([A, B]) == Footprint(2, 2, 2, 2, ("a", "b"), ("a", "b"))
    assert not Footprint.of([A, B]).apart


def test_roles_of_unequal_size() -> None:
    """One GPU prefills, three decode."""
    found = Footprint.of_roles([A], [B, C])
    assert (found.nodes, found.gpus, found.prefill_gpus, found.decode_gpus) == (3, 4, 1, 3)
    assert found.apart


def test_a_gpu_counts_once() -> None:
    """Two nodes that share it; the same number on another host is another."""
    shared, elsewhere = node("s", 0), node("e", 0, host="far")
    assert Footprint.of([A, shared]).gpus == 1
    assert Footprint.of([A, elsewhere]).gpus == 2


def test_cpus_have_no_gpus() -> None:
    assert Footprint.of([node("a"), node("b")]) == Footprint(2, 0, 0, 0, ("a", "b"), ("a", "b"))

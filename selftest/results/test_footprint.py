"""What ways occupy, on nodes with one, two and no GPUs."""

from __future__ import annotations

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.schema import NodeSection
from disagglab.config.way_section import RoleSection, WaySection
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


ONE_TO_TWO = load_lab("one-to-two")  # one node prefills, two decode
FOUR = load_lab("four-h200-2p2d")


@pytest.mark.parametrize(
    ("kind", "nodes", "prefill", "decode"),
    [("single", 1, 1, 1), ("replicated", 3, 3, 3), ("disaggregated", 3, 1, 2)],
)
def test_kinds_of_a_lab(kind: str, nodes: int, prefill: int, decode: int) -> None:
    found = Footprint.of_way(ONE_TO_TWO, kind)
    assert (found.nodes, len(found.prefill), len(found.decode)) == (nodes, prefill, decode)


def test_gpus_of_a_lab() -> None:
    """Four nodes of one GPU; one server over all of them is one name and occupies four nodes."""
    apart, sharded = (Footprint.of_way(FOUR, kind) for kind in ("disaggregated", "sharded"))
    assert (apart.gpus, apart.prefill_gpus, apart.decode_gpus) == (4, 2, 2)
    assert (sharded.nodes, sharded.gpus, sharded.decode_gpus, len(sharded.decode)) == (4, 4, 4, 1)
    assert not sharded.apart


def test_a_way_with_roles_of_its_own() -> None:
    """Two of the four nodes, one each."""
    first, *_, last = (node.name for node in FOUR.nodes)
    own = WaySection(
        name="pair",
        what="two nodes",
        expects="half",
        prefill=RoleSection(nodes=[first]),
        decode=RoleSection(nodes=[last]),
    )
    found = Footprint.of_way(FOUR, own)
    assert found == Footprint(2, 2, 1, 1, (first,), (last,))

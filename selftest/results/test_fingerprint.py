"""Fingerprints: of this machine, then of the lab; an incomplete one is equal to no other.

Oracle: fingerprints that differ in one fact of a host.
"""

from __future__ import annotations

from disagglab.results import fingerprint

MACHINE = fingerprint.of_machine("0.31.0")
NODE = {"node a (prefill)": {"GPU 0 of the node, name": "H100"}}


def test_the_key_is_over_the_whole_lab() -> None:
    """A GPU, and nothing of this machine, makes another key; the same lab makes the same."""
    found = fingerprint.of_lab(MACHINE, NODE)
    other = fingerprint.of_lab(MACHINE, {"node a (prefill)": {"GPU 0 of the node, name": "H200"}})
    assert fingerprint.of_lab(MACHINE, NODE) == found
    assert len({found["key"], other["key"], MACHINE["key"]}) == 3
    assert fingerprint.machine_of(found) == fingerprint.machine_of(MACHINE)
    assert fingerprint.of_lab(found, NODE) == found


def test_a_fingerprint_without_its_lab_is_incomplete() -> None:
    """What was made before hosts were reached, or by an earlier version, says so beside its key."""
    assert not fingerprint.complete(MACHINE)
    assert fingerprint.label(MACHINE) == f"{MACHINE['key']} (incomplete)"
    found = fingerprint.of_lab(MACHINE, NODE)
    assert fingerprint.complete(found)
    assert fingerprint.label(found) == found["key"]
    assert not fingerprint.complete(fingerprint.of_lab(MACHINE, {}))

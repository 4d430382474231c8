"""What a lab file asks of its hosts and they have not, named by file and key.

The oracle: labs and hosts that are written here.
"""

from __future__ import annotations

import pytest

from disagglab.config.labs import load_lab
from disagglab.hosts import preflight


def test_each_node_is_asked_of_its_own_host() -> None:
    """A core that one host has may be missing on another; who was not asked is left out."""
    lab = load_lab("two-hosts").model_copy(update={"controller": load_lab("embedded").controller})
    assert not list(preflight.missing_cores(lab, {"alpha": {0}, "beta": {0, 1}, "local": set()}))
    (problem,) = preflight.missing_cores(lab, {"alpha": {0}, "beta": {0, 2, 3}})
    assert (problem.key, problem.file) == ("node[1].cpus", lab.file)
    assert problem.wrong == "core 1, but beta lets us use 0, 2-3"
    assert not list(preflight.missing_cores(lab, {"alpha": {0}}))


def test_the_controllers_cores_are_asked_for() -> None:
    """Routers and load engine are bound as servers are."""
    lab = load_lab("embedded")
    bound = lab.model_copy(update={"controller": lab.controller.model_copy(update={"cpus": [2, 3]})})
    (problem,) = preflight.missing_cores(bound, {"local": {0, 1, 2}})
    assert (problem.key, problem.wrong) == ("controller.cpus", "core 3, but this machine lets us use 0-2")


def test_the_file_that_gives_the_cores_is_named() -> None:
    """Of a lab that extends another, the one whose key it is."""
    lab = load_lab("embedded-stock")
    (problem,) = preflight.missing_cores(lab, {"local": {0}})
    assert problem.file.endswith("embedded.toml")


def test_hosts_are_made_of_cores_that_are_here() -> None:
    """A made host's cores and its node's, before the host is made; other nodes are not asked about here."""
    lab = load_lab("two-hosts")
    found = list(preflight.missing_cores_to_make_hosts(lab, {0}))
    assert [problem.key for problem in found] == ["host[1].cpus", "node[1].cpus"]
    assert not list(preflight.missing_cores_to_make_hosts(load_lab("embedded"), set()))


@pytest.mark.parametrize(
    ("numbers", "text"), [((), "none"), ((3,), "3"), ((0, 1, 2, 3, 7), "0-3, 7"), ((5, 1, 0), "0-1, 5")]
)
def test_numbers_are_shown_as_ranges(numbers: tuple[int, ...], text: str) -> None:
    """As one would type them."""
    assert preflight.ranges(numbers) == text

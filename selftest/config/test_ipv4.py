"""What runs over IPv4 alone is refused for exactly the addresses that are IPv6."""

from __future__ import annotations

import pytest

from disagglab.config import ipv4
from disagglab.config.labs import load_lab
from disagglab.errors import ConfigError

LAB = load_lab("embedded-ipv6")


def test_the_address_is_named_with_file_key_and_mend() -> None:
    """Those of the nodes that take part, and the controller's if it does."""
    with pytest.raises(ConfigError) as caught:
        ipv4.require(LAB, LAB.nodes[1:], ipv4.KV_EVENTS)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (LAB.file, "node[1].address")
    assert problem.wrong == "::1 is IPv6, and vLLM publishes KV events over IPv4 alone"
    assert problem.mend.startswith("write an IPv4 address")
    found = ipv4.problems(LAB, LAB.nodes, ipv4.DYNAMO, controller=True)
    assert [each.key for each in found] == ["node[0].address", "node[1].address", "controller.address"]


def test_a_lab_on_ipv4_is_not_in_the_way() -> None:
    """Nor is a controller that does not take part."""
    lab = load_lab("embedded")
    assert not list(ipv4.problems(lab, lab.nodes, ipv4.DYNAMO, controller=True))
    mixed = lab.model_copy(update={"controller": LAB.controller})
    assert not list(ipv4.problems(mixed, mixed.nodes, ipv4.KV_EVENTS))

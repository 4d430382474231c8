"""Preconditions: what a test may want of the lab file, and the skip reason where the file has not got it.

Data, so that a session knows before anything starts which tests have no meaning with its lab. A test names
them in its marker, ``@pytest.mark.lab_has("real_weights")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from disagglab.config import ipv4
from disagglab.config.schema import Lab
from disagglab.variables import CPU_KV_SPACE_VARIABLE


@dataclass(frozen=True)
class Precondition:
    """``met``: whether a lab has it; ``code`` and ``lacking``: the skip reason where it has not."""

    code: str
    met: Callable[[Lab], bool]
    lacking: str

    @property
    def reason(self) -> str:
        """The skip reason, ``CODE: sentence``."""
        return f"{self.code}: {self.lacking}"


PRECONDITIONS = {
    "real_weights": Precondition(
        "RANDOM-WEIGHTS",
        lambda lab: lab.model.load_format != "dummy",
        'load_format = "dummy": answers of random weights are near ties or all the same, so none tells of its'
        " prompt",
    ),
    "own_cores": Precondition(
        "SHARED-CPUS",
        lambda lab: not lab.shared,
        "servers share cores or GPUs (share_cpus, share_gpus), so no time of one tells of several at once",
    ),
    "gates": Precondition(
        "NO-GATES",
        lambda lab: bool(lab.gates),
        "the lab file has no [[gate]], so there is nothing to compare",
    ),
    "slo": Precondition(
        "NO-SLO",
        lambda lab: lab.slo is not None,
        "the lab file has no [slo], so no request can be called good",
    ),
    "tuning": Precondition(
        "NO-TUNING",
        lambda lab: lab.tuning is not None,
        "the lab file has no [tuning], so no settings are searched; try --lab embedded-ways",
    ),
    "speed": Precondition(
        "NO-SPEED",
        lambda lab: lab.speed is not None,
        "the lab file has no [speed], so there is nothing to predict from",
    ),
    "link_rate": Precondition(
        "NO-LINK-RATE",
        lambda lab: lab.transport.link_gbit_s is not None,
        "the lab file gives no link_gbit_s, so the time of a transfer cannot be predicted",
    ),
    "link": Precondition(
        "NO-LINK",
        lambda lab: lab.prefill[0].kv_address != lab.decode[0].kv_address,
        "prefill and decode node have one data address; nothing lies between them",
    ),
    "own_link": Precondition(
        "NO-SHAPING",
        lambda lab: any(host.namespace for host in lab.hosts),
        "the link of this lab is not ours to reshape; see --lab two-hosts",
    ),
    "wire": Precondition(
        "NO-WIRE",
        lambda lab: all(node.interface or node.rdma for node in lab.decode),
        "the lab file names no interface and no rdma device; KV stays in this machine",
    ),
    "rdma": Precondition(
        "NO-RDMA",
        lambda lab: any(node.rdma for node in lab.nodes),
        "no node of this lab has an RDMA device",
    ),
    "rail": Precondition(
        "NO-RAIL",
        lambda lab: (
            bool(lab.prefill[0].rdma and lab.decode[0].rdma) and lab.prefill[0].host != lab.decode[0].host
        ),
        "prefill and decode node are not joined by RDMA devices of two hosts",
    ),
    "gpus": Precondition(
        "NO-GPU", lambda lab: any(node.gpus for node in lab.nodes), "no node of this lab has a GPU"
    ),
    "fixed_budget": Precondition(
        "NO-FIXED-BUDGET",
        lambda lab: CPU_KV_SPACE_VARIABLE in {**lab.vllm.env, **lab.prefill[0].env},
        "this lab leaves the KV memory budget to a profiling run of vLLM",
    ),
    "trace": Precondition(
        "TRACE", lambda lab: lab.transport.trace, "asked for with trace = true in [transport]"
    ),
    "two_prefill": Precondition(
        "ONE-PREFILL", lambda lab: len(lab.prefill) > 1, "nothing to choose between; try --lab two-to-one"
    ),
    "ipv4": Precondition(
        "IPV6",
        lambda lab: not any(ipv4.problems(lab, lab.nodes, ipv4.KV_EVENTS, controller=True)),
        f"an address of the lab is IPv6, and {ipv4.KV_EVENTS}",
    ),
    "one_host": Precondition(
        "ONE-HOST",
        lambda lab: lab.host_names == ("local",),
        "Dynamo runs on this machine alone, and this lab has other hosts",
    ),
}


def skip_reason(lab: Lab, names: Iterable[str]) -> str | None:
    """Why a test that wants these preconditions is skipped on a lab: the first that is not met; None if all
    are.

    Raises:
        KeyError: if there is no such precondition.
    """
    return next((PRECONDITIONS[name].reason for name in names if not PRECONDITIONS[name].met(lab)), None)

"""What contradicts itself in the settings of KV transfers, of a lab or of a way."""

from __future__ import annotations

from typing import Any

import pytest

from disagglab.config import transports
from disagglab.config.labs import load_lab

CPU, GPU = (load_lab(name) for name in ("embedded", "two-h200"))


def problems(lab: Any, **changes: Any) -> list[tuple[str, str]]:
    """Key and mend of what is wrong with the transport of a lab, changed."""
    changed = lab.transport.model_copy(update=changes)
    found = transports.problems(changed, lab.nodes, "way[2].transport", "lab.toml")
    return [(problem.key, problem.mend) for problem in found]


@pytest.mark.parametrize("lab", [CPU, GPU], ids=lambda lab: lab.name)
def test_what_a_lab_has_is_right(lab: Any) -> None:
    assert problems(lab) == []


def test_gpu_memory_wants_gpus() -> None:
    """On every node: one without is enough to refuse it."""
    assert problems(GPU, kv_buffer_device="cuda") == []
    assert problems(CPU, kv_buffer_device="cuda") == [
        ("way[2].transport.kv_buffer_device", 'set it to "cpu"')
    ]
    mixed = GPU.model_copy(update={"nodes": (GPU.nodes[0], CPU.nodes[1])})
    assert len(problems(mixed, kv_buffer_device="cuda")) == 1


@pytest.mark.parametrize("name", ["sm", "shm"])
def test_shared_memory_wants_tcp_beside_it(name: str) -> None:
    """An empty list leaves the choice to UCX, and tcp alone is a choice too."""
    (found,) = problems(CPU, ucx_tls=[name, "self"])
    assert found == ("way[2].transport.ucx_tls", 'add "tcp": NIXL cannot connect without it')
    assert problems(CPU, ucx_tls=[name, "tcp"]) == []
    assert problems(CPU, ucx_tls=["tcp"]) == problems(CPU, ucx_tls=[]) == problems(CPU, ucx_tls=["rc"]) == []


def test_a_key_that_has_a_name_of_its_own_is_not_written_into_extra() -> None:
    assert problems(CPU, extra={"kv_lease_duration": 9}) == [
        ("way[2].transport.extra.kv_lease_duration", "write lease_s = … instead")
    ]
    assert problems(CPU, extra={"num_threads": 2}) == []

"""What servers beside each other take is held against GPUs and hosts before any of them starts.

The oracle: sums worked out by hand for the lab two-h200 on made hosts of two GPUs, 80 GB and 141 GB each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config import way
from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError
from disagglab.hosts.gpu import GpuMemory, parse_memory
from disagglab.kv import modelconfig
from disagglab.paths import LABS
from disagglab.serving import room

GIB = 2**30
H100_MIB, H200_MIB = 81559, 143771  # memory.total of nvidia-smi: 79.6 and 140.4 GiB
LLAMA = modelconfig.shipped_config("meta-llama/Llama-3.1-8B-Instruct")
WEIGHTS_GIB = 8_030_261_248 * 2 / GIB  # the vendor's count of parameters, bf16


def host(total_mib: int = H100_MIB, free_mib: int | None = None, available_gib: float = 64.0) -> Any:
    """A host of two GPUs; ``free_mib``: of each, all of it if nothing is said."""
    row = f"{total_mib}, {total_mib if free_mib is None else free_mib}\n"
    facts = SimpleNamespace(run=lambda _: SimpleNamespace(rc=0, stdout=2 * row))
    available = round(available_gib * GIB)
    return SimpleNamespace(name="local", facts=facts, memory_available=lambda: available)


def tenants(lab: Lab, where: Any, ways: list[str], config: dict[str, Any] = LLAMA) -> list[room.Tenant]:
    """The servers of a session with these ways, as the fixture ``deployment`` has them."""
    chosen = way.chosen(lab, ways)
    own = way.beside(lab, len(chosen))
    labs = {"": own, **{f"@{one.name}": way.changed(own, one) for one in chosen}}
    return [
        room.Tenant(where, each, node, f"{node.name}{tag}", config)
        for tag, each in labs.items()
        for node in each.nodes
    ]


def refused(asked: list[room.Tenant]) -> list[Any]:
    """The problems for which a session is refused."""
    with pytest.raises(ConfigError) as caught:
        room.require(asked)
    return list(caught.value.problems)


def test_two_ways_beside_the_lab_do_not_fit_80_gb() -> None:
    """3 x (15.0 weights + 20.5 KV + 3.0) is 115.4 GiB on each GPU of 79.6; 8.5 GiB of KV each would fit."""
    lab = load_lab("two-h200")
    problems = refused(tenants(lab, host(), ["stock", "tcp"]))
    assert [(one.file, one.key) for one in problems] == [(lab.file, "memory.kv_beside_gib")] * 2
    lines = problems[0].wrong.splitlines()
    assert lines[0] == (
        "GPU 0 of this machine has 79.6 GiB free, 3 servers beside each other would take 115.4 GiB:"
    )
    assert [line.split() for line in lines[1:]] == [
        ["server", "weights", "KV", "graphs,", "rest", "sum,", "GiB"],
        ["gpu0", "15.0", "20.5", "3.0", "38.5"],
        ["gpu0@stock", "15.0", "20.5", "3.0", "38.5"],
        ["gpu0@tcp", "15.0", "20.5", "3.0", "38.5"],
    ]
    assert problems[1].wrong.startswith("GPU 1 of this machine")
    assert problems[0].mend.startswith("set kv_beside_gib to 8.5 or less, or start fewer")


def deployments(lab: Lab, where: Any, ways: list[str]) -> list[room.Tenant]:
    """The servers of the lab and of each start that its ways take; equal ways share one."""
    chosen = way.chosen(lab, ways)
    own = way.beside(lab, way.starts(lab, chosen))
    labs = {way.start_key(own, one): (way.tag(one), way.changed(own, one)) for one in reversed(chosen)}
    labs.pop(way.start_key(own, None), None)
    return [
        room.Tenant(where, each, node, f"{node.name}{tag}", LLAMA)
        for tag, each in [("", own), *labs.values()]
        for node in each.nodes
    ]


def test_three_deployments_of_two_h100_fit_80_gb_and_four_do_not() -> None:
    """Replicas 15.0 weights + 7.5 KV + 3.0; one server over both GPUs 7.5 + 7.5 + 3.0 on each of them.

    With one sharded way and one start that two ways share: 2 x 25.5 + 18 = 69 GiB of 79.6. A third start of
    replicas makes it 94.3 (weights are 14.96 GiB); with 3.5 GiB of KV it would fit: 3 x 21.5 + 14.0 = 78.4.
    """
    lab = load_lab("two-h100")
    asked = deployments(lab, host(), ["sharded", "chunk-512"])
    assert sorted(tenant.name for tenant in asked) == sorted(
        ["gpu0", "gpu1", "gpu0@replicated-chunk-512", "gpu1@replicated-chunk-512", "gpu0-gpu1@sharded"]
    )
    room.require(asked)
    problem, _ = refused(deployments(lab, host(), ["sharded", "chunk-512", "chunk-256"]))
    assert (problem.file, problem.key) == (str(LABS / "two-h100.toml"), "memory.kv_beside_gib")
    assert "4 servers beside each other would take 94.3 GiB" in problem.wrong
    assert problem.mend.startswith("set kv_beside_gib to 3.5 or less")


@pytest.mark.parametrize(("name", "total_mib"), [("two-h100", H100_MIB), ("two-h200", H200_MIB)])
def test_deployments_that_a_search_keeps_fit_their_gpus(name: str, total_mib: int) -> None:
    """As many as ``[tuning] resident`` says, all of them replicas, the largest: 51 of 79.6, 77 of 140.4 GiB.

    The control: on a GPU of half an H100 they do not.
    """
    lab = load_lab(name)
    assert lab.tuning is not None
    resident = lab.tuning.resident
    own = way.beside(lab, resident - 1)
    assert own.vllm.args["kv-cache-memory-bytes"]

    def kept(where: Any) -> list[room.Tenant]:
        return [
            room.Tenant(where, own, node, f"{node.name}-{number}", LLAMA)
            for number in range(resident)
            for node in own.nodes
        ]

    room.require(kept(host(total_mib)))
    assert refused(kept(host(H100_MIB // 2)))


@pytest.mark.parametrize(
    ("total_mib", "ways", "kv_gib"),
    [
        (H200_MIB, ["stock", "tcp"], 20.5),  # 115.4 of 140.4
        (H100_MIB, ["stock"], 20.5),  # 76.9 of 79.6
        (H100_MIB, ["stock", "tcp"], 8.5),  # what the refusal says
        (H100_MIB, [], 20.5),  # half of the GPU
    ],
)
def test_what_fits_is_let_through(total_mib: int, ways: list[str], kv_gib: float) -> None:
    """On the GPU that the lab is for; on a smaller one with fewer ways, or as the mend has it."""
    lab = load_lab("two-h200")
    memory = lab.memory.model_copy(update={"kv_beside_gib": kv_gib})
    room.require(tenants(lab.model_copy(update={"memory": memory}), host(total_mib), ways))


def test_the_next_larger_cache_does_not_fit() -> None:
    """The value that the mend names is the largest in steps of half a GiB."""
    lab = load_lab("two-h200")
    memory = lab.memory.model_copy(update={"kv_beside_gib": 9.0})
    assert refused(tenants(lab.model_copy(update={"memory": memory}), host(), ["stock", "tcp"]))


def test_who_is_there_already_counts() -> None:
    """A server takes its share of the whole GPU, of which another program holds more than the rest."""
    lab = load_lab("two-h200")
    problem, _ = refused(tenants(lab, host(free_mib=H100_MIB // 4), []))
    assert problem.key == "vllm.args.gpu-memory-utilization"
    assert "has 19.9 of 79.6 GiB free, a server would take 39.8 GiB" in problem.wrong
    assert problem.mend == "set gpu-memory-utilization to 0.24 or less"


def test_a_model_that_is_not_computed_counts_without_its_weights() -> None:
    """The sum is then of what is known, and says so."""
    lab = load_lab("two-h200")
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8}
    room.require(tenants(lab, host(), ["stock", "tcp"], config))
    small = host(32 * 1024)
    assert [
        line.split()[1] for line in refused(tenants(lab, small, ["stock"], config))[0].wrong.splitlines()[2:]
    ]
    assert "?" in refused(tenants(lab, small, ["stock"], config))[0].wrong


def test_a_host_needs_the_floor_for_each_server() -> None:
    """Without GPUs and with them; below it nothing starts, and both figures are said."""
    for name, need in (("embedded", 6.0), ("two-h200", 12.0)):
        lab = load_lab(name)
        room.require(tenants(lab, host(available_gib=need), [], {}))
        (problem,) = refused(tenants(lab, host(available_gib=need - 0.1), [], {}))
        assert problem.key == "memory.floor_gib"
        assert (
            f"{need - 0.1:.1f} GiB free, 2 servers beside each other would take {need:.1f} GiB"
            in problem.wrong
        )


def test_a_large_cache_on_a_host_counts_beyond_the_floor() -> None:
    """KV that the lab file asks for is held against the host, with weights; the floor is the least."""
    lab = load_lab("embedded")
    vllm = lab.vllm.model_copy(update={"env": {**lab.vllm.env, "VLLM_CPU_KVCACHE_SPACE": "8"}})
    large = lab.model_copy(update={"vllm": vllm})
    (problem,) = refused(tenants(large, host(available_gib=40.0), []))  # 2 x (15 + 8 + 1)
    assert problem.key == "vllm.env.VLLM_CPU_KVCACHE_SPACE"
    assert "would take 47.9 GiB" in problem.wrong
    assert problem.mend.startswith("set VLLM_CPU_KVCACHE_SPACE to 4 or less")


def test_a_gpu_that_a_host_lacks_is_named_once() -> None:
    """By the node's key, with what the host has; servers of ways on it say nothing more."""
    lab = load_lab("two-h200")
    nodes = (lab.nodes[0], lab.nodes[1].model_copy(update={"gpus": [2]}))
    (problem,) = refused(tenants(lab.model_copy(update={"nodes": nodes}), host(H200_MIB), ["stock"]))
    assert (problem.file, problem.key) == (lab.file, "node[1].gpus")
    assert problem.wrong == "GPU 2, but this machine has 2 (0 to 1)"


def test_memory_of_gpus_is_read() -> None:
    """In GiB; a GPU that shares the host's memory has no figure of its own."""
    assert parse_memory("81920, 40960\n[N/A], [N/A]\n") == (GpuMemory(80.0, 40.0), None)
    assert parse_memory("") == ()

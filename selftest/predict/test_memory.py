"""What a server takes of a GPU: weights from the model's config, KV from the lab file.

The oracle: the parameter counts that the models' owners state.
"""

from __future__ import annotations

import pytest

from disagglab.config import way
from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.kv import modelconfig
from disagglab.predict import memory

PARAMETERS = {"meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248}
LAB = load_lab("two-h200")


@pytest.mark.parametrize("model", PARAMETERS)
def test_weights_are_the_parameters(model: str) -> None:
    """To a thousandth: norms are left out."""
    found = memory.weights_gib(LAB, modelconfig.shipped_config(model))
    assert found == pytest.approx(PARAMETERS[model] * 2 / memory.GIB, rel=1e-3)


def test_a_head_that_is_the_embedding_counts_once() -> None:
    """Llama's head is half a GiB and more: 128,256 x 4,096 x 2 B."""
    config = modelconfig.shipped_config("meta-llama/Llama-3.1-8B-Instruct")
    apart = memory.weights_gib(LAB, config)
    tied = memory.weights_gib(LAB, {**config, "tie_word_embeddings": True})
    assert apart is not None
    assert tied is not None
    assert apart - tied == pytest.approx(128_256 * 4_096 * 2 / memory.GIB)


def test_two_gpus_of_one_server_share_its_weights() -> None:
    """Tensor parallel: half of them on each; what vLLM takes of each GPU is its share of it."""
    args = {**LAB.vllm.args, "tensor-parallel-size": 2}
    lab = LAB.model_copy(update={"vllm": LAB.vllm.model_copy(update={"args": args})})
    found = memory.of_gpu(lab, "a", 15.0, 80.0)
    assert (found.weights_gib, found.kv_gib, found.sum_gib) == (7.5, 29.5, 40.0)


def test_a_share_that_holds_no_weights_is_taken_all_the_same() -> None:
    """vLLM refuses it by itself, when it has loaded them."""
    found = memory.of_gpu(LAB, "a", 45.0, 80.0)
    assert (found.kv_gib, found.sum_gib) == (None, 40.0)


CPU = load_lab("embedded-ways")  # 1 GiB of cache a rank, floor 3 GiB


def over(lab: Lab) -> Lab:
    """The lab as one server over all of its nodes."""
    return way.sharded(lab)


def test_every_rank_on_a_host_has_a_cache_of_its_own() -> None:
    """Two ranks: 2 GiB of cache and 2 GiB of processes beside weights that they share, in place of 1, and of
    what is left of the floor.
    """
    both = over(CPU)
    found = memory.of_host(both, both.nodes[0], "a-b", 0.5)
    assert (found.weights_gib, found.kv_gib, found.rest_gib, found.sum_gib) == (0.5, 2.0, 2.0, 4.5)
    assert found.by == "vllm.env.VLLM_CPU_KVCACHE_SPACE"
    one = memory.of_host(CPU, CPU.nodes[0], "a", 0.5)
    assert (one.weights_gib, one.kv_gib, one.rest_gib, one.sum_gib) == (0.5, 1.0, 1.5, 3.0)
    assert one.by == "memory.floor_gib"


def test_a_rank_on_each_of_two_hosts_takes_half() -> None:
    """Each host has one cache, one rank's processes and half of the weights: not what both together take."""
    base = load_lab("two-hosts")
    both = over(base)
    assert way.ranks(both) == 2
    found = [memory.of_host(both, node, node.name, 5.0) for node in both.nodes]
    assert [(one.weights_gib, one.kv_gib, one.rest_gib) for one in found] == [(2.5, 1.0, 1.0)] * 2


def test_the_floor_holds_for_all_ranks_together() -> None:
    """3 GiB of the lab are less than what two ranks with their caches hold; 6 are more."""
    wide = CPU.model_copy(update={"memory": CPU.memory.model_copy(update={"floor_gib": 6.0})})
    found = memory.of_host(over(wide), over(wide).nodes[0], "a-b", 0.5)
    assert (found.rest_gib, found.sum_gib, found.by) == (3.5, 6.0, "memory.floor_gib")

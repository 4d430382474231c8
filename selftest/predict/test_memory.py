"""What a server takes of a GPU: weights from the model's config, KV from the lab file.

The oracle: the parameter counts that the models' owners state.
"""

from __future__ import annotations

import pytest

from disagglab.config.labs import load_lab
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

"""What disaggregation must move, and what that costs at least, before any server runs.

Arithmetic from config.json and the lab file's nominal link rate. tests/disagg/test_path.py holds it against
what the connector did.
"""

from __future__ import annotations

import pytest

from disagglab.config.schema import Lab
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape, transfer_time_s
from disagglab.results.recorder import Recorder

BITS = 8
CURVE = (128, 512, 2048, 8192)  # prompt tokens


def bytes_that_stay(shape: KvShape) -> int:
    """Bytes per token in the layers that keep every token; the least that a prompt moves."""
    return sum(layer.bytes_per_token(shape.dtype) for layer in shape.layers if layer.window is None)


@pytest.mark.hostless
def test_bytes_that_each_workload_moves(lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Whole blocks of the prompt, for every workload of the lab's gates, as NixlConnector moves them."""
    for name in dict.fromkeys(gate.workload for gate in lab.gates):
        workload = lab.workload(name)
        moved = layout(shape, lab.block_size).bytes_to_move(workload.prompt_tokens, lab.vllm.version)
        assert workload.tokens <= lab.model.max_model_len, f"{name} does not fit the lab's max_model_len"
        record.numbers(
            f"KV bytes per request, {name}",
            [moved],
            "B",
            what="computed",
            note=f"{workload.prompt_tokens} tokens in blocks of {lab.block_size}",
        )
        assert moved >= workload.prompt_tokens * bytes_that_stay(shape)


@pytest.mark.hostless
@pytest.mark.lab_has("link_rate")
def test_predicted_transfer_time(lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Bytes of a prompt's KV cache over the nominal link: the least that disaggregation adds to TTFT."""
    assert lab.transport.link_gbit_s is not None
    rate = lab.transport.link_gbit_s * 1e9 / BITS
    prompts = [tokens for tokens in CURVE if tokens <= lab.model.max_model_len]
    sizes = [layout(shape, lab.block_size).bytes_to_move(tokens, lab.vllm.version) for tokens in prompts]
    times = [transfer_time_s(size, rate) for size in sizes]
    for tokens, size, seconds in zip(prompts, sizes, times, strict=True):
        record.numbers(
            f"predicted transfer, {tokens} tokens",
            [seconds],
            "s",
            what="computed",
            note=f"{size:,} B at {lab.transport.link_gbit_s:g} Gbit/s",
        )
    record.plot(
        "Predicted KV transfer time",
        "prompt tokens",
        "s",
        {f"{lab.transport.link_gbit_s:g} Gbit/s": (prompts, times)},
        caption="Arithmetic, not a measurement: bytes / link rate.",
    )
    floor = [tokens * bytes_that_stay(shape) / rate for tokens in prompts]
    assert all(seconds >= least for seconds, least in zip(times, floor, strict=True)), (times, floor)

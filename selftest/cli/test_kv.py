"""The command line of ``python -m disagglab kv``: which configs it finds, and one line for all it refuses.

Oracle: the exit status, and both streams whole. Most cases call the entry point in this process; two start it
as a user would, and one looks at what the arithmetic loads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.paths import ROOT

CONFIGS = Path(__file__).parents[1] / "kv" / "configs"
MAMBA = str(CONFIGS / "state-spaces--mamba-130m-hf.json")
PEAK_LIMIT_KB = 100_000  # arithmetic on a JSON file; an interpreter with argparse takes a fifth of this
START_DEADLINE_S = 60.0  # for a start of Python that takes a fraction of a second
LLAMA = "Llama-3.1-8B-Instruct"
TINY: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}

# A stand-in for the tool that reports what it loaded and its peak. VmHWM and not getrusage: after an exec the
# latter still counts the memory of the process that started it, here pytest's.
CHILD = """
import json, re, sys
from pathlib import Path
{before}
from disagglab.cli.main import main
status = main(["kv", "gemma-3-1b-it", "--json", "--link", "100Gbps"])
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
loaded = sorted({{"torch", "vllm", "numpy", "transformers"}} & set(sys.modules))
print(json.dumps({{"status": status, "peak_kb": peak_kb, "loaded": loaded}}), file=sys.stderr)
"""

Capture = pytest.CaptureFixture[str]


def computed(capsys: Capture, config: str) -> dict[str, Any]:
    """The JSON that the tool prints for a config, and nothing else."""
    assert main(["kv", config, "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    result: dict[str, Any] = json.loads(out)
    return result


def refusal(capsys: Capture, *argv: str) -> str:
    """The one line on stderr with which the tool exits with 2."""
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(argv))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def start(*argv: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, until it ends."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("name", [f"meta-llama/{LLAMA}", LLAMA, LLAMA.lower(), f"META-LLAMA/{LLAMA.upper()}"])
def test_shipped_names(capsys: Capture, name: str) -> None:
    """With or without organisation, in any case of letters, the model is shown under its own name."""
    assert computed(capsys, name)["model"] == f"meta-llama/{LLAMA}"


def test_a_folder_and_a_file(capsys: Capture, tmp_path: Path) -> None:
    """A model folder and the config in it give the same figures, under the name they were given."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    folder, file = computed(capsys, str(tmp_path)), computed(capsys, str(tmp_path / "config.json"))
    assert folder["bytes_per_token"] == 2 * 2 * 4 * 16 * 2
    assert folder["model"] == str(tmp_path)
    assert {**folder, "model": file["model"]} == file


FILES = {
    "broken.json": ("{", "not JSON"),
    "list.json": ("[]", "holds a list"),
    "heads.json": (json.dumps({**TINY, "num_key_value_heads": 3}), "num_key_value_heads"),
    "types.json": (json.dumps({**TINY, "layer_types": ["full_attention"]}), "layer_types"),
    "text.json": (json.dumps({**TINY, "num_kv_shared_layers": "x"}), "num_kv_shared_layers"),
    "nothing.json": (
        json.dumps({**TINY, "block_configs": [{"attention": {"no_op": True}}] * 2}), "block_configs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_files_that_cannot_be_computed(capsys: Capture, tmp_path: Path, file: str) -> None:
    """Damaged and contradicting files end with one line that names the file and the key."""
    content, named = FILES[file]
    (tmp_path / file).write_text(content)
    line = refusal(capsys, "kv", str(tmp_path / file))
    assert line.startswith(str(tmp_path / file))
    assert named in line


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), "command"),
        (("kv",), "config"),
        (("bytes", LLAMA), "command"),
        (("kv", "/no/such/config.json"), "/no/such/config.json"),
        (("kv", "no-such-model"), "no-such-model"),
        (("kv", str(CONFIGS)), "config.json"),
        (("kv", "n" * 300), "whole file"),
        (("kv", "no such\nmodel"), "no such model"),
        (("kv", MAMBA), "state_size"),
        (("kv", LLAMA, "--tp", "3"), "tensor parallel size"),
        (("kv", LLAMA, "--tp", "0"), "tensor parallel size"),
        (("kv", LLAMA, "--tokens", "0"), "tokens"),
        (("kv", LLAMA, "--tokens", "9" * 400, "--link", "1Gbps"), "tokens"),
        (("kv", LLAMA, "--link", "9" * 400 + "Gbps"), "link"),
        (("kv", LLAMA, "two\nlines"), "two lines"),
        (("kv", "DeepSeek-V3", "--tp", "3"), "128 attention heads"),
        (("kv", LLAMA, "--tokens", "-5"), "tokens"),
        (("kv", LLAMA, "--tokens", "1.5"), "--tokens"),
        (("kv", LLAMA, "--block-size", "0"), "block size"),
        (("kv", LLAMA, "--dtype", "x"), "--dtype"),
        (("kv", LLAMA, "--link", "fast"), "link"),
        (("kv", LLAMA, "--nonsense"), "--nonsense"),
        (("kv", "DeepSeek-V3", "--dtype", "fp8_per_token_head"), "kv_lora_rank"),
        (("kv", "falcon-7b-instruct", "--dtype", "fp8"), "model_type"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys: Capture, argv: tuple[str, ...], named: str) -> None:
    """Exit status 2, nothing on stdout, and one line that names what is wrong."""
    assert named in refusal(capsys, *argv)


def test_as_a_user_starts_it() -> None:
    """The module prints the table and ends with 0; refused input ends with 2 and one line."""
    good = start("-m", "disagglab", "kv", "gpt2", "--tokens", "16")
    assert (good.returncode, good.stderr) == (0, "")
    assert "36,864 B" in good.stdout
    bad = start("-m", "disagglab", "kv", MAMBA)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert "state_size" in bad.stderr


def test_the_arithmetic_loads_no_framework() -> None:
    """Neither torch, vLLM, transformers nor numpy is loaded, and the peak stays below 100 MB.

    The negative control loads numpy and fills memory first: both are then seen.
    """
    told = json.loads(start("-c", CHILD.format(before="")).stderr)
    assert (told["status"], told["loaded"]) == (0, [])
    assert told["peak_kb"] < PEAK_LIMIT_KB
    control = json.loads(start("-c", CHILD.format(before="import numpy; kept = b'x' * 200_000_000")).stderr)
    assert control["loaded"] == ["numpy"]
    assert control["peak_kb"] > PEAK_LIMIT_KB


def test_latents_need_no_attention_heads(capsys: Capture, tmp_path: Path) -> None:
    """An MLA config is computable without its number of heads, as long as no rank divides them."""
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert computed(capsys, str(tmp_path))["bytes_per_token"] == 70_272
    assert "num_attention_heads" in refusal(capsys, "kv", str(tmp_path), "--tp", "2")

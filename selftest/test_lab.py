"""Lab files: every mistake is found before anything starts, all at once, each with file, key and mend.

The oracle is a table of broken files: what is broken, the key that has to be named, a word of the mend.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from disagglab.errors import ConfigError
from disagglab.lab import LABS_FOLDER, check_against_model, find_lab, load_lab, parse_lab

GOOD = tomllib.loads((LABS_FOLDER / "embedded.toml").read_text())
ROOT = LABS_FOLDER.parent


def broken(**changes: Any) -> dict[str, Any]:
    """The embedded lab with values set by path: ``node__1__cpus=[0]``; the value ``...`` deletes."""
    raw: dict[str, Any] = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *way, last = (int(part) if part.isdigit() else part for part in path.split("__"))
        place: Any = raw
        for part in way:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return raw


BROKEN = {
    "unknown key": (broken(transport__progres_delay_us=5), "transport.progres_delay_us", "progress_delay_us"),
    "unknown section": (broken(modle={}), "modle", "model"),
    "missing section": (broken(transport=...), "[transport]", "add a [transport]"),
    "missing key": (broken(model__max_model_len=...), "model.max_model_len", "add max_model_len"),
    "two nodes on one core": (broken(node__1__cpus=[0]), "node[1].cpus", "its own"),
    "role that no node has": (broken(node__1__role="prefill"), "node.role", 'role = "decode"'),
    "no such role": (broken(node__1__role="router"), "node[1].role", "correct the value of role"),
    "core that is not there": (broken(node__1__cpus=[4096]), "node[1].cpus", "a core it has"),
    "node without cores": (broken(node__0__cpus=[]), "node[0]", "cpus = [0]"),
    "one name twice": (broken(node__1__name="a"), "node[1].name", "its own name"),
    "port range too small": (broken(ports__last=21003), "ports", "set last to"),
    "port range backwards": (broken(ports__last=20000), "ports", "set last to"),
    "wrong type": (broken(model__max_model_len="long"), "model.max_model_len", "correct the value"),
    "reserved argument": (broken(vllm__args={"port": 8000}), "vllm.args.port", "[ports]"),
    "reserved argument, underscores": (
        broken(vllm__args={"kv_transfer_config": "{}"}), "vllm.args.kv_transfer_config", "[transport]",
    ),
    "argument with dashes": (
        broken(vllm__args={"--enforce-eager": True}), "vllm.args.--enforce-eager", "enforce-eager =",
    ),
    "one namespace for two nodes": (
        broken(node__0__namespace=True), "node[0].namespace", "on both, or on none",
    ),
    "namespace without a data link": (
        broken(node__0__namespace=True), "node[0].interface", "add interface",
    ),
    "namespace at an address that no host can have": (
        broken(node__0__namespace=True, node__0__address="198.18.1.0"), "node[0].address", "198.18.1.2",
    ),
    "a vLLM whose block rule nobody knows": (
        broken(vllm__version="9.9.9"), "vllm.version", "add a line",
    ),
    "tokenizer in the wrong place": (
        broken(vllm__args={"tokenizer": "x"}), "vllm.args.tokenizer", "[model] tokenizer",
    ),
    "cuda without GPUs": (
        broken(transport__kv_buffer_device="cuda"), "transport.kv_buffer_device", '"cpu"',
    ),
    "shared memory without tcp": (broken(transport__ucx_tls=["sm", "self"]), "transport.ucx_tls", "tcp"),
    "gate on a missing workload": (
        broken(gate__0__workload="nothing"), "gate[0].workload", "workload that exists",
    ),
    "gate on an unknown metric": (
        broken(gate__0__metric="mean"), "gate[0].metric", "correct the value of metric",
    ),
    "gate without a baseline": (broken(gate__0__baseline=...), "gate[0]", "limit = 0.1"),
    "gate with baseline and limit": (broken(gate__0__limit=0.5), "gate[0]", "limit = 0.1"),
    "one gate twice": (
        broken(gate__1__metric="itl_p99", gate__1__stream="steady", gate__1__baseline="replicated",
               gate__1__workload="long-prompts-into-steady-decode"), "gate[1]", "remove one",
    ),
    "transfer share against a baseline": (
        broken(gate__4__baseline="single", gate__4__limit=...), "gate[4].baseline", "limit",
    ),
    "a stream of a workload that has none": (broken(gate__1__stream="steady"), "gate[1].stream", "remove it"),
    "goodput of a stream": (broken(gate__3__stream="steady"), "gate[3].stream", "remove it"),
    "goodput without an objective": (broken(slo=...), "gate[3].metric", "add [slo]"),
    "a list in place of a table": (broken(scale=[{}]), "scale", "write a table"),
    "objective of half a request": (broken(slo={"ttft_s": 1.0}), "slo.tpot_s", "add tpot_s"),
    "scale of nothing": (broken(scale__prompt=0), "scale.prompt", "correct the value of prompt"),
    "workload that does not fit": (broken(scale__prompt=1.0), "gate[0].workload", "lower [scale]"),
    "one bracket for two": (broken(node={"name": "a"}), "[node]", "[[node]]"),
    "no name": (broken(name=...), "name", "at the top"),
    "no nodes": (broken(node=[]), "[[node]]", "add a [[node]]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_lab_file_names_file_key_and_mend(case: str) -> None:
    """One mistake gives one problem that names the file, the key and what mends it."""
    raw, key, mend = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        parse_lab(raw, "my.toml")
    found = [problem for problem in caught.value.problems if problem.key == key]
    assert found, f"no problem names {key}: {caught.value}"
    assert mend in found[0].mend
    assert found[0].file == "my.toml"


def test_all_mistakes_come_at_once() -> None:
    """Mistakes of different sections, and contradictions between sections, are reported together."""
    raw = broken(
        model__dtype="int3", node__1__cpus=[0], ports__last=21001, transport__ucx_tls=["sm"], extra=1
    )
    with pytest.raises(ConfigError) as caught:
        parse_lab(raw, "my.toml")
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"model.dtype", "node[1].cpus", "ports", "transport.ucx_tls", "extra"}
    assert "5 problems found; nothing was started" in str(caught.value)


def wired(section: str, key: str, value: Any, number: int | None = None) -> dict[str, Any]:
    """The lab with network namespaces, with one thing wrong."""
    good = tomllib.loads((LABS_FOLDER / "namespaces.toml").read_text())
    (good[section] if number is None else good[section][number])[key] = value
    return good


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (wired("node", "address", "198.18.2.1", 0), "node[0].address"),
        (wired("node", "data_address", "198.18.8.1", 0), "node[0].data_address"),
        (wired("transport", "ucx_tls", ["tcp", "sm", "self"]), "transport.ucx_tls"),
        (wired("transport", "ucx_tls", []), "transport.ucx_tls"),
        (wired("node", "namespace", False, 1), "node[0].namespace"),
    ],
)
def test_networks_that_do_not_join_are_refused(raw: dict[str, Any], key: str) -> None:
    """One /30 for both control links, two networks for the data link, a way around it, one namespace."""
    with pytest.raises(ConfigError) as caught:
        parse_lab(raw, "my.toml")
    assert [problem.key for problem in caught.value.problems] == [key]


@pytest.mark.parametrize("name", sorted(path.stem for path in LABS_FOLDER.glob("*.toml")))
def test_every_shipped_lab_is_valid(name: str) -> None:
    """The lab files in labs/ are accepted, and carry the name of their file."""
    assert load_lab(name).name == name


def test_the_caches_dtype_is_vllms_own_option() -> None:
    """Without --kv-cache-dtype, or with auto, the cache has the model's dtype; else what the option says."""
    for args, dtype in (
        ({}, "bfloat16"),
        ({"kv-cache-dtype": "auto"}, "bfloat16"),
        ({"kv-cache-dtype": "fp8"}, "fp8"),
    ):
        assert parse_lab(broken(vllm__args=args), "my.toml").kv_dtype == dtype


def test_context_length_past_the_models_is_refused() -> None:
    """A lab that asks for more positions than the model has is refused with both numbers."""
    with pytest.raises(ConfigError, match="4096 tokens, but the model has 2048"):
        check_against_model(load_lab("embedded"), 2048)
    check_against_model(load_lab("embedded"), 4096)


def test_unknown_lab_lists_the_known() -> None:
    """A lab name without a file is answered with the names that exist."""
    with pytest.raises(ConfigError, match=r"use one of .*embedded.*spark"):
        find_lab("embeded")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    """Syntax errors and binary files end in the same kind of error."""
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not "):
        load_lab(str(path))


def test_a_broken_file_starts_nothing(tmp_path: Path) -> None:
    """pytest, given a broken lab file: exit status 4, every problem on the screen, no run folder."""
    path = tmp_path / "broken.toml"
    text = (LABS_FOLDER / "embedded.toml").read_text()
    path.write_text(
        text.replace('role = "decode"', 'role = "prefill"')
        .replace("cpus = [1]", "cpus = [0]")
        .replace("21099", "21001")
        + "\n[transprot]\n"
    )
    before = set((ROOT / "reports").glob("2*"))
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "disagg", f"--lab={path}"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    said = answer.stdout + answer.stderr
    assert answer.returncode == 4, said
    for key in ("transprot", "node.role", "node[1].cpus", "ports"):
        assert key in said
    assert set((ROOT / "reports").glob("2*")) == before

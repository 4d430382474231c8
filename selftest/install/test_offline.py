"""The pack for a host without registry: its pins fit its lab, and a part that broke on its way is refused."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from disagglab.config.labs import load_lab
from disagglab.paths import ROOT
from disagglab.serving import vllm_plugin

OFFLINE = ROOT / "offline"
LIMIT_S = 60
HOST_HAS = {"numpy", "scipy"}  # beside its PyTorch; docs/how-to/offline.md says so


def pins(path: Path) -> dict[str, str]:
    """Version by normalised name."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]+\])?==([^ ;]+)(?: ;.*)?", line)
            assert match, f"{path.name}: not a pin: {line}"
            name = re.sub(r"[-_.]+", "-", match[1]).lower()
            assert name not in found or ";" in line, f"{name} is pinned twice"
            found[name] = match[2]
    return found


def test_the_lab_serves_what_is_packed() -> None:
    """vLLM of the pack is the lab's; NIXL and router are those of the other environments."""
    packed, main = pins(OFFLINE / "requirements.txt"), pins(ROOT / "requirements" / "cuda.txt")
    assert packed["vllm"] == load_lab("two-h200").vllm.version
    assert packed["vllm-router"] == main["vllm-router"] == load_lab("two-h200").router.version
    assert packed["nixl-cu13"] == main["nixl-cu13"]


def test_what_the_suite_imports_is_packed() -> None:
    """A dependency that is missing there stops the collection of every module, not of its own alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert wanted - set(pins(OFFLINE / "requirements.txt")) == HOST_HAS


def test_what_nixl_imports_stays_in_the_pack() -> None:
    """Every package of the NIXL wheels is carried: nixl_ep without its backend nixl_ep_cu13 (both are in what
    the pins download) is found by vLLM's probe, fails to import, and leaves a traceback in a healthy log.
    """
    wheels = [importlib.metadata.distribution(name) for name in ("nixl", "nixl-cu13")]
    packages = {file.parts[0] for wheel in wheels for file in wheel.files or () if file.suffix == ".py"}
    assert {"nixl", "nixl_cu13", "nixl_ep", "nixl_ep_cu13"} <= packages
    script = (OFFLINE / "pack.sh").read_text().replace("\\\n", " ")
    removed = [word for line in script.splitlines() if line.startswith("rm -rf") for word in line.split()[2:]]
    assert removed, "the script removes what a dense model does without"
    assert not packages.intersection(name.split("/")[0] for name in removed)


@pytest.mark.parametrize("script", ["pack.sh", "install.sh"])
def test_the_scripts_parse_and_explain_themselves(script: str) -> None:
    """Without arguments each says how it is called."""
    done = subprocess.run([OFFLINE / script], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode != 0
    assert f"usage: offline/{script}" in done.stderr


def test_a_part_that_changed_on_its_way_is_refused(tmp_path: Path) -> None:
    """The sums are checked before anything is made."""
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "part.00").write_text("torn")
    (parts / "SHA256SUMS").write_text(f"{'0' * 64}  part.00\n")
    argv: list[str | Path] = [OFFLINE / "install.sh", parts, tmp_path / "venv"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode != 0
    assert "part.00" in done.stderr + done.stdout
    assert not (tmp_path / "venv").exists()


def test_the_plugin_is_found_where_the_suite_was_not_installed_by_pip(tmp_path: Path) -> None:
    """vLLM loads the plugin by its entry point, which the unpacked suite would not have."""
    argv: list[str | Path] = [sys.executable, OFFLINE / "metadata.py", tmp_path]
    subprocess.run(argv, check=True, timeout=LIMIT_S)
    (found,) = importlib.metadata.distributions(name="disagglab", path=[str(tmp_path)])
    (entry,) = found.entry_points.select(group="vllm.general_plugins")
    assert entry.name == "disagglab"
    assert entry.load() is vllm_plugin.register

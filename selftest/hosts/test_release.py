"""Which Python serves a vLLM release, and what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagglab.config.labs import load_lab, with_release
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, StartError
from disagglab.hosts import release
from disagglab.paths import ROOT

LAB = load_lab("embedded")


def named(version: str, python: str) -> Lab:
    """The embedded lab, served by a release whose environment the lab file names."""
    lab = with_release(LAB, version)
    return lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"environments": {version: python}})})


def test_the_lab_file_decides_first(tmp_path: Path) -> None:
    """A folder is an environment, anything else the interpreter itself; relative paths begin at the root."""
    assert release.python_of(named("0.30.0", str(tmp_path))) == str(tmp_path / "bin" / "python")
    assert release.python_of(named("0.30.0", "/opt/python")) == "/opt/python"
    assert release.python_of(named("0.30.0", "nowhere/python")) == str(ROOT / "nowhere" / "python")


def test_the_installed_release_is_served_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the lab file says otherwise."""
    monkeypatch.setattr(release, "installed", lambda: "0.31.0")
    assert release.python_of(LAB) == sys.executable


def test_another_release_has_an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that set-up makes, once it is there."""
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "installed", lambda: "0.31.0")
    other = with_release(LAB, "0.30.0")
    assert release.python_of(other) == sys.executable
    python = tmp_path / ".venvs" / "vllm-0.30.0" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert release.python_of(other) == str(python)


@pytest.mark.parametrize(
    ("version", "prints", "message"),
    [
        ("0.30.0", "0.29.0", "holds vLLM 0.29.0, not 0.30.0"),
        ("0.30.0", "", "holds no vLLM"),
        ("9.9.9", "9.9.9", "BLOCK_RULE"),
    ],
)
def test_a_release_that_cannot_be_served(tmp_path: Path, version: str, prints: str, message: str) -> None:
    """Another release in the environment, none, or one whose block rule nobody has measured."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {prints}\n")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=message):
        release.require(named(version, str(python)), "--against")


def test_a_release_that_can_be_served(tmp_path: Path) -> None:
    """The build's suffix does not count."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.30.0+cpu\n")
    python.chmod(0o755)
    release.require(named("0.30.0", str(python)), "--against")


def test_two_releases_have_to_fit() -> None:
    """Both are resident, so neither may take half of a GPU's memory and more; each takes ports."""
    with pytest.raises(ConfigError, match="gpu-memory-utilization"):
        release.require_room(load_lab("two-gpus"))
    release.require_room(load_lab("spark"))
    narrow = LAB.model_copy(update={"ports": LAB.ports.model_copy(update={"last": LAB.ports.first + 20})})
    with pytest.raises(ConfigError, match="21 ports, the servers of 2 releases or ways need 30"):
        release.require_room(narrow)
    release.require_room(LAB)


def test_the_server_says_which_release_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of another release is not the one that was asked for, however it came to listen there."""
    answers: Any = {"version": "0.30.0+cpu"}
    request = httpx.Request("GET", "http://a/version")
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, json=answers, request=request))
    release.require_served("a", "http://a", "0.30.0")
    with pytest.raises(StartError, match=r"says 0\.30\.0, the lab is for vLLM 0\.31\.0"):
        release.require_served("a", "http://a", "0.31.0")

"""A lab file says the same on every machine that reads it; what a host lacks is asked of the host.

The oracle: two machines that share nothing a program can ask about, one of them too small for every lab.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from disagglab.cli import main
from disagglab.config.labs import load_lab
from disagglab.errors import ConfigError
from disagglab.paths import LABS

WIDE = """
name = "wide"
label = "cores that few machines have"
extends = "embedded"
way = []

[[node]]
name = "a"
address = "127.0.0.1"
role = "prefill"
cpus = [40]

[[node]]
name = "b"
address = "192.0.2.9"
role = "decode"
cpus = [4095]
"""
ELSEWHERE = """
name = "elsewhere"
label = "its parent has a folder that may be there"
extends = "../parents/hybrid.toml"
"""


@contextlib.contextmanager
def machine(cores: int) -> Iterator[None]:
    """Makes this machine look like one of so many cores; with an even number it has every folder."""
    answers: list[tuple[Any, str, object]] = [
        (os, "cpu_count", cores),
        (os, "sched_getaffinity", set(range(cores))),
        (os, "uname", SimpleNamespace(nodename=f"m{cores}", sysname="Linux", machine=f"isa{cores}")),
        (os, "getloadavg", (float(cores),) * 3),
        (psutil, "cpu_count", cores),
        (psutil, "virtual_memory", SimpleNamespace(total=cores << 30, available=cores << 29)),
        (psutil, "net_if_addrs", {f"eth{cores}": []}),
        (socket, "gethostname", f"m{cores}"),
        (getpass, "getuser", f"user{cores}"),
        (platform, "machine", f"isa{cores}"),
        (Path, "is_dir", cores % 2 == 0),
    ]
    with pytest.MonkeyPatch.context() as patch:  # undone before pytest itself asks for folders
        for owner, name, answer in answers:
            patch.setattr(owner, name, lambda *_, said=answer, **__: said)
        for name in ("HOME", "USER", "HF_HOME", "DISAGGLAB_CACHE"):
            patch.setenv(name, f"/there/{cores}")
        yield


def read_on(cores: int, path: str) -> dict[str, Any] | str:
    """A lab as a machine of so many cores reads it, or its words of refusal."""
    with machine(cores):
        try:
            return load_lab(path).model_dump()
        except ConfigError as error:
            return str(error)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Every shipped lab, one whose cores few machines have, and one that inherits a relative model folder."""
    (tmp_path / "parents").mkdir()
    (tmp_path / "heirs").mkdir()
    wide, heir = tmp_path / "wide.toml", tmp_path / "heirs" / "elsewhere.toml"
    wide.write_text(WIDE)
    heir.write_text(ELSEWHERE)
    text = (LABS / "hybrid.toml").read_text().replace('"./models/', '"models/')
    (tmp_path / "parents" / "hybrid.toml").write_text(text)
    shipped = {path.stem: str(path) for path in LABS.glob("*.toml")}
    return {**shipped, "wide": str(wide), "elsewhere": str(heir)}


def test_a_lab_reads_the_same_on_every_machine(files: dict[str, str]) -> None:
    """Each is accepted on a machine of one core and on one of 128, and is the same lab."""
    for name, path in files.items():
        here = read_on(1, path)
        assert isinstance(here, dict), here
        assert here == read_on(128, path), name


def test_a_mistake_reads_the_same_on_every_machine(files: dict[str, str]) -> None:
    """What is refused is refused everywhere, in the same words."""
    path = Path(files["wide"])
    path.write_text(WIDE.replace("[4095]", "[40, -1]"))
    said = read_on(1, str(path))
    assert said == read_on(128, str(path))
    assert isinstance(said, str)
    assert "node[1].cpus: -1 is negative" in said


NOMINAL = (
    *("--model", "Llama-3.1-8B-Instruct", "--link", "10Gbps"),
    *("--peak-tflop-s", "1", "--memory-gb-s", "10"),
)


@pytest.mark.parametrize("command", [("predict", *NOMINAL), ("plan",), ("labs",)], ids=lambda words: words[0])
def test_commands_take_a_lab_of_a_larger_machine(
    command: Sequence[str],
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """predict computes, plan lists commands, labs says what is missing here; none refuses the file."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert main.main([*command, "--lab", files["wide"]]) == 0
    assert capsys.readouterr().out

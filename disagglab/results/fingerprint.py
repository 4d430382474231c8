"""What a result depends on: hardware, software, code. Results of different fingerprints are not compared.

A fingerprint is made in two steps: of this machine, when a session begins, and of the lab, once its hosts
have been surveyed. Until then it is incomplete, as are those that earlier versions recorded, which knew this
machine alone. An incomplete one is equal to no other, because nodes with other GPUs may stand behind it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from disagglab.paths import ROOT

PACKAGES = ("vllm", "torch", "nixl", "nixl-cu13", "vllm-router", "transformers", "disagglab")
KEY, LAB = "key", "lab"  # in run.json; a complete one has both
INCOMPLETE = "incomplete"


def versions() -> dict[str, str]:
    """Versions of what the results depend on; ``absent`` where a package is not installed."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def cpu_model() -> str:
    """The CPU's name as the kernel shows it (x86-64: model name; Arm: the implementer's part number)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """The commit of this checkout, with ``+changes`` when the tree is not clean; ``unknown`` outside git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20
        ).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if git("status", "--porcelain") else "")


def of_machine(served: str) -> dict[str, Any]:
    """Hardware and software of this machine, with a short key over both; incomplete.

    Args:
        served: the vLLM version that the servers run; the client's is among the packages here.
    """
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "versions": {**versions(), "vllm served": served},
    }
    return _with_key(facts)


def of_lab(machine: Mapping[str, Any], lab: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The fingerprint of a lab, complete, with a key over all of it.

    Args:
        machine: that of this machine.
        lab: what tells every host and node from another, by title, of at least one.
    """
    return _with_key({**machine_of(machine), LAB: {title: dict(facts) for title, facts in lab.items()}})


def machine_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a fingerprint says of the machine that ran pytest, without its key."""
    return {name: value for name, value in found.items() if name not in (KEY, LAB)}


def complete(found: Mapping[str, Any]) -> bool:
    """Whether it is of a whole lab."""
    return bool(found.get(LAB))


def label(found: Mapping[str, Any]) -> str:
    """Its key, and whether it is incomplete."""
    return f"{found.get(KEY)}{'' if complete(found) else f' ({INCOMPLETE})'}"


def _with_key(facts: Mapping[str, Any]) -> dict[str, Any]:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {**facts, KEY: key}

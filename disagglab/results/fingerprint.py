"""What a result depends on: hardware, software, code. Results of different fingerprints are not compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from disagglab.paths import ROOT

PACKAGES = ("vllm", "torch", "nixl", "nixl-cu13", "vllm-router", "transformers", "disagglab")


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


def fingerprint(served: str) -> dict[str, Any]:
    """Hardware and software of this machine, with a short key over both.

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
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {**facts, "key": key}

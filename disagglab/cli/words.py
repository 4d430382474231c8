"""The words that a shell completes: names of labs, of their ways and workloads, of shipped models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disagglab.paths import LABS, WORKLOADS


def labs(prefix: str, **_: Any) -> list[str]:
    """Names of the labs, and lab files and folders that begin as what was typed."""
    names = sorted(file.stem for file in LABS.glob("*.toml"))
    folder, _slash, begun = prefix.rpartition("/")
    place = Path(folder or ("/" if prefix.startswith("/") else ".")).expanduser()
    paths = sorted(place.iterdir()) if place.is_dir() else []
    head = prefix[: len(prefix) - len(begun)]
    found = [
        f"{head}{path.name}{'/' * path.is_dir()}"
        for path in paths
        if path.name.startswith(begun) and (path.is_dir() or path.suffix == ".toml")
    ]
    return [*names, *found]


def ways(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of the ways of the lab that was typed before."""
    return list(dict.fromkeys(one.name or one.arm for one in _lab(parsed_args).ways))


def workloads(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of the workloads of the gates of the lab that was typed before."""
    return list(dict.fromkeys(gate.workload for gate in _lab(parsed_args).gates))


def every_workload(**_: Any) -> list[str]:
    """Names of the workloads that there are."""
    return sorted(file.stem for file in WORKLOADS.glob("*.toml"))


def models(**_: Any) -> list[str]:
    """Shipped models, by their names without the organisation."""
    from disagglab.kv import modelconfig

    return sorted(name.rpartition("/")[2] for name in modelconfig.shipped())


def _lab(parsed: argparse.Namespace) -> Any:
    from disagglab.config.labs import load_lab

    return load_lab(parsed.lab)

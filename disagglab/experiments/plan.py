"""The plan of a session, from what its command line asks for: ``pytest --plan`` and ``disagglab plan``."""

from __future__ import annotations

from dataclasses import dataclass

from disagglab.config import variant
from disagglab.config.labs import load_lab, on_workloads, with_release
from disagglab.experiments import dry_run


@dataclass(frozen=True)
class Asked:
    """The options of a session that decide what it starts. ``lab``: name or path; no ``vllm``: the lab's."""

    lab: str
    vllm: str = ""
    against: str = ""
    workloads: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    dedicated: bool = False


def lines(asked: Asked) -> list[str]:
    """Every command, host by host; see :func:`disagglab.experiments.dry_run.lines`.

    Raises:
        ConfigError: if lab file and options do not fit.
        StartError: if ~/.ssh/config cannot be read.
    """
    lab = load_lab(asked.lab)
    if asked.vllm:
        lab = with_release(lab, asked.vllm)
    lab = on_workloads(lab, asked.workloads)
    variants = variant.chosen(lab, asked.variants)
    lab = variant.beside(lab, len(variants))
    return dry_run.lines(lab, asked.against, asked.dedicated, variants)

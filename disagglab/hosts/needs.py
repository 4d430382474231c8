"""What a lab needs, and whether this machine has it. Starts nothing, and connects to no host."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import ConfigError
from disagglab.hosts import namespaces, release, weights
from disagglab.hosts.gpu import parse_gpus

ASK_GPUS = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
ASK_LIMIT_S = 20.0
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What this machine has. ``lacks``: packages without which it makes no hosts."""

    cores: int
    gpus: int
    available_gib: float
    root: bool
    lacks: tuple[str, ...]

    @classmethod
    def here(cls) -> Machine:
        """This one, now."""
        path = f"{os.environ.get('PATH', '')}:{namespaces.SEARCH_PATH}"
        return cls(
            cores=os.cpu_count() or 1,
            gpus=_gpus(),
            available_gib=psutil.virtual_memory().available / GIB,
            root=os.geteuid() == 0,
            lacks=tuple(
                package
                for program, package in namespaces.PROGRAMS.items()
                if shutil.which(program, path=path) is None
            ),
        )


@dataclass(frozen=True)
class Needs:
    """What a lab needs of this machine, apart from its model.

    ``gpus``, ``cores``: by their numbers. ``memory_gib``: available before its servers start. ``made_hosts``:
    made here, which takes root; ``ssh_hosts``: other machines. ``vllm``: of its servers, wherever they run.
    """

    gpus: tuple[int, ...]
    cores: tuple[int, ...]
    memory_gib: float
    root: bool
    made_hosts: tuple[str, ...]
    ssh_hosts: tuple[str, ...]
    vllm: str

    def __str__(self) -> str:
        parts = [_counted(len(self.gpus), "GPU")] if self.gpus else []
        parts += [_counted(len(self.cores), "core")] if self.cores else []
        parts += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        parts += [f"root to make {_counted(len(self.made_hosts), 'host')}"] if self.root else []
        parts += [f"SSH to {' and '.join(self.ssh_hosts)}"] if self.ssh_hosts else []
        return ", ".join([*parts, f"vLLM {self.vllm}"])


@dataclass(frozen=True)
class Standing:
    """A lab beside a machine. ``lacking``: why not; ``unknown``: what only another machine can tell."""

    lab: Lab
    needs: Needs
    lacking: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def here(self) -> bool | None:
        """Whether the lab can run from here; None if other machines decide that, which were not looked at."""
        return False if self.lacking else None if self.unknown else True

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.lab.name,
            "file": self.lab.file,
            "nodes": [{"name": one.name, "role": one.role, "host": one.host} for one in self.lab.nodes],
            "model": self.lab.model.id,
            "needs": asdict(self.needs),
            "here": self.here,
            "reasons": [*self.lacking, *self.unknown],
        }


def of(lab: Lab) -> Needs:
    """The needs of a lab."""
    here = _nodes_here(lab)
    made = tuple(host.name for host in lab.hosts if host.namespace)
    cores = {core for node in here for core in node.cpus}
    return Needs(
        gpus=tuple(sorted({gpu for node in here for gpu in node.gpus})),
        cores=tuple(sorted(cores | set(lab.controller.cpus if lab.controller.host == "local" else ()))),
        memory_gib=lab.memory.floor_gib * len(here),
        root=bool(made),
        made_hosts=made,
        ssh_hosts=tuple(name for name in lab.host_names if name not in ("local", *made)),
        vllm=lab.vllm.version,
    )


def standing(lab: Lab, machine: Machine) -> Standing:
    """Whether a machine has what a lab needs; packages and models are looked for on this one."""
    needs = of(lab)
    lacking = list(_lacking(needs, machine))
    if _nodes_here(lab):
        lacking += [*_environment_lacks(lab), *_model_lacks(lab)]
    unknown = []
    if needs.ssh_hosts:
        unknown.append(
            f"hosts over SSH are not looked at; to look: disagglab provision --lab {lab.name} --check"
        )
    return Standing(lab, needs, tuple(lacking), tuple(unknown))


def _nodes_here(lab: Lab) -> list[NodeSection]:
    here = {"local", *(host.name for host in lab.hosts if host.namespace)}
    return [node for node in lab.nodes if node.host in here]


def _lacking(needs: Needs, machine: Machine) -> Iterator[str]:
    if needs.gpus and len(needs.gpus) > machine.gpus:
        yield f"needs {_counted(len(needs.gpus), 'GPU')}, {machine.gpus or 'none'} here"
    elif needs.gpus and needs.gpus[-1] >= machine.gpus:
        yield f"needs GPU {needs.gpus[-1]}, and here the last is {machine.gpus - 1}"
    if needs.cores and needs.cores[-1] >= machine.cores:
        yield f"needs core {needs.cores[-1]}, and here the last is {machine.cores - 1}"
    if needs.memory_gib > machine.available_gib:
        yield f"needs {needs.memory_gib:g} GiB available, {machine.available_gib:.1f} here"
    if needs.root and not machine.root:
        yield "needs root, to make its hosts"
    if needs.root and machine.lacks:
        yield f"needs {', '.join(machine.lacks)}: apt-get install {' '.join(machine.lacks)}"


def _environment_lacks(lab: Lab) -> Iterator[str]:
    """Whether there is an environment of the release; what another one holds is seen when it serves."""
    version, python = lab.vllm.version, release.python_of(lab)
    holds = release.installed() == version if python == sys.executable else Path(python).is_file()
    if not holds:
        yield f"no environment of vLLM {version}: make setup VLLM={version}"


def _model_lacks(lab: Lab) -> Iterator[str]:
    """Whether model and tokenizer are here; a package counts as the model that is made of it."""
    for source in filter(None, (lab.model.id, lab.model.tokenizer)):
        try:
            if source.startswith(weights.PACKAGE_PREFIX):
                importlib.metadata.version(source.removeprefix(weights.PACKAGE_PREFIX))
                continue
            alone = lab.model.model_copy(update={"id": source, "tokenizer": None})
            weights.find_section(alone, lab.file)
        except (ConfigError, importlib.metadata.PackageNotFoundError):
            yield f"model {source} is not here"


def _gpus() -> int:
    """How many GPUs there are; none without nvidia-smi."""
    if shutil.which(ASK_GPUS[0]) is None:
        return 0
    try:
        asked = subprocess.run(ASK_GPUS, capture_output=True, text=True, timeout=ASK_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(parse_gpus(asked.stdout)) if asked.returncode == 0 else 0


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"

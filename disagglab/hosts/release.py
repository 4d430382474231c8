"""vLLM releases: which Python runs one, and whether a server really is the one that was asked for."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path, PurePosixPath

import httpx

from disagglab.config.checks import ports_needed
from disagglab.config.schema import HostSection, Lab
from disagglab.errors import ConfigError, Problem, StartError
from disagglab.install.environments import environment_python
from disagglab.kv.layout import RULE_MEND, has_rule
from disagglab.paths import ROOT

ASK_S = 60.0
HTTP_TIMEOUT_S = 30.0
MOST_GPU_MEMORY = 0.95  # of a GPU, for the servers of two releases together
GPU_MEMORY = 0.9  # what vLLM takes when nothing is said (CacheConfig.gpu_memory_utilization)
ASK = "from importlib.metadata import version; print(version('vllm'))"


def number(version: str) -> str:
    """``0.31.0`` of ``0.31.0+cpu``."""
    return version.partition("+")[0]


def installed() -> str:
    """The release in this very environment, where the load client runs; empty if there is none."""
    try:
        return number(importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        return ""


def python_of(lab: Lab) -> str:
    """The Python that the lab's servers run with.

    What ``[vllm.environments]`` names for the release comes first, then this environment if it holds the
    release, then the one that ``make setup VLLM=X.Y.Z`` makes; else this one, whose servers will be refused.
    """
    named = lab.vllm.environments.get(lab.vllm.version)
    if named is not None:
        path = Path(named).expanduser()
        path = path if path.is_absolute() else ROOT / path
        return str(path / "bin" / "python" if path.is_dir() else path)
    made = environment_python(ROOT, lab.vllm.version)
    return str(made) if installed() != lab.vllm.version and made.is_file() else sys.executable


def python_there(host: HostSection, version: str) -> str:
    """The Python of vLLM ``version`` on a remote host; a relative path starts at the account's home."""
    named = host.environments.get(version)
    if named is not None:
        path = PurePosixPath(named.removeprefix("~/"))
        return str(path if path.name.startswith("python") else path / "bin" / "python")
    if version == installed():
        return suite_python_there(host)
    return str(environment_python(Path(host.folder), version))


def suite_python_there(host: HostSection) -> str:
    """The Python of the suite on a remote host; a relative path starts at the account's home."""
    return f"{host.folder}/.venv/bin/python"


def require_rule(lab: Lab, option: str) -> None:
    """Refuse a release of which it is not known what a transfer moves.

    Raises:
        ConfigError: if its block rule is not known.
    """
    version = lab.vllm.version
    if not has_rule(version):
        wrong = f"which KV blocks vLLM {version} moves is not known (BLOCK_RULE in disagglab/kv/layout.py)"
        raise ConfigError([Problem(lab.file, option, wrong, RULE_MEND)])


def require(lab: Lab, option: str) -> None:
    """Refuse, before anything starts, a release that cannot be served here.

    Raises:
        ConfigError: if its block rule is not known, its environment is missing, or holds another release.
    """
    require_rule(lab, option)
    version = lab.vllm.version
    python = python_of(lab)
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=ASK_S, check=False)
        found = number(done.stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    if found != version:
        wrong = f"{python} holds {f'vLLM {found}' if found else 'no vLLM'}, not {version}"
        mend = f'make setup VLLM={version}, or name its environment: [vllm.environments] "{version}" = "PATH"'
        raise ConfigError([Problem(lab.file, option, wrong, mend)])


def require_ports(lab: Lab, deployments: int) -> None:
    """Refuse a lab whose ports do not suffice for the servers of so many deployments at once.

    Raises:
        ConfigError: naming the key.
    """
    have, need = lab.ports.last - lab.ports.first + 1, ports_needed(len(lab.nodes), deployments)
    if have < need:
        mend = f"set last to {lab.ports.first + need - 1} or more"
        wrong = f"{have} ports, the servers of {deployments} releases or ways need {need}"
        raise ConfigError([Problem(lab.where("ports"), "ports", wrong, mend)])


def require_room(lab: Lab) -> None:
    """Refuse a lab whose GPUs or ports do not suffice for the servers of two releases at once.

    Raises:
        ConfigError: naming the key.
    """
    require_ports(lab, 2)
    share = float(lab.vllm.args.get("gpu-memory-utilization", GPU_MEMORY))
    if any(node.gpus for node in lab.nodes) and 2 * share > MOST_GPU_MEMORY:
        wrong = f"{share:g} of a GPU's memory for each of two servers"
        mend = f"set it to {MOST_GPU_MEMORY / 2:g} or less: both releases are resident, to take turns"
        key = "vllm.args.gpu-memory-utilization"
        raise ConfigError([Problem(lab.where(key), key, wrong, mend)])


def require_served(name: str, url: str, version: str) -> None:
    """Let the server itself say which release it is.

    Raises:
        StartError: if it is another one than the lab file says.
    """
    answer = httpx.get(f"{url}/version", timeout=HTTP_TIMEOUT_S)
    found = number(str(answer.json().get("version", ""))) if answer.status_code == 200 else ""
    if found != version:
        raise StartError(
            f"{name}: {url}/version says {found or answer.status_code}, the lab is for vLLM {version};"
            f" set [vllm] version, or ask for it: --vllm {found or version}"
        )

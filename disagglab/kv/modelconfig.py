"""A model's ``config.json``: where it lies, and which ones ship with the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from disagglab import jsonfile
from disagglab.errors import ConfigError, Problem

FOLDER = (
    Path(__file__).parent / "configs"
)  # real configs, each with its origin, of models that few machines hold
ORIGIN_KEY = "_origin"  # the only key that is ours
FILE = "config.json"


def shipped() -> tuple[str, ...]:
    """Hugging Face ids of the models whose config ships with the suite."""
    return tuple(path.stem.replace("--", "/") for path in sorted(FOLDER.glob("*.json")))


def shipped_config(model_id: str) -> dict[str, Any]:
    """The shipped config of a model id from :func:`shipped`."""
    return read(FOLDER / f"{model_id.replace('/', '--')}.json")


def read(path: Path) -> dict[str, Any]:
    """The config in a JSON file, or in a model folder.

    Raises:
        ConfigError: if it is missing, not JSON, or not an object.
    """
    path = path / FILE if path.is_dir() else path
    return jsonfile.read(path, mend="name a model folder or its config.json; fetch a damaged one anew")


def find(name: str) -> tuple[str, dict[str, Any]]:
    """A config by folder, JSON file or shipped name (with or without the part before the slash).

    Returns:
        the name to show, and the config.

    Raises:
        ConfigError: if nothing answers to the name, or several shipped ones do; or see :func:`read`.
    """
    try:
        path = Path(name).expanduser()
        found = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a null character
        found = False
    if found:
        return name, read(path)
    matching = [one for one in shipped() if name.lower() in (one.lower(), one.rpartition("/")[2].lower())]
    if len(matching) == 1:
        return matching[0], shipped_config(matching[0])
    wrong = (
        f"stands for {' and '.join(matching)}" if matching else "neither a file, a folder nor a shipped name"
    )
    raise _problem(Path(name), wrong, f"name one of: {', '.join(shipped())}")


def _problem(path: Path, wrong: str, mend: str) -> ConfigError:
    return ConfigError([Problem(str(path), "(whole file)", wrong, mend)])

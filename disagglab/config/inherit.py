"""What a lab file extends: its parents' tables with its own laid over them, and which file has which key."""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagglab.config import toml
from disagglab.errors import ConfigError, Problem
from disagglab.paths import LABS

EXTENDS = "extends"
OWN = {"name", "label"}  # what a file does not inherit
FOLDERS = ("id", "tokenizer")  # keys of [model] that may name a folder beside the file


@dataclass(frozen=True)
class LabFile:
    """A lab file with all that it extends.

    ``table``: what one file alone would say. ``text``: such a file; of one that extends nothing, itself.
    ``origins``: the file in which each dotted key stands; a list is one key. A table that several files have
    a part of is its last heir's.
    """

    table: dict[str, Any]
    text: str
    origins: Mapping[str, str]


def path_of(name: str, folder: Path = Path()) -> Path:
    """Where the lab of a name, or of a path that starts at ``folder``, should be."""
    if name.endswith(".toml") or os.sep in name:
        return Path(os.path.normpath(folder / Path(name).expanduser()))
    return LABS / f"{name}.toml"


def known() -> str:
    """The names of the labs that there are."""
    return ", ".join(sorted(file.stem for file in LABS.glob("*.toml")))


def read(path: Path, heirs: tuple[Path, ...] = ()) -> LabFile:
    """A lab file with what it extends, at every level.

    Args:
        heirs: the files by which this one is extended, the first one first.

    Raises:
        ConfigError: if a file is not TOML, or an ``extends`` leads to no file or back to one of ``heirs``.
    """
    raw, text = _parsed(path)
    file = str(path)
    if EXTENDS not in raw:
        return LabFile(raw, text, dict.fromkeys(_keys(raw), file))
    own = {key: value for key, value in raw.items() if key != EXTENDS}
    parent_path = _parent(path, raw[EXTENDS], (*heirs, path))
    parent = read(parent_path, (*heirs, path))
    table = {key: copy.deepcopy(value) for key, value in parent.table.items() if key not in OWN}
    origins = {key: origin for key, origin in parent.origins.items() if key not in OWN}
    _keep_folders(table, parent_path.parent, path.parent)
    _lay(own, table, origins, file)
    note = f"# {path.name} with all that it extends, by way of {parent_path.name}.\n"
    return LabFile(table, note + _written(table, file), origins)


def file_of(key: str, origins: Mapping[str, str], file: str) -> str:
    """The file in which a key of a lab stands, such as ``node[1].cpus``; of an absent one, that of its table.

    ``file``: the lab's own, of keys that have no origin.
    """
    key = key.removeprefix("[").removeprefix("[").removesuffix("]").removesuffix("]")
    while key and key not in origins:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return origins.get(key, file)


def _parsed(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        wrong, mend = f"not TOML: {error}", "correct the line that it names"
        raise ConfigError([Problem(str(path), "(whole file)", wrong, mend)]) from error
    except UnicodeDecodeError as error:
        wrong, mend = f"not UTF-8 text: {error}", "save the file as UTF-8"
        raise ConfigError([Problem(str(path), "(whole file)", wrong, mend)]) from error


def _parent(path: Path, name: Any, family: tuple[Path, ...]) -> Path:
    """The file that ``path`` extends; ``family``: it and its heirs, none of which may be their own parent."""
    file = str(path)
    if not isinstance(name, str) or not name:
        wrong = f"{name!r:.60} names no lab"
        raise ConfigError([Problem(file, EXTENDS, wrong, 'write the name of one lab: extends = "embedded"')])
    found = path_of(name, path.parent)
    if not found.is_file():
        mend = f"use one of {known()}, or a path to a .toml that starts at {path.parent or '.'}"
        raise ConfigError([Problem(file, EXTENDS, f"no such lab file: {found}", mend)])
    if found.resolve() in [each.resolve() for each in family]:
        way = " → ".join(each.name for each in (*family, found))
        raise ConfigError([Problem(file, EXTENDS, f"leads back: {way}", "remove one extends")])
    return found


def _lay(above: Mapping[str, Any], below: dict[str, Any], origins: dict[str, str], file: str) -> None:
    """Lay the keys of ``file`` over what it inherits: tables merge, all else replaces, ``[]`` empties."""

    def lay(above: Mapping[str, Any], below: dict[str, Any], prefix: str) -> None:
        for key, value in above.items():
            name = f"{prefix}{key}"
            inherited = below.get(key)
            if isinstance(value, Mapping) and isinstance(inherited, dict):
                origins[name] = file
                lay(value, inherited, f"{name}.")
                continue
            for gone in [one for one in origins if one == name or one.startswith(f"{name}.")]:
                del origins[gone]
            if value == [] and key in below:
                del below[key]
            else:
                below[key] = copy.deepcopy(value)
                origins.update(dict.fromkeys([name, *_keys(value, f"{name}.")], file))

    lay(above, below, "")


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a table; none of anything else."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        yield f"{prefix}{key}"
        yield from _keys(inner, f"{prefix}{key}.")


def _keep_folders(table: Mapping[str, Any], there: Path, here: Path) -> None:
    """Let relative model folders of a parent in another folder mean what they meant there.

    Such a folder starts with a dot. Whether any other name is a folder depends on the machine that reads it.
    """
    model = table.get("model")
    if there.resolve() == here.resolve() or not isinstance(model, dict):
        return
    for key in FOLDERS:
        value = model.get(key)
        if isinstance(value, str) and value.startswith("."):
            model[key] = str((there / value).resolve())


def _written(table: Mapping[str, Any], file: str) -> str:
    try:
        return toml.dumps(table)
    except TypeError as error:
        problem = Problem(file, "(whole file)", str(error), "write dates and times as text")
        raise ConfigError([problem]) from error

"""Lab files: which nodes, which model, which settings. Read into frozen models; every mistake is reported at
once.

docs/reference/lab-file.md is the reference of the keys; the field descriptions here are its source.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from disagglab.config import checks
from disagglab.config.schema import (
    ControllerSection,
    GateSection,
    HostSection,
    Lab,
    MemorySection,
    ModelSection,
    NodeSection,
    PortsSection,
    RouterSection,
    ScaleSection,
    Section,
    SloSection,
    SpeedSection,
    TransportSection,
    VariantSection,
    VllmSection,
)
from disagglab.errors import ConfigError, Problem
from disagglab.paths import LABS

_SECTIONS: dict[str, tuple[type[Section], bool]] = {
    "model": (ModelSection, True),
    "vllm": (VllmSection, True),
    "controller": (ControllerSection, False),
    "transport": (TransportSection, True),
    "router": (RouterSection, False),
    "ports": (PortsSection, True),
    "memory": (MemorySection, True),
    "scale": (ScaleSection, False),
}
# Without defaults: absent is not the same as empty.
_OPTIONAL: dict[str, type[Section]] = {"slo": SloSection, "speed": SpeedSection}
_LISTS: dict[str, tuple[type[Section], bool]] = {
    "node": (NodeSection, True),
    "gate": (GateSection, False),
    "host": (HostSection, False),
    "variant": (VariantSection, False),
}


def load_lab(name: str) -> Lab:
    """Read a lab by its name (``embedded``) or path (``my/lab.toml``).

    Raises:
        ConfigError: with every problem of the file, each with its key and mend.
    """
    path = find_lab(name)
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            [Problem(str(path), "(whole file)", f"not TOML: {error}", "correct the line that it names")]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            [Problem(str(path), "(whole file)", f"not UTF-8 text: {error}", "save the file as UTF-8")]
        ) from error
    return parse_lab(raw, str(path))


def find_lab(name: str) -> Path:
    """The path of a lab file.

    Raises:
        ConfigError: if there is none; the message lists the labs that there are.
    """
    path = Path(name) if name.endswith(".toml") or os.sep in name else LABS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in LABS.glob("*.toml")))
        raise ConfigError(
            [Problem(str(path), "--lab", "no such lab file", f"use one of {known}, or a path to a .toml")]
        )
    return path


def parse_lab(raw: dict[str, Any], file: str) -> Lab:
    """Check a parsed lab file and build the :class:`Lab`.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    parts: dict[str, Any] = {}
    known = {"name", "label", *_SECTIONS, *_OPTIONAL, *_LISTS}
    for key in raw:
        if key not in known:
            problems.append(Problem(file, key, "unknown key", checks.suggest(key, known)))
    for key in ("name", "label"):
        value = raw.get(key, "")
        if not isinstance(value, str) or (key == "name" and not value):
            wrong = "must be a text" if key in raw else "missing"
            problems.append(Problem(file, key, wrong, f'write {key} = "…" at the top of the file'))
        parts[key] = value
    for key, (section, required) in _SECTIONS.items():
        if key not in raw and required:
            problems.append(Problem(file, f"[{key}]", "section is missing", f"add a [{key}] section"))
        else:
            parts[key] = _parse_section(section, raw.get(key, {}), file, key, problems)
    for key, section in _OPTIONAL.items():
        if key in raw:
            parts[key] = _parse_section(section, raw[key], file, key, problems)
    for key, (section, required) in _LISTS.items():
        rows = raw.get(key, [])
        if isinstance(rows, dict):
            problems.append(
                Problem(file, f"[{key}]", "one bracket on each side", f"write [[{key}]], once for each")
            )
            rows = []
        elif not isinstance(rows, list) or (required and not rows):
            problems.append(Problem(file, f"[[{key}]]", "no entry", f"add a [[{key}]] section for each"))
            rows = []
        parsed = [_parse_section(section, row, file, f"{key}[{i}]", problems) for i, row in enumerate(rows)]
        parts[f"{key}s"] = tuple(row for row in parsed if row is not None)
    problems.extend(checks.contradictions(parts, file))
    if problems:
        raise ConfigError(problems)
    return Lab(file=file, **parts)


def _parse_section(
    section: type[Section], value: Any, file: str, where: str, problems: list[Problem]
) -> Section | None:
    try:
        return section.model_validate(value)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join([where, *(str(part) for part in detail["loc"])])
            problems.append(Problem(file, key, *checks.explain(section, detail)))
        return None


def check_against_model(lab: Lab, max_positions: int) -> None:
    """Refuse a lab whose context length the model does not have.

    Raises:
        ConfigError: if ``max_model_len`` exceeds ``max_positions`` (tokens).
    """
    if lab.model.max_model_len > max_positions:
        raise ConfigError(
            [
                Problem(
                    lab.file,
                    "model.max_model_len",
                    f"{lab.model.max_model_len} tokens, but the model has {max_positions} positions",
                    f"set it to {max_positions} or less",
                )
            ]
        )


def with_release(lab: Lab, version: str) -> Lab:
    """The same lab, served by another release."""
    return lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"version": version})})


def on_workloads(lab: Lab, names: Sequence[str]) -> Lab:
    """The lab with the gates on these workloads alone; with all of them if none is named.

    Raises:
        ConfigError: if a workload has no gate.
    """
    known = dict.fromkeys(gate.workload for gate in lab.gates)
    mend = f"use one of {', '.join(known)}" if known else "remove it: the lab file has no [[gate]]"
    problems = [
        Problem(lab.file, f"--workload {name}", "no gate names it", mend)
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    kept = tuple(gate for gate in lab.gates if not names or gate.workload in names)
    return lab.model_copy(update={"gates": kept})

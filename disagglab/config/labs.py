"""Lab files: which nodes, which model, which settings. Read into frozen models; every mistake is reported at
once.

docs/reference/lab-file.md is the reference of the keys, made from config/schema.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from disagglab.config import checks, inherit
from disagglab.config.head import Head, Section
from disagglab.config.price import PriceSection
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
    SloSection,
    SpeedSection,
    TransportSection,
    VllmSection,
)
from disagglab.config.search_space import TuningSection
from disagglab.config.way_section import WaySection
from disagglab.errors import ConfigError, Problem
from disagglab.problems import problems_of, suggest

SECTIONS: dict[str, tuple[type[Section], bool]] = {
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
OPTIONAL: dict[str, type[Section]] = {
    "slo": SloSection,
    "speed": SpeedSection,
    "price": PriceSection,
    "tuning": TuningSection,
}
LISTS: dict[str, tuple[type[Section], bool]] = {
    "node": (NodeSection, True),
    "gate": (GateSection, False),
    "host": (HostSection, False),
    "way": (WaySection, False),
}


def load_lab(name: str) -> Lab:
    """Read a lab by its name (``embedded``) or path (``my/lab.toml``), with what it extends.

    Raises:
        ConfigError: with every problem of the file, each with its key, the file that has it, and its mend.
    """
    path = find_lab(name)
    found = inherit.read(path)
    return parse_lab(found.table, str(path), found.origins)


def find_lab(name: str) -> Path:
    """The path of a lab file.

    Raises:
        ConfigError: if there is none; the message lists the labs that there are.
    """
    path = inherit.path_of(name)
    if not path.is_file():
        mend = f"use one of {inherit.known()}, or a path to a .toml"
        raise ConfigError([Problem(str(path), "--lab", "no such lab file", mend)])
    return path


def resolved_text(lab: Lab) -> str:
    """The lab's file as TOML, with all that it extends; what ``run.json`` keeps.

    Raises:
        ConfigError: see :func:`disagglab.config.inherit.read`.
    """
    return inherit.read(Path(lab.file)).text


def parse_lab(raw: Mapping[str, Any], file: str, origins: Mapping[str, str] | None = None) -> Lab:
    """Check a parsed lab file and build the :class:`Lab`.

    Args:
        origins: the file in which each dotted key stands, for messages; absent: all in ``file``.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    parts: dict[str, Any] = {}
    unread: set[str] = set()  # lists of which an entry is wrong in itself
    known = {*Head.model_fields, *SECTIONS, *OPTIONAL, *LISTS}
    for key in raw:
        if key not in known:
            problems.append(Problem(file, key, "unknown key", suggest(key, known)))
    top = {key: raw[key] for key in Head.model_fields if key in raw}
    head = _parse_section(Head, top, file, "", problems)
    parts.update(head.model_dump(include={"name", "label"}) if head else {})
    for key, (section, required) in SECTIONS.items():
        if key not in raw and required:
            problems.append(Problem(file, f"[{key}]", "section is missing", f"add a [{key}] section"))
        else:
            parts[key] = _parse_section(section, raw.get(key, {}), file, key, problems)
    for key, section in OPTIONAL.items():
        if key in raw:
            parts[key] = _parse_section(section, raw[key], file, key, problems)
    for key, (section, required) in LISTS.items():
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
        if None in parsed:
            unread.add(key)
    problems.extend(checks.contradictions(parts, file, unread))
    if problems:
        raise ConfigError([_placed(problem, file, origins or {}) for problem in problems])
    elsewhere = {key: place for key, place in (origins or {}).items() if place != file}
    return Lab(file=file, origins=elsewhere, **parts)


def _placed(problem: Problem, file: str, origins: Mapping[str, str]) -> Problem:
    """The problem of the lab ``file`` as one of the file that has its key; of another file as it is."""
    if problem.file != file:
        return problem
    return dataclasses.replace(problem, file=inherit.file_of(problem.key, origins, file))


def _parse_section(
    section: type[Section], value: Any, file: str, where: str, problems: list[Problem]
) -> Section | None:
    try:
        return section.model_validate(value)
    except ValidationError as error:
        problems.extend(problems_of(error, file, section, where))
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
                    lab.where("model.max_model_len"),
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

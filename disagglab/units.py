"""Units of the keys of input files: an annotation, so that messages and pages name them alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, get_args

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Unit:
    """What a number counts."""

    name: str


Seconds = Annotated[float, Unit("s")]
WholeSeconds = Annotated[int, Unit("s")]
Microseconds = Annotated[int, Unit("us")]
Tokens = Annotated[int, Unit("tokens")]
Gib = Annotated[float, Unit("GiB")]


def unit_of(field: FieldInfo) -> str:
    """The unit of a field; empty if it has none."""
    inner = [one for part in get_args(field.annotation) for one in getattr(part, "__metadata__", ())]
    return next((one.name for one in [*field.metadata, *inner] if isinstance(one, Unit)), "")


def meaning_of(field: FieldInfo) -> str:
    """The description of a field with its unit; empty if it has none."""
    return ", ".join(part for part in (field.description, unit_of(field)) if part)


TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h)?")
IN_SECONDS = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(text: str) -> float | None:
    """A time as people write it (50ms, 90, 10m, 10 min, 1.5h), in seconds; None if it is no such text."""
    found = TIME.fullmatch(text.strip())
    return float(found[1]) * IN_SECONDS[found[2]] if found else None


def share(text: str) -> float | None:
    """A share as people write it (5%, 5 %, 0.05); None if it is no such text."""
    bare, percent = text.strip().removesuffix("%").strip(), text.strip().endswith("%")
    try:
        value = float(bare)
    except ValueError:
        return None
    return value / 100 if percent else value

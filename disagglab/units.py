"""Units of the keys of input files: an annotation, so that messages and pages name them alike."""

from __future__ import annotations

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

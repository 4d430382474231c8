"""What pydantic finds wrong with an input file, as the problems that users read: one way for every file."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from disagglab.errors import Problem
from disagglab.units import meaning_of

WHOLE = "(whole file)"
SHOWN = 60  # characters of a wrong value
PLAIN = {"str", "int", "float", "bool"}  # what pydantic puts after a key whose value may have several types


def problems_of(
    error: ValidationError, file: str, model: type[BaseModel] | None = None, where: str = "", mend: str = ""
) -> list[Problem]:
    """Every mistake with file, key, what is wrong and what mends it.

    Args:
        model: that refused the input; its descriptions say what a key means.
        where: key of the table that was given to the model; empty: the whole file.
        mend: in place of a mend for each mistake, where nobody writes such a file by hand.
    """
    found: dict[str, Problem] = {}
    details = error.errors()
    for detail in details:
        loc = detail["loc"]
        if detail["type"] == "too_short" and any(
            each["loc"][: len(loc)] == loc != each["loc"] for each in details
        ):
            continue  # too few because those inside are wrong
        several = loc[-1:] and loc[-1] in PLAIN
        if several:
            loc = loc[:-1]
        key = key_of(where, loc)
        wrong, advice = _explain(detail, loc, model, "" if file.endswith(".json") else " = …")
        if several:
            wrong = f"neither text, number nor true or false, got {_shown(detail)}"
        found.setdefault(key + ("" if several else f" {wrong}"), Problem(file, key, wrong, mend or advice))
    return list(found.values())


def key_of(where: str, loc: Sequence[int | str]) -> str:
    """A key as people write it: ``node[1].cpus``."""
    key = where
    for part in loc:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key or WHOLE


def suggest(key: str, known: Collection[str]) -> str:
    """What mends an unknown key."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"remove it; known keys: {', '.join(sorted(known))}"


def _explain(
    detail: Any, loc: Sequence[int | str], model: type[BaseModel] | None, assign: str
) -> tuple[str, str]:
    """What is wrong and what mends it, for one of pydantic's errors; ``assign``: what follows a key."""
    field, owner = _field(model, loc)
    name = next((part for part in reversed(loc) if isinstance(part, str)), "")
    meaning = f" ({meaning_of(field)})" if field is not None and meaning_of(field) else ""
    match detail["type"]:
        case "extra_forbidden":
            return "unknown key", suggest(name, owner.model_fields if owner else ())
        case "missing":
            return "missing", f"add {name}{assign}{meaning}"
        case "value_error":
            advice = getattr(detail["ctx"]["error"], "mend", f"correct {'it' if loc else 'the values'}")
            return detail["msg"].removeprefix("Value error, "), advice
        case "model_type" | "model_attributes_type" if owner is not None:
            return "not a table", f"write a table with these keys: {', '.join(sorted(owner.model_fields))}"
        case _:
            return f"{detail['msg']}, got {_shown(detail)}", f"correct the value of {name}{meaning}"


def _shown(detail: Any) -> str:
    text = repr(detail["input"])
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _field(
    model: type[BaseModel] | None, loc: Sequence[int | str]
) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """The field that a key belongs to, as far down as models go, and the model that has it or should."""
    field = None
    for part in loc:
        if model is None:
            return field, None
        if (found := model.model_fields.get(str(part))) is None:
            return None, model
        field, model = found, _model_in(found.annotation) or model
        if _model_in(found.annotation) is None:
            break
    return field, model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, if it holds one."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)

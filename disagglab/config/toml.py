"""Tables as TOML text; the standard library reads it and does not write it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(table: Mapping[str, Any]) -> str:
    """Text that :func:`tomllib.loads` makes the same table of.

    Raises:
        TypeError: if a value is neither text, number, boolean, list nor table.
    """
    return "\n".join(_lines(table, "")).strip("\n") + "\n"


def _lines(table: Mapping[str, Any], name: str) -> Iterator[str]:
    """Values first, then the tables inside, each under its header."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping) or _is_tables(value)}
    for key, value in table.items():
        if key not in inner:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in inner.items():
        full = f"{name}.{_key(key)}" if name else _key(key)
        for row in value if isinstance(value, list) else ():
            yield from ("", f"[[{full}]]", *_lines(row, full))
        if isinstance(value, Mapping):
            yield from ("", f"[{full}]", *_lines(value, full))


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{_key(key)} = {_value(inner)}' for key, inner in value.items())} }}"
        case _:
            raise TypeError(f"{value!r} cannot stand in a lab file")


def _text(value: str) -> str:
    """A basic string: JSON's escapes are all TOML's, which also wants one for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

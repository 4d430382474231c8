"""Tables written as TOML: the standard library reads back what was written."""

from __future__ import annotations

import tomllib
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagglab.config import toml

PLAIN = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TABLES = st.dictionaries(
    KEYS,
    st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)),
    max_size=5,
)


@given(TABLES)
def test_what_was_written_is_read_back(table: dict[str, Any]) -> None:
    """Texts with any character, numbers, nested lists and tables, keys that need quotes."""
    assert tomllib.loads(toml.dumps(table)) == table


def test_tables_stand_under_headers() -> None:
    """The form is that of a lab file: values first, then a header for each table and each row of tables."""
    table = {
        "vllm": {"args": {"a": 1}, "version": "0.1.0"},
        "node": [{"cpus": [0]}, {"cpus": []}],
        "name": "x",
    }
    assert toml.dumps(table).splitlines() == [
        'name = "x"', "", "[vllm]", 'version = "0.1.0"', "", "[vllm.args]", "a = 1", "",
        "[[node]]", "cpus = [0]", "", "[[node]]", "cpus = []",
    ]  # fmt: skip


def test_a_date_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot stand in a lab file"):
        toml.dumps({"day": date(2026, 1, 1)})

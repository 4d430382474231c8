"""The file of a packaged model is read once, by whom and how often transformers asks for it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from disagglab.hosts import gguf


def test_a_file_is_read_once_and_a_table_of_names_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who imports the names afterwards, as transformers does in its functions, shares what was made."""
    made: list[object] = []

    class Reader:
        def __init__(self, path: str) -> None:
            made.append(path)

    def table(architecture: int, layers: int) -> dict[str, str]:
        made.append((architecture, layers))
        return {}

    package = ModuleType("gguf")
    vars(package).update(GGUFReader=Reader, get_tensor_name_map=table)
    monkeypatch.setitem(sys.modules, "gguf", package)
    gguf.read_once()
    imported: Any = importlib.import_module("gguf")
    read, names = imported.GGUFReader, imported.get_tensor_name_map
    assert read("a.gguf") is read("a.gguf") is not read("b.gguf")
    assert names(1, 30) is names(1, 30) is not names(1, 2)
    assert made == ["a.gguf", "b.gguf", (1, 30), (1, 2)]

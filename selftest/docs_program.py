"""The programs of docs/ as modules; docs/ is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def loaded(program: Path) -> ModuleType:
    """A program, executed but for its ``main``."""
    spec = importlib.util.spec_from_file_location(f"docs_{program.stem}", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

"""Fixtures end what they have started, however they are left: with a block, or in ``finally``.

The oracle is the source. What follows a ``yield`` in plain order is not reached when something between start
and ``yield`` fails, and the servers then run beside later modules.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from disagglab.paths import ROOT

FOLDERS = ("tests", "disagglab/pytest_plugin", "disagglab/experiments")
MANAGES = ("fixture", "contextmanager")  # in the name of a decorator


def plain_ends(source: str) -> Iterator[str]:
    """Fixtures and context managers in which a plain statement follows a ``yield``."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any(word in ast.unparse(one) for one in function.decorator_list for word in MANAGES):
            continue
        if any(_followed(block) for block in _blocks(function)):
            yield function.name


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _followed(block: list[ast.stmt]) -> bool:
    """Whether a statement that does something follows a ``yield`` in this very block."""
    yields = [place for place, one in enumerate(block) if _is_yield(one)]
    return bool(yields) and any(not isinstance(one, ast.Return) for one in block[yields[0] + 1 :])


def _is_yield(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield)


def test_no_fixture_ends_what_it_started_in_plain_order() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): list(plain_ends(path.read_text())) for path in paths}
    assert not {path: names for path, names in found.items() if names}
    assert sum("yield" in path.read_text() for path in paths) > 8


def test_a_plain_end_is_found() -> None:
    """The control: the form in which the session's servers were ended."""
    fixture = """
@pytest.fixture(scope="session")
def deployment(live):
    deployed = Deployment()
    deployed.launch()
"""
    plain = f"{fixture}    yield deployed\n    deployed.stop()\n"
    kept = f"{fixture}    try:\n        yield deployed\n    finally:\n        deployed.stop()\n"
    assert list(plain_ends(plain)) == ["deployment"]
    assert list(plain_ends(kept)) == []

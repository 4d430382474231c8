"""``disagglab plan``: the same plan as ``pytest --plan``. Oracle: the latter, with the same options."""

from __future__ import annotations

from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.pytest_plugin import plugin

Capture = pytest.CaptureFixture[str]
CASES: tuple[dict[str, Any], ...] = (
    {"--lab": "embedded"},
    {"--lab": "two-h200", "--way": ["stock", "tcp"], "--workload": ["chat"]},
    {"--lab": "embedded", "--vllm": "0.30.0", "--against": "0.31.0", "--dedicated": True},
)


def argv(options: dict[str, Any]) -> list[str]:
    """Options as one types them."""
    found = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        found += [word for one in values for word in ([name] if one is True else [name, one])]
    return found


@pytest.mark.parametrize("options", CASES, ids=lambda options: options["--lab"])
def test_both_doors_print_the_same(options: dict[str, Any], capsys: Capture) -> None:
    """Line by line."""

    class Config:
        @staticmethod
        def getoption(name: str) -> Any:
            return {"--plan": True, **options}.get(name)

    plugin.pytest_cmdline_main(Config())  # type: ignore[arg-type]
    by_pytest = capsys.readouterr().out
    assert main(["plan", *argv(options)]) == 0
    assert capsys.readouterr().out == by_pytest
    assert "# ===== " in by_pytest


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--lab", "nope"], "no such lab file"), (["--lab", "embedded", "--way", "x"], "--way x")],
)
def test_what_cannot_be_planned_is_one_line(options: list[str], named: str, capsys: Capture) -> None:
    """Exit status 2."""
    assert main(["plan", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err

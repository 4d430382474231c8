"""Lets ``pytest --lab /elsewhere/mine.toml`` find the checkout that it is run from.

Before pytest knows an option of a plugin it takes the option's value for a path of tests, and looks for
pytest.ini beside it. An entry point of the package (pyproject.toml) has pytest load this module wherever it
looked. Where that was not the checkout, the same command line is run again with option and value in one word,
which pytest does not take for a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from disagglab.paths import ROOT
from disagglab.pytest_plugin import options

SETTINGS = ROOT / "pytest.ini"
SUITE = "disagglab.pytest_plugin"


def _in_checkout(folder: Path) -> bool:
    return ROOT in (folder, *folder.parents)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """The suite's options, where pytest.ini was not found and pytest would not know them."""
    if _in_checkout(Path.cwd()) and not pluginmanager.hasplugin(SUITE):
        options.pytest_addoption(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    """Run again what was run in the checkout and was led astray by a path that is no test."""
    asked = config.invocation_params
    if config.inipath == SETTINGS or not _in_checkout(asked.dir):
        return None
    words = joined(asked.args)
    return None if words == list(asked.args) else pytest.main(words, plugins=asked.plugins)


def joined(words: Sequence[str | Path]) -> list[str]:
    """A command line with each option of :data:`options.PATHS` and its value in one word."""
    found: list[str] = []
    for word in map(str, words):
        if found and found[-1] in options.PATHS:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found

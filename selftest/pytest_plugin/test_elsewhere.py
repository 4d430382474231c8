"""A lab file may lie anywhere, and pytest finds the suite's settings all the same.

Oracle: sessions in processes of their own, from a copy of the checkout whose path has a space. The entry
point is written from pyproject.toml, so it need not be installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from disagglab.paths import LABS, ROOT
from disagglab.pytest_plugin import elsewhere

LIMIT_S = 120.0
COPIED = ("disagglab", "tests", "labs", "workloads", "conftest.py", "pytest.ini", "pyproject.toml")
PYTEST = {"pytest": [str(Path(sys.executable).with_name("pytest"))], "-m": [sys.executable, "-m", "pytest"]}


@dataclass(frozen=True)
class Place:
    """A checkout, a folder outside of it with a lab file, and variables that make pytest find the plugin."""

    checkout: Path
    outside: Path
    environ: dict[str, str]

    def run(self, how: str, words: Sequence[str], cwd: Path | None = None) -> str:
        """What pytest prints; it has to end with 0."""
        told = subprocess.run(
            [*PYTEST[how], *words],
            cwd=cwd or self.checkout,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
        return told.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Both paths have a space."""
    folder = tmp_path_factory.mktemp("some where")
    checkout, outside, site = (folder / name for name in ("check out", "my labs", "site"))
    checkout.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    outside.mkdir()
    own = (LABS / "embedded.toml").read_text().replace('name = "embedded"', 'name = "mine"')
    (outside / "mine.toml").write_text(own)
    site.mkdir()
    subprocess.run([sys.executable, ROOT / "offline" / "metadata.py", site], check=True, timeout=LIMIT_S)
    environ = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{site}", "PYTHONDONTWRITEBYTECODE": "1"}
    return Place(checkout, outside, environ)


@pytest.mark.parametrize(("how", "given"), [("pytest", "absolute"), ("-m", "relative")])
def test_a_lab_file_outside_of_the_checkout(place: Place, how: str, given: str) -> None:
    """The session has that lab, the checkout's settings and its tests alone."""
    lab = place.outside / "mine.toml"
    path = os.path.relpath(lab, place.checkout) if given == "relative" else str(lab)
    out = place.run(how, ["-m", "hostless", "--lab", path])
    assert f"lab: mine ({path})" in out
    assert f"rootdir: {place.checkout}\nconfigfile: pytest.ini\ntestpaths: tests" in out
    assert "4 selected" in out
    assert "warnings summary" not in out, out


def test_a_folder_outside_of_the_checkout(place: Place, tmp_path: Path) -> None:
    """--resume takes a path as well; so does a session in a folder of the checkout."""
    words = ["-m", "hostless", "--collect-only", "-q", "--resume", str(tmp_path)]
    assert "4/" in place.run("pytest", words).splitlines()[-1]
    words = ["-m", "hostless", "--collect-only", "-q", "--lab", str(place.outside / "mine.toml")]
    assert "4/" in place.run("pytest", words, place.checkout / "tests").splitlines()[-1]


def test_a_plan_of_a_lab_outside_of_the_checkout(place: Place) -> None:
    """--plan needs no settings, and finds its lab."""
    out = place.run("pytest", ["--plan", "--lab", str(place.outside / "mine.toml")])
    assert out.startswith("# Plan of a session with lab mine")


def test_other_projects_do_not_see_the_options(place: Place, tmp_path: Path) -> None:
    """In an environment that holds the suite, pytest elsewhere has no --lab."""
    (tmp_path / "test_own.py").write_text("def test_own(): pass")
    out = place.run("pytest", ["--help"], tmp_path)
    assert "disagg-lab" not in out
    assert "1 passed" in place.run("pytest", [], tmp_path)


def test_options_are_joined_with_their_paths() -> None:
    """And nothing else is touched."""
    words = ["-m", "disagg", "--lab", "/a b/c.toml", "--resume", "/x", "--lab=/y", "--short"]
    joined = ["-m", "disagg", "--lab=/a b/c.toml", "--resume=/x", "--lab=/y", "--short"]
    assert elsewhere.joined(words) == joined
    assert elsewhere.joined(joined) == joined

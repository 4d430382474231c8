"""What broke a session is found once, told once, and named by each test that failed of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from disagglab.errors import ConfigError, InvalidRun, Problem, StartError
from disagglab.paths import ROOT
from disagglab.pytest_plugin.causes import Cause, Causes
from disagglab.serving.death import Death, Died

SESSION_LIMIT_S = 120
DEATH = Death("vllm-b", "vllm-b, decode (pid 7) died at 10:00:00: ended", "E", "C", "M", Path("vllm-b.log"))


class Hosts:
    """What has died by now, as the test says."""

    def __init__(self) -> None:
        self.dead: list[Death] = []
        self.lost: StartError | None = None

    def __call__(self) -> Sequence[Death]:
        if self.lost:
            raise self.lost
        return self.dead


@pytest.fixture
def hosts() -> Hosts:
    """Nothing has died."""
    return Hosts()


def blame(
    causes: Causes, node: str, error: BaseException, shared: bool = False, uses: bool = True
) -> Cause | None:
    """The cause of one failure."""
    return causes.blame(node, error, shared, lambda _: uses)


def test_a_test_that_failed_by_itself_has_no_cause(hosts: Hosts) -> None:
    """An assertion, and an error that the test itself raised."""
    causes = Causes(hosts)
    assert blame(causes, "t::a", AssertionError("1 == 2")) is None
    assert blame(causes, "t::b", InvalidRun("too few")) is None
    assert causes.found == []
    assert causes.lines() == []


def test_a_death_explains_what_its_users_meet(hosts: Hosts) -> None:
    """Whatever they see of it; a test that does not use the process failed by itself."""
    causes = Causes(hosts)
    hosts.dead = [DEATH]
    assert blame(causes, "t::a", AssertionError("500")) is causes.found[0]
    assert blame(causes, "t::b", RuntimeError("connection refused")) is causes.found[0]
    assert blame(causes, "u::c", AssertionError("1 == 2"), uses=False) is None
    (cause,) = causes.found
    assert (cause.line, cause.seen_by, cause.because) == (DEATH.line, "t::a", ["t::a", "t::b"])
    assert causes.stops(lambda _: True) is cause
    assert causes.stops(lambda _: False) is None


def test_an_error_that_names_a_death_is_put_down_to_it(hosts: Hosts) -> None:
    """Also where the test does not use the process by a fixture, and where the error came from another."""
    causes = Causes(hosts)
    hosts.dead = [DEATH]
    assert blame(causes, "t::a", Died(DEATH), uses=False) is causes.found[0]
    wrapped = RuntimeError("later")
    wrapped.__cause__ = Died(DEATH)
    assert blame(causes, "t::b", wrapped, uses=False) is causes.found[0]


def test_a_fixture_that_failed_is_told_once(hosts: Hosts) -> None:
    """pytest raises the same error again for each test that asks for the fixture."""
    causes = Causes(hosts)
    error = StartError("b died while starting\nlikely cause: out of memory")
    for node in ("t::a", "t::b", "u::c"):
        assert blame(causes, node, error, shared=True) is causes.found[0]
    assert causes.lines() == [
        "b died while starting",
        "likely cause: out of memory",
        "because of it 3 tests failed or were not run: t (2), u (1)",
    ]
    assert causes.stops(lambda _: True) is None, "nothing runs that could be used"


def test_what_is_not_there_is_told_once(hosts: Hosts) -> None:
    """Two fixtures look for the same model, each raises an error of its own; they are one cause."""
    causes = Causes(hosts)
    for node in ("t::a", "t::b"):
        error = ConfigError([Problem("lab.toml", "model.id", "not found", "correct the path")])
        assert blame(causes, node, error, shared=True) is causes.found[0]
    (cause,) = causes.found
    assert cause.line == "lab.toml: model.id: not found"


def test_a_lost_host_is_a_cause(hosts: Hosts) -> None:
    """Each call raises a new error; they are one."""
    causes = Causes(hosts)
    hosts.lost = StartError("h: the connection was lost\nmore")
    for node in ("t::a", "t::b"):
        assert blame(causes, node, StartError("h: the connection was lost\nother")) is causes.found[0]
    assert len(causes.found) == 1


def test_a_death_that_no_test_met_is_noted(hosts: Hosts) -> None:
    """When hosts are closed, it is looked for once more."""
    causes = Causes(hosts)
    hosts.dead = [DEATH]
    causes.look()
    causes.look()
    assert [cause.as_row()["text"] for cause in causes.found] == [str(DEATH)]
    assert causes.lines() == str(DEATH).splitlines()


def test_a_session_that_cannot_start_tells_it_once(state: Path, tmp_path: Path) -> None:
    """A real session: a model that is not there. No traceback, one root cause, a line for each test."""
    lab = tmp_path / "lost.toml"
    lab.write_text(f'extends = "embedded"\nname = "lost"\n[model]\nid = "{tmp_path}/nowhere"\n')
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/replicated", "tests/disagg/test_path.py", "--lab", str(lab)],
        capture_output=True,
        text=True,
        timeout=SESSION_LIMIT_S,
        cwd=ROOT,
    )
    assert answer.returncode == 1, answer.stdout
    assert "Traceback" not in answer.stdout
    assert answer.stdout.count(f"{tmp_path}/nowhere") <= 3, "header, cause and its mend"
    _, _, end = answer.stdout.partition(" root cause ")
    assert "because of it " in end
    assert len(end.splitlines()) < 25

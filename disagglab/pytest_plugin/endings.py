"""How tests and a session end: outcomes, root causes, the report, the last lines of the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator
from typing import Any

import pytest

from disagglab.errors import LabError
from disagglab.pytest_plugin.causes import BECAUSE, Cause
from disagglab.pytest_plugin.plugin import SESSION, module_of
from disagglab.pytest_plugin.session import Session
from disagglab.results import report, seconds, speed
from disagglab.results.report import Claim
from disagglab.results.run_folder import Store
from disagglab.results.seconds import Phase

SHORT_SKIP = "Skipped: SHORT: "  # what --short asked for; --no-skips has nothing against it


def _uses(item: pytest.Item, live: Session) -> Callable[[Cause], bool]:
    """Whether a test uses what died: the lab's own servers by a fixture, others by its file."""
    names = getattr(item, "fixturenames", ())

    def uses(cause: Cause) -> bool:
        if live.is_shared(cause.process):
            return "deployment" in names
        return cause.seen_by.partition("::")[0] == item.nodeid.partition("::")[0]

    return uses


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """What a test and its fixtures take counts as theirs, but for what says more exactly what it is."""
    with seconds.spends(Phase.TESTS):
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of servers that have died is not run."""
    live = item.config.stash.get(SESSION, None)
    cause = live.causes.stops(_uses(item, live)) if live is not None and module_of(item) else None
    if cause is not None:
        pytest.fail(f"because of it: {cause.line}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Tests that failed of a root cause are counted by themselves; the cause is told once, at the end."""
    return (BECAUSE, "B", "BECAUSE OF IT") if getattr(report, BECAUSE, None) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Note each test's claim and outcome; tell a failed one's reader where to look next."""
    outcome = yield
    session = item.config.stash.get(SESSION, None)
    module = module_of(item)
    if session is None or module is None:
        return outcome
    short = outcome.skipped and outcome.longrepr[2].startswith(SHORT_SKIP)
    if outcome.skipped and not short and item.config.getoption("--no-skips"):
        outcome.outcome, outcome.longrepr = "failed", f"--no-skips, yet {outcome.longrepr[2]}"
    because = None
    if outcome.failed and call.excinfo is not None:
        shared = call.when == "setup"
        because = session.causes.blame(item.nodeid, call.excinfo.value, shared, _uses(item, session))
    if because is not None:
        outcome.longrepr = f"because of it: {because.line}"
        setattr(outcome, BECAUSE, True)
        session.store.write_meta(root_causes=session.causes.as_rows())
    elif outcome.failed:
        logs = session.store.logs
        outcome.sections.append(
            (
                "where to look",
                f"logs: {logs}\nnext: tail -n 40 {logs}/*.log\nagain: pytest {shlex.quote(item.nodeid)}"
                f" --lab {session.lab.name}",
            )
        )
    if outcome.when == "call" or outcome.outcome != "passed":
        document = getattr(getattr(item, "function", None), "__doc__", None) or item.name
        claimed = " ".join(document.strip().partition("\n\n")[0].split())
        label = f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""
        reason = outcome.longrepr if because else ""
        reason = outcome.longrepr[2].removeprefix("Skipped: ") if outcome.skipped else reason
        state = outcome.outcome if outcome.when == "call" or outcome.skipped else "error"
        claim = Claim(item.nodeid, claimed.rstrip(".") + label, state, outcome.duration, reason)
        session.add_claim(module, item.path.parent / "README.md", claim)
    return outcome


def pytest_html_report_title(report: Any) -> None:
    """The report's title."""
    report.title = "disagg-lab report"


def pytest_html_results_summary(prefix: list[str], session: pytest.Session) -> None:
    """Put our part in front of pytest-html's table of tests."""
    live = session.config.stash.get(SESSION, None)
    if live is not None:
        invalid = live.comparison.invalid() if live.comparison else []
        prefix.append(report.render(live.lab, live.store, list(live.modules.values()), invalid))


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
    """Close the run's folder before the report is written, then look at what was written.

    A session that proved nothing has failed, as has one whose folder must not be kept as it is.
    """
    live = session.config.stash.get(SESSION, None)
    if live is None:
        yield
        return
    if live.causes.found and exitstatus == pytest.ExitCode.OK:  # an interrupt stays one
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    live.store.write_meta(
        root_causes=live.causes.as_rows(),
        speed={**live.store.meta["speed"], "after": speed.probe()},
        exitstatus=int(session.exitstatus),
        modules={m.name: [vars(claim) for claim in m.tests] for m in live.modules.values()},
        seconds=seconds.so_far(),
    )
    claims = [claim for module in live.modules.values() for claim in module.tests]
    if exitstatus == pytest.ExitCode.OK and not any(claim.outcome == "passed" for claim in claims):
        live.store.write_meta(nothing_proved=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    with seconds.spends(Phase.REPORT):
        yield
        live.unfit = _unfit(live.store)
    if live.unfit:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    else:
        live.store.point_latest()


def _unfit(store: Store) -> str:
    """Why the run's folder must not be kept as it is; empty if it may."""
    try:
        store.require_no_secret()
        page = store.folder / "report.html"
        if page.is_file() and page.stat().st_size > report.SIZE_LIMIT_BYTES:
            raise LabError(f"{page} has {page.stat().st_size:,} B, more than {report.SIZE_LIMIT_BYTES:,} B")
    except LabError as error:
        return str(error)
    return ""


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The verdicts, and where the time went."""
    live = config.stash.get(SESSION, None)
    if live is None:
        return
    spent = seconds.so_far()
    live.store.write_meta(seconds=spent)
    if live.causes.found:
        terminalreporter.section("root cause", red=True, bold=True)
        for line in live.causes.lines():
            terminalreporter.write_line(line)
    if live.store.verdicts or live.store.meta.get("not_judged"):
        terminalreporter.section(f"verdicts ({live.lab.label or live.lab.name})")
        for line in report.verdict_lines(live.store):
            terminalreporter.write_line(line)
    if live.lab.shared:
        terminalreporter.write_line(f"servers share {live.lab.shared}: the path counts, no time or rate does")
    if live.store.meta.get("nothing_proved"):
        terminalreporter.write_line("FAILED: every test was skipped; this session proved nothing", red=True)
    if live.unfit:
        terminalreporter.write_line(f"FAILED: {live.unfit}", red=True)
    terminalreporter.write_line(seconds.line(spent))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line says where the report is."""
    live = config.stash.get(SESSION, None)
    if live is None:
        return
    page = live.store.folder / "report.html"
    live.terminal.write(f"report: {page if page.is_file() else 'none written'}\n")
    live.terminal.flush()

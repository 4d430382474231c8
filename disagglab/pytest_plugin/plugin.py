"""Markers, the run's folder, the report. Options: options.py; fixtures: fixtures.py."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Generator
from typing import Any

import pytest

from disagglab.config.labs import load_lab, resolved_text
from disagglab.config.precondition import PRECONDITIONS, skip_reason
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, LabError
from disagglab.experiments import plan
from disagglab.experiments.asked import Asked, Chosen, choose, require_here
from disagglab.paths import REPORTS, ROOT
from disagglab.pytest_plugin.causes import BECAUSE, Cause
from disagglab.pytest_plugin.options import DEFAULT_ROUNDS, SHORT_ROUNDS, pytest_addoption
from disagglab.pytest_plugin.session import Session
from disagglab.results import fingerprint, report, resume, speed
from disagglab.results.recorder import VIRTUAL_CLOCK, saved_name
from disagglab.results.report import Claim
from disagglab.results.run_folder import Store, new_run_id

__all__ = ["SESSION", "module_of", "pytest_addoption"]  # the last is a hook of pytest

SESSION = pytest.StashKey[Session]()

LISTINGS = (
    "collectonly",
    "help",
    "version",
    "markers",
    "showfixtures",
    "show_fixtures_per_test",
    "cacheshow",
)
SHORT_SKIP = "Skipped: SHORT: "  # what --short asked for; --no-skips has nothing against it
MODULES = {
    "environment": "facts of every node, as tests",
    "baseline": "one node alone: the bar to beat",
    "kvcache": "KV cache: arithmetic against the running engine",
    "replicated": "two equal servers behind round robin",
    "disagg": "prefill and decode apart, KV over NIXL",
    "routing": "which server gets a request: hit rates of routing strategies",
    "dynamo": "NVIDIA Dynamo: etcd, NATS, frontend, workers, and all together",
}


def _tests_lab(config: pytest.Config) -> bool:
    """Whether this session runs experiments (tests/), not only selftests or a listing."""
    if any(getattr(config.option, name, False) for name in LISTINGS):
        return False
    roots = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args]
    return any(root == ROOT or (ROOT / "tests") in (root, *root.parents) for root in roots)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """With --plan, print the commands in place of a session: no run folder, no collection, no tests."""
    if not config.getoption("--plan"):
        return None
    try:
        found = plan.lines(_asked(config))
    except LabError as error:
        raise pytest.UsageError(str(error)) from error
    print("\n".join(found))
    return int(pytest.ExitCode.OK)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the lab file before anything starts; point report and benchmark storage at the run's folder."""
    for name, what in MODULES.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    config.addinivalue_line("markers", "hostless: needs no host, only the lab file and a model's config.json")
    config.addinivalue_line("markers", "dedicated: runs only with --dedicated")
    config.addinivalue_line(
        "markers", f"lab_has(name, …): runs only with labs that have {', '.join(PRECONDITIONS)}"
    )
    if not _tests_lab(config):
        return
    try:
        asked = _asked(config)
        chosen = choose(asked)
        require_here(asked, chosen)
        earlier = _earlier(config, chosen)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SESSION] = _open_session(config, chosen, earlier)


def _asked(config: pytest.Config) -> Asked:
    """What the command line asks for, of a session and of ``--plan``."""
    return Asked(
        lab=config.getoption("--lab"),
        vllm=config.getoption("--vllm") or "",
        against=config.getoption("--against") or "",
        workloads=tuple(config.getoption("--workload") or ()),
        variants=tuple(config.getoption("--variant") or ()),
        arms=tuple(config.getoption("--arm") or ()),
        without=tuple(config.getoption("--without") or ()),
        dedicated=bool(config.getoption("--dedicated")),
    )


def _earlier(config: pytest.Config, chosen: Chosen) -> resume.Earlier:
    """The sessions of --resume, checked to have measured what this one will."""
    folders = [config.invocation_params.dir / name for name in config.getoption("--resume")]
    if not folders:
        return resume.Earlier()
    lab, names = chosen.lab, [one.name for one in chosen.variants]
    machine = fingerprint.of_machine(lab.vllm.version)
    return resume.read(folders, lab, names, machine, fingerprint.commit(), chosen.arms.kept)


def _open_session(config: pytest.Config, chosen: Chosen, earlier: resume.Earlier) -> Session:
    lab = chosen.lab
    run_id = new_run_id()
    store = Store.create(REPORTS, run_id)
    machine = fingerprint.of_machine(lab.vllm.version)
    options = config.option
    options.htmlpath = options.htmlpath or str(store.folder / "report.html")
    options.self_contained_html = True
    options.css = [*options.css, str(report.CSS)]
    # pytest-benchmark opens its storage now, before a host is reached; its files have the whole fingerprint
    options.benchmark_storage = f"file://{REPORTS}/benchmarks/{lab.name}-{machine[fingerprint.KEY]}"
    options.benchmark_autosave = options.benchmark_autosave or saved_name(lab.vllm.version, run_id)
    options.benchmark_save_data = True
    options.benchmark_json = options.benchmark_json or str(store.folder / "benchmark.json")
    options.benchmark_group_by = "group"
    options.benchmark_columns = ["min", "median", "max", "stddev", "rounds"]
    options.benchmark_sort = "name"
    short = config.getoption("--short")
    rounds = config.getoption("--rounds") or (SHORT_ROUNDS if short else DEFAULT_ROUNDS)
    capture = config.pluginmanager.getplugin("capturemanager")
    store.write_meta(
        command=shlex.join(["pytest", *config.invocation_params.args]),
        run=run_id,
        lab=lab.name,
        vllm=lab.vllm.version,
        variants=config.getoption("--variant"),
        arms=list(chosen.arms.kept),
        arms_left_out=list(chosen.arms.left_out),
        against=config.getoption("--against") or "",
        lab_file=resolved_text(lab),
        model=lab.model.id,
        commit=fingerprint.commit(),
        fingerprint=machine,
        speed={"before": speed.probe()},
    )
    return Session(
        lab=lab,
        store=store,
        run_id=run_id,
        short=short,
        rounds=rounds,
        max_rounds=config.getoption("--max-rounds"),
        dedicated=config.getoption("--dedicated"),
        against=config.getoption("--against") or "",
        endings=config.getoption("--endings"),
        variants=tuple(config.getoption("--variant")),
        arms=chosen.arms,
        earlier=earlier,
        terminal=os.fdopen(os.dup(2), "w"),
        uncaptured=capture.global_and_fixture_disabled if capture else contextlib.nullcontext,
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Where this session runs and writes."""
    session = config.stash.get(SESSION, None)
    if session is None:
        return []
    return [
        f"lab: {session.lab.name} ({session.lab.file})",
        f"run: {session.store.folder}; machine speed: {speed.text(session.store.meta['speed']['before'])}",
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case a gate of the lab file for tests that ask for ``gate``."""
    if "gate" in metafunc.fixturenames:
        lab = _lab_of(metafunc.config)
        cases = [pytest.param(gate, id=f"{gate.workload}-{gate.metric}") for gate in lab.gates]
        metafunc.parametrize("gate", cases or [pytest.param(None, id="none")])


def _lab_of(config: pytest.Config) -> Lab:
    """The lab of the session, or of a listing, which has none."""
    session = config.stash.get(SESSION, None)
    return session.lab if session else load_lab(config.getoption("--lab"))


def module_of(item: pytest.Item) -> str | None:
    """The learning module a test belongs to: the folder below tests/."""
    parts = item.path.relative_to(ROOT).parts if item.path.is_relative_to(ROOT) else ()
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests with their module; run modules in order, in each what needs no server first, dedicated
    servers last.
    """
    order = {name: position for position, name in enumerate(MODULES)}
    for item in items:
        module = module_of(item)
        if module is not None:
            item.add_marker(module)
            if "timing" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.benchmark(timer=VIRTUAL_CLOCK, group=module))

    def position(item: pytest.Item) -> tuple[bool, int, bool]:
        dedicated = item.get_closest_marker("dedicated") is not None
        needs_servers = "deployment" in getattr(item, "fixturenames", ())
        return dedicated, order.get(module_of(item) or "", len(order)), needs_servers

    items.sort(key=position)
    asking = [item for item in items if item.get_closest_marker("lab_has")]
    if asking:
        lab = _lab_of(config)
        for item in asking:
            skip_without_preconditions(item, lab)
    if not config.getoption("--dedicated"):
        skip = pytest.mark.skip(reason="DEDICATED: asked for with --dedicated")
        for item in items:
            if item.get_closest_marker("dedicated") is not None:
                item.add_marker(skip)


def _uses(item: pytest.Item, live: Session) -> Callable[[Cause], bool]:
    """Whether a test uses what died: the lab's own servers by a fixture, others by its file."""
    names = getattr(item, "fixturenames", ())

    def uses(cause: Cause) -> bool:
        if live.is_shared(cause.process):
            return "deployment" in names
        return cause.seen_by.partition("::")[0] == item.nodeid.partition("::")[0]

    return uses


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


def skip_without_preconditions(item: pytest.Item, lab: Lab) -> None:
    """Skip a test whose marker ``lab_has`` names what the lab has not got, before anything starts.

    Raises:
        pytest.UsageError: if the marker names no precondition.
    """
    names = [name for marker in item.iter_markers("lab_has") for name in marker.args]
    unknown = [name for name in names if name not in PRECONDITIONS]
    if unknown or not names:
        raise pytest.UsageError(f"{item.nodeid}: lab_has{tuple(unknown)}; known: {', '.join(PRECONDITIONS)}")
    reason = skip_reason(lab, names)
    if reason:
        item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any] | None:
    """What results depend on, in place of pytest-benchmark's own list (which holds the momentary clock
    speed).
    """
    session = config.stash.get(SESSION, None)
    return None if session is None else {"node": session.lab.name, **session.store.meta["fingerprint"]}


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
    if live.causes.found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    live.store.write_meta(
        root_causes=live.causes.as_rows(),
        speed={**live.store.meta["speed"], "after": speed.probe()},
        exitstatus=int(session.exitstatus),
        modules={m.name: [vars(claim) for claim in m.tests] for m in live.modules.values()},
    )
    claims = [claim for module in live.modules.values() for claim in module.tests]
    if exitstatus == pytest.ExitCode.OK and not any(claim.outcome == "passed" for claim in claims):
        live.store.write_meta(nothing_proved=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    yield
    try:
        live.store.require_no_secret()
        page = live.store.folder / "report.html"
        if page.is_file() and page.stat().st_size > report.SIZE_LIMIT_BYTES:
            raise LabError(f"{page} has {page.stat().st_size:,} B, more than {report.SIZE_LIMIT_BYTES:,} B")
    except LabError as error:
        live.unfit = str(error)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    else:
        live.store.point_latest()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The verdicts, and where the report is."""
    live = config.stash.get(SESSION, None)
    if live is None:
        return
    if live.causes.found:
        terminalreporter.section("root cause", red=True, bold=True)
        for line in live.causes.lines():
            terminalreporter.write_line(line)
    if live.store.verdicts or live.store.meta.get("not_judged"):
        terminalreporter.section(f"verdicts ({live.lab.label or live.lab.name})")
        for line in report.verdict_lines(live.store):
            terminalreporter.write_line(line)
    if live.lab.shares_cpus:
        terminalreporter.write_line("servers share cores (share_cpus): the path counts, no time or rate does")
    if live.store.meta.get("nothing_proved"):
        terminalreporter.write_line("FAILED: every test was skipped; this session proved nothing", red=True)
    if live.unfit:
        terminalreporter.write_line(f"FAILED: {live.unfit}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line says where the report is."""
    live = config.stash.get(SESSION, None)
    if live is None:
        return
    page = live.store.folder / "report.html"
    live.terminal.write(f"report: {page if page.is_file() else 'none written'}\n")
    live.terminal.flush()

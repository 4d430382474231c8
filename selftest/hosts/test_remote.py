"""A remote host does what this machine does, through a real SSH server.

The server is on the loopback interface, so psutil here sees what runs there. Oracle: psutil, the file system,
and what the programs themselves print.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from disagglab.errors import InvalidRun, LabError, StartError, TransferError
from disagglab.hosts import remote
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Connection, target

if TYPE_CHECKING:
    from selftest.conftest import SshServer, Standins

TREE = ["sh", "-c", "echo $$ > child; sleep 300 & echo $! > grandchild; wait"]
SHOW_WORDS = "import json, sys; print(json.dumps(sys.argv[1:]))"
WORDS = [
    "",
    " ",
    "two words",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "a\nb",
    "*",
    "[a-z]?",
    "~",
    "\\",
    "%s",
    "ü",
]
PORTS = (20500, 20599)  # of no lab
GRACE_S = 0.3


@pytest.fixture(scope="module")
def host(sshd: SshServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteHost]:
    """A connected host that no test ends; its logs are fetched often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "FOLLOW_S", 0.1)
        section = sshd.section(heartbeat_s=30.0)
        made = RemoteHost(
            section,
            Connection(target(section)),
            f"run-{uuid.uuid4().hex[:6]}",
            PORTS,
            tmp_path_factory.mktemp("logs"),
        )
        yield made
        made.close()
        made.disconnect()


def test_a_process_there_is_as_a_process_here(host: RemoteHost, standins: Standins) -> None:
    """Started, seen, stopped; the same object as for this machine, with pids of the host."""
    process = host.start("standin", TREE, {}, grace_s=GRACE_S)
    child, grandchild = (standins.told(f"{host.about['logs']}/{file}") for file in ("child", "grandchild"))
    assert (process.pid, process.alive, process.tree()) == (child.pid, True, [child.pid, grandchild.pid])
    assert not host.is_local
    process.stop()
    assert standins.gone(child, grandchild)
    assert not process.alive
    assert process.ended is not None
    assert process.ended["reason"] == "stop"


def test_a_log_comes_here_while_it_is_written(host: RemoteHost, standins: Standins) -> None:
    """Without being asked for, byte for byte, megabytes at once; stop returns when all is here."""
    program = "import os, sys, time; os.write(1, bytes(range(256)) * 8192); time.sleep(300)"
    process = host.start("talker", [sys.executable, "-I", "-S", "-c", program], {}, grace_s=GRACE_S)
    assert process.log == host.logs / "talker.log"
    standins.until(lambda: process.log.stat().st_size == 256 * 8192, "the log has come by itself")
    assert process.log.read_bytes() == bytes(range(256)) * 8192
    last = host.start("last", ["sh", "-c", "echo last words; exit 3"], {})
    standins.until(lambda: not last.alive, "it has ended")
    last.stop()
    assert last.log.read_text() == "last words\n"
    assert last.ended is not None
    assert last.ended["code"] == 3


def test_a_program_that_fails_there_shows_its_last_words(host: RemoteHost) -> None:
    """Host, command and what it printed; one that takes too long is ended."""
    assert host.run("good", ["sh", "-c", "echo one; echo two"], {}, 10.0) == ["one", "two"]
    with pytest.raises(LabError, match=r"bad on there ended with .*'code': 3(.|\n)*no luck"):
        host.run("bad", ["sh", "-c", "echo no luck; exit 3"], {}, 10.0)
    with pytest.raises(LabError, match=r"slow on there did not end within 0\.3 s"):
        host.run("slow", ["sleep", "300"], {}, 0.3)


def test_words_arrive_as_they_are(host: RemoteHost) -> None:
    """Blanks, quotes, dollars, newlines, globs: no shell on the way changes an argument."""
    python = [sys.executable, "-I", "-S", "-c", SHOW_WORDS]
    (line,) = host.run("words", [*python, *WORDS], {"SPACED": "a b\n$c"}, 20.0)
    assert json.loads(line) == WORDS
    command = " ".join(["%s"] * (len(python) + len(WORDS)))
    assert json.loads(host.facts.check_output(command, *python, *WORDS)) == WORDS
    (line,) = host.run(
        "env", [*python[:-1], "import os; print(repr(os.environ['SPACED']))"], {"SPACED": "a b\n$c"}, 20
    )
    assert line == repr("a b\n$c")


def test_facts_are_read_there(host: RemoteHost, sshd: SshServer) -> None:
    """Over the same connection, with the environment that SSH sets there, and statuses of failures."""
    facts = host.facts
    assert facts.check_output("echo $HOME") == str(sshd.home)
    assert facts.file(str(sshd.host_key)).exists
    assert facts.run("exit 7").rc == 7
    assert facts.run("ls %s", "/no such/file").stderr.strip().endswith("No such file or directory")


def test_a_secret_is_in_no_command_line_and_no_log(
    host: RemoteHost, sshd: SshServer, standins: Standins
) -> None:
    """The environment travels inside of the channel: no process list and no file there or here has it."""
    secret = f"hf_{uuid.uuid4().hex}"
    owned = host.start("secretive", TREE, {"HF_TOKEN": secret}, grace_s=GRACE_S)
    child = standins.watch(owned.pid)
    assert child.environ()["HF_TOKEN"] == secret, "the command did not get its environment"
    shown = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert any(" sleep 300" in line for line in shown)
    assert not any(secret in line for line in shown)
    host.follow("secretive")
    files = [path for folder in (sshd.state, host.logs) for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".json" for path in files), "the lease was looked at"
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in sshd.log.read_text()


def test_errors_there_are_errors_here(host: RemoteHost, sshd: SshServer) -> None:
    """What the deputy raises keeps its class and gets the host's name; the system's own are StartErrors."""
    with pytest.raises(StartError, match=r"there: standin: could not start /no/such/vllm: .*No such file"):
        host.start("standin", ["/no/such/vllm"], {})
    with pytest.raises(StartError, match="there: KeyError: 'nobody'"):
        host.call("stop", "nobody")
    with pytest.raises(StartError, match=r"there: FileNotFoundError: .*/no/such/file"):
        host.read_text("/no/such/file")
    assert host.exists(str(sshd.home)), "the deputy lives on"


def test_files_and_ports_of_the_host(host: RemoteHost, tmp_path: Path) -> None:
    """A file travels both ways whatever is in it; a reserved port is held there."""
    path = str(tmp_path / "a file")
    host.write_text(path, "one\ntwo ü\x00" + "x" * 2**20)
    assert host.read_text(path) == "one\ntwo ü\x00" + "x" * 2**20
    assert host.exists(path)
    assert not host.exists(f"{path}s")
    port = host.reserve_port("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert abs(host.memory_available() - psutil.virtual_memory().available) < 2**30


def test_two_threads_get_their_own_answers(host: RemoteHost, tmp_path: Path) -> None:
    """Calls of two threads, and the log's, go one after another."""
    right: list[str] = []

    def ask(who: str) -> None:
        (tmp_path / who).write_text(who * 1000)
        for _ in range(50):
            if host.read_text(str(tmp_path / who)) == who * 1000:
                right.append(who)

    threads = [threading.Thread(target=ask, args=(who,)) for who in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [right.count(who) for who in ("one", "two")] == [50, 50]


def test_the_class_of_an_error_is_never_made_up(host: RemoteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of ours that takes a message is raised as such; any other is a StartError."""
    stock = host.line._receive
    raised: dict[str, type[LabError]] = {}
    kind = ""

    def receive(limit_s: float) -> dict[str, Any]:
        answer = stock(limit_s)
        return {"id": answer["id"], "error": "why", "kind": kind}

    for kind in ("LabError", "InvalidRun", "TransferError", "ConfigError", "Path", "KeyError"):
        with monkeypatch.context() as patch:
            patch.setattr(host.line, "_receive", receive)
            with pytest.raises(LabError, match="there: why") as caught:
                host.call("exists", "/")
        raised[kind] = type(caught.value)
    assert raised == {
        "LabError": LabError,
        "InvalidRun": InvalidRun,
        "TransferError": TransferError,
        "ConfigError": StartError,
        "Path": StartError,
        "KeyError": StartError,
    }

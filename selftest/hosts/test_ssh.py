"""Connections against a real OpenSSH server: who is let in, who is refused, and what the message mends.

Oracles: ssh-keygen and ssh-keyscan for keys, and the commands that an error prints, which are run as they are
printed.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from disagglab.config.schema import HostSection
from disagglab.errors import StartError
from disagglab.hosts import ssh
from disagglab.hosts.ssh import Connection, target

if TYPE_CHECKING:
    from selftest.conftest import SshServer, Standins

MIB = 2**20
SHELL_LIMIT_S = 20
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither keys of an agent nor files of the real home take part."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def connection(sshd: SshServer) -> Iterator[Connection]:
    """An open connection."""
    made = Connection(target(sshd.section()))
    yield made
    made.close()


def refused(section: HostSection) -> str:
    """Why a connection is refused."""
    with pytest.raises(StartError) as caught:
        Connection(target(section))
    return str(caught.value)


def shell(command: str) -> str:
    """What a shell prints for a command, as a reader would paste it."""
    argv = ["sh", "-c", command]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=SHELL_LIMIT_S).stdout


def fingerprint(key: Path) -> str:
    """A key's fingerprint, as OpenSSH computes it."""
    return shell(f"ssh-keygen -lf {key}.pub").split()[1]


def test_a_command_gives_its_status_and_both_streams(connection: Connection) -> None:
    """Exit status, standard output and standard error arrive apart."""
    answer = connection.run("echo out; echo err >&2; exit 7")
    assert answer == ssh.Answer(7, b"out\n", b"err\n")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_an_unknown_host_key_is_refused_with_the_command_that_adds_it(
    another_sshd: Callable[[str], SshServer], tmp_path: Path, kind: str
) -> None:
    """The key is shown as ssh-keygen shows it, nothing is accepted unseen, and the printed command works."""
    server = another_sshd(kind)
    known = tmp_path / "known"
    known.write_text("# nobody yet\n")
    section = server.section(known_hosts=str(known))

    said = refused(section)

    assert f"there ({getpass.getuser()}@127.0.0.1, port {server.port})" in said
    assert fingerprint(server.host_key) in said
    assert known.read_text() == "# nobody yet\n"
    (scan,) = re.findall(r"if they are equal, add it: (.*)", said)
    assert scan == f"ssh-keyscan -t {kind} -p {server.port} 127.0.0.1 >> {known}"
    (show,) = re.findall(r"show it from here: (.*)", said)
    assert fingerprint(server.host_key) in shell(show)
    (there,) = re.findall(r"ssh-keygen -lf (/\S+)", said)
    assert there == f"/etc/ssh/ssh_host_{kind}_key.pub", "where OpenSSH keeps a key of this kind"
    shell(scan)
    Connection(target(section)).close()


def test_a_changed_host_key_is_refused_with_the_command_that_forgets_it(
    sshd: SshServer, tmp_path: Path
) -> None:
    """Both keys are shown; the printed command removes just the old one, and the next try says unknown."""
    known = tmp_path / "known"
    other = f"other {sshd.public(sshd.client_key)}\n"
    known.write_text(f"{sshd.name} {sshd.public(sshd.client_key)}\n{other}")
    section = sshd.section(known_hosts=str(known))

    said = refused(section)

    assert "CHANGED" in said
    assert fingerprint(sshd.host_key) in said
    assert fingerprint(sshd.client_key) in said
    (forget,) = re.findall(r"ssh-keygen -R .*", said)
    shell(forget)
    assert known.read_text() == other
    assert "is not known" in refused(section)


def test_a_wrong_key_is_named(sshd: SshServer, tmp_path: Path) -> None:
    """A key that the host does not know: which one was tried, and how to see more."""
    key = sshd._key(tmp_path / "stranger")
    said = refused(sshd.section(key_file=str(key)))
    assert f"keys tried: {key}" in said
    assert f"ssh -v -p {sshd.port} {getpass.getuser()}@127.0.0.1" in said


def test_a_key_file_that_is_not_there_is_named(sshd: SshServer, tmp_path: Path) -> None:
    """A slip of the pen in key_file is not a riddle about authentication."""
    said = refused(sshd.section(key_file=str(tmp_path / "nowhere")))
    assert "does not let us in" in said
    assert f"not there: {tmp_path / 'nowhere'}" in said


@pytest.mark.parametrize("content", ["", "garbage\n", "ssh-ed25519 AAAA public\n", PRIVATE.format("AAAA")])
def test_a_key_file_that_is_no_key_is_named(sshd: SshServer, tmp_path: Path, content: str) -> None:
    """A public key in its place, say; the host was reached, and the message does not deny it."""
    key = tmp_path / "key"
    key.write_text(content)
    said = refused(sshd.section(key_file=str(key)))
    assert "does not let us in" in said
    assert f"keys tried: {key}" in said


def test_a_key_with_a_passphrase_wants_an_agent(sshd: SshServer, tmp_path: Path) -> None:
    """Nothing asks at a terminal; the mend is ssh-add."""
    key = tmp_path / "locked"
    shell(f"ssh-keygen -q -t ed25519 -N secret -f {key}")
    assert f"ssh-add {key}" in refused(sshd.section(key_file=str(key)))


def test_an_address_where_nobody_listens_is_named(sshd: SshServer) -> None:
    """Refused at once, with address and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        said = refused(sshd.section(port=port))
    assert f"there ({getpass.getuser()}@127.0.0.1, port {port}): not reached" in said


def test_a_name_that_nobody_knows_is_an_error_with_its_mend(sshd: SshServer) -> None:
    """A name of the lab file that neither DNS nor ~/.ssh/config resolves."""
    said = refused(sshd.section(address="no-such-host.invalid"))
    assert "the name no-such-host.invalid is not known" in said
    assert "~/.ssh/config" in said


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-mute\r\n"])
def test_a_peer_that_says_nothing_is_given_up_in_time(sshd: SshServer, greeting: bytes) -> None:
    """It accepts and is silent, before or after its greeting: connect_s ends the wait."""
    limit_s = 0.5
    with socket.create_server(("127.0.0.1", 0)) as mute:

        def greet() -> None:
            peers.append(mute.accept()[0])
            peers[0].sendall(greeting)

        peers: list[socket.socket] = []
        thread = threading.Thread(target=greet)
        thread.start()
        began = time.monotonic()
        said = refused(sshd.section(port=mute.getsockname()[1], connect_s=limit_s))
        took = time.monotonic() - began
        thread.join()
        peers[0].close()
    assert f"not reached within {limit_s:g} s" in said
    assert limit_s <= took < 3 * limit_s + 1.0


def test_a_jump_host_carries_the_connection(sshd: SshServer, standins: Standins) -> None:
    """The second connection ends with the first, because it goes through it."""
    gate = Connection(target(sshd.section()))
    inner = Connection(target(sshd.section()), gate)
    assert inner.run("echo through").out == b"through\n"
    assert gate.run("echo beside").out == b"beside\n"

    gate.close()

    with pytest.raises(StartError, match="the connection is lost"):
        inner.run("true")
    inner.close()


def test_a_jump_host_that_cannot_reach_the_next_is_named(sshd: SshServer, connection: Connection) -> None:
    """Which host could not reach which address, so that one knows where to look."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(StartError, match=rf"there .*cannot reach 127\.0\.0\.1:{port} from there"):
            Connection(target(sshd.section(port=port)), connection)


def test_what_the_lab_file_leaves_out_comes_from_the_ssh_configuration(
    sshd: SshServer, tmp_path: Path
) -> None:
    """HostName, Port, User, IdentityFile, UserKnownHostsFile; what the lab file says wins."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text(
        f"Host gpu-1\n    HostName 127.0.0.1\n    Port {sshd.port}\n    User {getpass.getuser()}\n"
        f"    IdentityFile {sshd.client_key}\n    UserKnownHostsFile {sshd.known_hosts}\n"
        "Host *\n    User ada\n"
    )

    found = target(HostSection(name="gpu-1"))

    assert found == ssh.Target(
        name="gpu-1",
        address="127.0.0.1",
        port=sshd.port,
        user=getpass.getuser(),
        keys=(str(sshd.client_key),),
        known_hosts=(str(sshd.known_hosts),),
        jump=None,
        connect_s=15,
        silence_s=20,
    )
    assert target(HostSection(name="gpu-2")).user == "ada"
    connection = Connection(found)
    assert connection.run("echo in").out == b"in\n"
    connection.close()
    assert target(HostSection(name="gpu-1", port=22, user="eve", key_file="~/k")) == ssh.Target(
        name="gpu-1",
        address="127.0.0.1",
        port=22,
        user="eve",
        keys=(str(tmp_path / "k"),),
        known_hosts=(str(sshd.known_hosts),),
        jump=None,
        connect_s=15,
        silence_s=20,
    )


def test_without_a_configuration_there_are_defaults(tmp_path: Path) -> None:
    """Name as address, port 22, our own account, the files that ssh reads."""
    found = target(HostSection(name="gpu-1"))
    assert (found.address, found.port, found.user, found.keys) == ("gpu-1", 22, getpass.getuser(), ())
    assert found.known_hosts == ("/etc/ssh/ssh_known_hosts", str(tmp_path / ".ssh" / "known_hosts"))


@pytest.mark.parametrize("line", ["ProxyJump gate", "ProxyCommand ssh -W %h:%p gate"])
def test_a_way_that_is_not_followed_is_refused(tmp_path: Path, line: str) -> None:
    """A jump of ~/.ssh/config would be left out in silence; a [[host]] jump in its place is the mend."""
    path = tmp_path / "config"
    path.write_text(f"Host gpu-1\n    {line}\nHost gpu-2\n    ProxyJump none\n")
    with pytest.raises(StartError, match=r"proxy\w+ = .*gate.* is not followed; write jump = NAME") as caught:
        target(HostSection(name="gpu-1"), path)
    assert str(path) in str(caught.value)
    assert target(HostSection(name="gpu-1", jump="gate"), path).jump == "gate"
    assert target(HostSection(name="gpu-2"), path).jump is None


@pytest.mark.parametrize("text", ["Match nonsense\n", "Host \xff\n"])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    """The message has the file."""
    path = tmp_path / "config"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StartError, match="not an SSH configuration") as caught:
        target(HostSection(name="gpu-1"), path)
    assert str(path) in str(caught.value)


def test_a_mebibyte_goes_there_and_comes_back_twice(connection: Connection) -> None:
    """Input, output and errors flow at the same time, beyond every window, and no byte changes."""
    given = os.urandom(MIB)
    answer = connection.run("tee /dev/stderr", given)
    assert answer.code == 0
    assert answer.out == given
    assert answer.err == given


def test_a_command_that_does_not_read_its_input_still_gives_its_status(connection: Connection) -> None:
    """What it said before it ended is its answer; the rest of the input goes nowhere."""
    for _ in range(5):
        assert connection.run("echo no; exit 3", b"x" * MIB) == ssh.Answer(3, b"no\n", b"")


def test_a_command_that_takes_too_long_is_given_up(connection: Connection) -> None:
    """The message has the command and the limit; the connection lives on."""
    began = time.monotonic()
    with pytest.raises(StartError, match=r"sleep 30: not done within 0\.3 s"):
        connection.run("sleep 30", limit_s=0.3)
    assert time.monotonic() - began < 5
    assert connection.run("echo on").out == b"on\n"


def test_a_connection_that_breaks_is_said_to_be_lost(sshd: SshServer, standins: Standins) -> None:
    """Within a command: at once, not at its deadline and not as an answer; after it: with the host's name."""
    before = set(sshd.sessions())
    connection = Connection(target(sshd.section()))
    (session,) = set(sshd.sessions()) - before
    timer = threading.Timer(0.5, session.kill)
    timer.start()
    began = time.monotonic()
    with pytest.raises(StartError, match=r"there .*the connection is lost"):
        connection.run("sleep 30")
    assert time.monotonic() - began < 10
    with pytest.raises(StartError, match=r"there .*the connection is lost"):
        connection.run("true")
    timer.join()
    connection.close()


def test_two_threads_share_a_connection(connection: Connection) -> None:
    """Each gets the answer to its own commands."""
    right: list[str] = []

    def ask(who: str) -> None:
        for number in range(10):
            if connection.run("cat", f"{who} {number}".encode()).out == f"{who} {number}".encode():
                right.append(who)

    threads = [threading.Thread(target=ask, args=(who,)) for who in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [right.count(who) for who in ("one", "two")] == [10, 10]

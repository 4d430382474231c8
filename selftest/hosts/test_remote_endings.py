"""A remote host that is cut off ends everything of the run, and says so; a session that comes next is told.

Through a real SSH server on the loopback interface, so psutil here sees what runs there.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import paramiko
import psutil
import pytest

from disagglab.errors import StartError
from disagglab.hosts import remote
from disagglab.hosts.remote import RemoteHost
from disagglab.hosts.ssh import Connection, target

if TYPE_CHECKING:
    from selftest.conftest import Remote, SshServer, Standins

STUBBORN = ["sh", "-c", 'trap "" TERM; echo $$ > child; while :; do sleep 0.02; done']
GRACE_S = 0.3
HEARTBEAT_S = 0.8
FOLLOW_S = 0.1


def test_close_proves_that_nothing_is_left(remote_host: Remote, sshd: SshServer, standins: Standins) -> None:
    """Everything of the run has ended when it returns, and its leases are gone."""
    host = remote_host()
    tree = remote_host.tree(host)
    leases = sshd.state / os.uname().nodename / "leases"
    assert list(leases.iterdir())
    host.close()
    assert standins.gone(*tree)
    assert not list(leases.iterdir())


def test_the_next_session_reaps_what_the_last_one_left(
    remote_host: Remote, sshd: SshServer, standins: Standins
) -> None:
    """Deputy and supervisor were killed: the orphan there is found by its lease and ended."""
    host = remote_host()
    child, grandchild = remote_host.tree(host)
    (path,) = (sshd.state / os.uname().nodename / "leases").iterdir()
    record = json.loads(path.read_text())
    psutil.Process(record["supervisor"]["pid"]).kill()
    psutil.Process(host.about["pid"]).kill()
    standins.until(lambda: standins.gone(child), "the command follows its supervisor")
    assert not standins.gone(grandchild)
    remote_host.close()
    rows = remote_host().reap()
    assert standins.gone(grandchild)
    assert [(row["run_id"], row["pids"]) for row in rows] == [(record["run_id"], [grandchild.pid])]


def transport_closed(host: RemoteHost, session: psutil.Process) -> None:
    """Our end breaks."""
    host.connection._client.close()


def session_killed(host: RemoteHost, session: psutil.Process) -> None:
    """Their end breaks."""
    session.kill()


@pytest.mark.parametrize("cut", [transport_closed, session_killed])
def test_a_broken_connection_ends_everything_there(
    remote_host: Remote, standins: Standins, cut: Callable[..., None]
) -> None:
    """Long before the heartbeat is missed; every later call says that the connection is lost."""
    host = remote_host(heartbeat_s=60.0)
    tree = remote_host.tree(host)
    cut(host, remote_host.session(host))
    standins.until(lambda: standins.gone(*tree), "all of it has ended there")
    for _ in range(2):
        with pytest.raises(StartError, match=r"there \(.*: the connection is lost"):
            host.call("exists", "/")
    with pytest.raises(StartError, match=r"60 s.* by itself; the next session proves it"):
        host.close()


def test_a_dead_network_ends_everything_there(
    remote_host: Remote, standins: Standins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is there and nothing passes, as with a pulled cable: silence ends all of it, there."""
    monkeypatch.setattr(remote, "FOLLOW_S", FOLLOW_S)
    host = remote_host(heartbeat_s=HEARTBEAT_S)
    tree = remote_host.tree(host)
    time.sleep(2 * HEARTBEAT_S)
    assert not standins.gone(tree[0]), "ended although logs are asked for all the time"
    session = remote_host.session(host)
    began = time.monotonic()
    session.suspend()
    standins.until(lambda: standins.gone(*tree), "all of it has ended there")
    took = time.monotonic() - began
    session.kill()
    assert took < HEARTBEAT_S + GRACE_S + 3


def test_a_deputy_that_is_killed_is_named(remote_host: Remote, standins: Standins) -> None:
    """The next call does not wait for its deadline, and the stand-ins are gone."""
    host = remote_host()
    tree = remote_host.tree(host)
    psutil.Process(host.about["pid"]).kill()
    with pytest.raises(StartError, match=r"there \(.*the deputy ended"):
        host.call("exists", "/")
    standins.until(lambda: standins.gone(*tree), "all of it has ended there")


def test_an_interrupted_call_does_not_mix_up_answers(
    remote_host: Remote, standins: Standins, tmp_path: Path
) -> None:
    """Ctrl-C in a call that takes long: its answer comes later, and is not that of the next call."""
    host = remote_host()
    (child,) = remote_host.tree(host, STUBBORN)
    (tmp_path / "file").write_text("content")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    stock = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, GRACE_S / 3)
        with pytest.raises(KeyboardInterrupt):
            host.call("stop", "standin")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, stock)
    assert host.read_text(str(tmp_path / "file")) == "content"
    assert standins.gone(child), "the call itself was done to its end"


def test_a_dying_connection_does_not_hide_the_error(sshd: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing a channel whose other end is going raises EOFError; the reader needs the first error."""
    connection = Connection(target(sshd.section()))

    def close(self: object) -> None:
        raise EOFError

    monkeypatch.setattr(paramiko.Channel, "close", close)
    with pytest.raises(StartError, match="sleep 30: not done within"):
        connection.run("sleep 30", limit_s=0.1)
    monkeypatch.undo()
    connection.close()


def test_a_dying_connection_can_be_left(remote_host: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other hosts are to be cleared, too, so disconnect does not raise."""
    host = remote_host()

    def close(self: object) -> None:
        raise EOFError

    monkeypatch.setattr(paramiko.Channel, "close", close)
    host.disconnect()
    monkeypatch.undo()

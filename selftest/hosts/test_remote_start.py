"""How a remote host's deputy is placed and started there, and what is said where it cannot be.

Through a real SSH server on the loopback interface.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from disagglab.errors import StartError
from disagglab.hosts import remote
from disagglab.hosts.ssh import Connection, target
from disagglab.paths import ROOT

if TYPE_CHECKING:
    from selftest.conftest import Remote, SshServer, Standins


def test_paths_there_begin_at_the_home_there(remote_host: Remote, sshd: SshServer) -> None:
    """The suite's folder, its Python, its state; an absolute folder stays as it is."""
    host = remote_host(folder="suite")
    assert host.folder == f"{sshd.home}/suite"
    assert host.suite_python == f"{sshd.home}/suite/.venv/bin/python"
    assert host.about["logs"].startswith(f"{sshd.state}/{os.uname().nodename}/runs/run-")
    remote_host.close()
    assert remote_host(folder="/opt/suite").folder == "/opt/suite"


def test_a_shell_that_greets_is_refused(remote_host: Remote, sshd: SshServer) -> None:
    """What an account prints whenever a shell starts would spoil every answer: the line, and the mend."""
    (sshd.home / ".bashrc").write_text("echo welcome\necho to all\n")
    try:
        with pytest.raises(StartError, match=r"shell prints 'welcome' whenever it starts.*~/\.bashrc"):
            remote_host()
    finally:
        (sshd.home / ".bashrc").unlink()


def test_a_python_that_is_not_there_is_named(remote_host: Remote) -> None:
    """What the shell there said, and the command that was run."""
    with pytest.raises(
        StartError, match=r"no-such-python(.|\n)*what was run there: .*no-such-python -E"
    ) as caught:
        remote_host(python="no-such-python")
    assert "not found" in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(remote_host: Remote, sshd: SshServer) -> None:
    """The account's state folder is a file, say: what the system said."""
    sshd.state.rename(sshd.state.with_name("aside"))
    try:
        sshd.state.write_text("")
        with pytest.raises(StartError, match=r"cannot put the suite's own part there: .*Not a directory"):
            remote_host()
    finally:
        sshd.state.unlink()
        sshd.state.with_name("aside").rename(sshd.state)


def test_the_deputys_files_are_placed_once(remote_host: Remote, sshd: SshServer) -> None:
    """Named after their content: two releases of the suite share a host; half an archive is no folder."""
    digest, archive = remote.bundle.__wrapped__()
    assert (digest, archive) == remote.bundle()
    folder = sshd.state / "deputy"
    remote_host()
    remote_host.close()
    stamp = (folder / digest).stat().st_mtime_ns
    connection = Connection(target(sshd.section()))
    command = remote.INSTALL.format(digest="torn")
    assert connection.run(command, archive[:3000]).code != 0
    assert not (folder / "torn").exists()
    connection.close()
    remote_host()
    assert (folder / digest).stat().st_mtime_ns == stamp
    there = folder / digest / "disagglab" / "agent" / "deputy.py"
    assert there.read_bytes() == (ROOT / "disagglab" / "agent" / "deputy.py").read_bytes()
    shown = (
        subprocess.run(["tar", "-t"], input=archive, capture_output=True, check=True).stdout.decode().split()
    )
    agent = (f"disagglab/agent/{path.name}" for path in (ROOT / "disagglab" / "agent").glob("*.py"))
    base = (f"disagglab/{name}.py" for name in ("__init__", "address", "errors", "waiting"))
    assert shown == [
        *sorted([*agent, *base]),
        "__main__.py",
    ]


def test_the_command_is_quoted(remote_host: Remote, tmp_path: Path) -> None:
    """A Python with a blank in its path is one word."""
    python = tmp_path / "my python"
    python.symlink_to(sys.executable)
    host = remote_host(python=str(python))
    assert shlex.quote(str(python)) in host.line.command
    assert psutil.Process(host.about["pid"]).cmdline()[0] == str(python)


def test_two_sessions_on_one_host_are_refused(remote_host: Remote, standins: Standins) -> None:
    """The second is told the first one's pid there, and leaves the first one's processes alone."""
    first = remote_host()
    tree = remote_host.tree(first)
    with pytest.raises(StartError, match=rf"another session \(pid {first.about['pid']}\)"):
        remote_host()
    assert not standins.gone(*tree)

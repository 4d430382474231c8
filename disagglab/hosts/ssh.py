"""A connection to a remote host: paramiko, with strict host keys and a deadline on everything.

What the lab file does not say about a host comes from ~/.ssh/config, as for the ``ssh`` command. A host key
that is not known is an error that shows the key and the command that adds it; nothing is accepted unseen.
"""

from __future__ import annotations

import contextlib
import getpass
import select
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from disagglab.address import joined
from disagglab.config.schema import HostSection
from disagglab.errors import StartError

KEEPALIVE_S = 5
SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
USER_KNOWN_HOSTS = "~/.ssh/known_hosts"
USER_CONFIG = "~/.ssh/config"
CHUNK = 32768
READ_POLL_S, SEND_POLL_S = 0.1, 0.005  # how often a channel without news is looked at
LOST = (paramiko.SSHException, EOFError, OSError)


@dataclass(frozen=True)
class Target:
    """Where a host is and how one gets in: the lab file's section, completed by ~/.ssh/config.

    ``connect_s``: longest time to connect. ``silence_s``: after which a connection is lost.
    """

    name: str
    address: str
    port: int
    user: str
    keys: tuple[str, ...]
    known_hosts: tuple[str, ...]
    jump: str | None
    connect_s: float
    silence_s: float

    def __str__(self) -> str:
        return f"{self.name} ({self.user}@{self.address}, port {self.port})"

    @property
    def known_name(self) -> str:
        """What known_hosts calls it."""
        return self.address if self.port == paramiko.config.SSH_PORT else f"[{self.address}]:{self.port}"


@dataclass(frozen=True)
class Answer:
    """What a command on a host gave. ``out`` and ``err``: bytes."""

    code: int
    out: bytes
    err: bytes


def target(host: HostSection, config: Path | None = None) -> Target:
    """Complete a host by ``config`` (~/.ssh/config).

    Raises:
        StartError: if the file cannot be read as an SSH configuration.
    """
    path = config or Path(USER_CONFIG).expanduser()
    rows: Mapping[str, Any] = {}
    if path.is_file():
        try:
            rows = paramiko.SSHConfig.from_path(str(path)).lookup(host.address or host.name)
        except (paramiko.SSHException, OSError, UnicodeDecodeError) as error:
            raise StartError(f"{path}: not an SSH configuration: {error}; see: ssh -G {host.name}") from error
    ignored = next((key for key in ("proxyjump", "proxycommand") if rows.get(key, "none") != "none"), None)
    if ignored and host.jump is None:
        raise StartError(
            f"{path}: {ignored} = {rows[ignored]} for {host.name} is not followed; write jump = NAME into its"
            " [[host]] in the lab file, and a [[host]] with that name"
        )
    keys = [host.key_file] if host.key_file else list(rows.get("identityfile", ()))
    known = _files(host.known_hosts) if host.known_hosts else _files(rows.get("userknownhostsfile"))
    return Target(
        name=host.name,
        address=str(rows.get("hostname", host.address or host.name)),
        port=host.port or int(rows.get("port", 22)),
        user=host.user or str(rows.get("user", getpass.getuser())),
        keys=tuple(str(Path(key).expanduser()) for key in keys),
        known_hosts=tuple(known) if known else (SYSTEM_KNOWN_HOSTS, str(Path(USER_KNOWN_HOSTS).expanduser())),
        jump=host.jump,
        connect_s=host.connect_s,
        silence_s=host.heartbeat_s,
    )


def _files(text: str | None) -> list[str]:
    return [str(Path(word).expanduser()) for word in (text or "").split()]


class _Refuse(paramiko.MissingHostKeyPolicy):
    """Says which key a host showed, how to compare it, and how to add it."""

    def __init__(self, where: Target) -> None:
        self._where = where

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        where = self._where
        kind = key.get_name().removeprefix("ssh-").partition("-")[0]  # ecdsa-sha2-nistp256: ecdsa
        scan = f"ssh-keyscan -t {kind} -p {where.port} {where.address}"
        raise StartError(
            f"{where}: its host key is not known: {key.get_name()} {key.fingerprint}\n"
            "    compare it with what the host itself says:"
            f" ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub\n"
            f"    show it from here: {scan} | ssh-keygen -lf -\n"
            f"    if they are equal, add it: {scan} >> {where.known_hosts[-1]}"
        )


class Connection:
    """An authenticated connection to a host; safe to use from several threads.

    Args:
        through: a connection to the jump host, if there is one.

    Raises:
        StartError: if the host is not reached in time, its key is not known or has changed, or it does not
            let us in; each with its mend.
    """

    def __init__(self, where: Target, through: Connection | None = None) -> None:
        self.where = where
        self._client = paramiko.SSHClient()
        for path in where.known_hosts:
            if Path(path).is_file():
                self._load(path)
        self._client.set_missing_host_key_policy(_Refuse(where))
        try:
            self._connect(through)
        except BaseException:
            self._client.close()
            raise

    def _load(self, path: str) -> None:
        try:
            self._client.load_system_host_keys(path)
        except (OSError, paramiko.SSHException) as error:
            raise StartError(f"{path}: cannot be read as known hosts: {error}") from error

    def _connect(self, through: Connection | None) -> None:
        where = self.where
        limit = where.connect_s
        sock = through.tunnel(where.address, where.port) if through else None
        missing = [key for key in where.keys if not Path(key).is_file()]
        keys = [key for key in where.keys if Path(key).is_file()]
        try:
            self._client.connect(
                where.address,
                where.port,
                where.user,
                key_filename=keys or None,  # type: ignore[arg-type]  # a list is taken, too
                look_for_keys=not keys,
                sock=sock,
                timeout=limit,
                banner_timeout=limit,
                auth_timeout=limit,
                channel_timeout=limit,
            )
        except paramiko.BadHostKeyException as error:
            raise StartError(
                f"{where}: its host key has CHANGED: it shows {error.key.get_name()} {error.key.fingerprint},"
                f" known is {error.expected_key.fingerprint}. Either the host was set up anew or somebody"
                " stands in between; ask its owner. If it was set up anew:"
                f" ssh-keygen -R {shlex.quote(where.known_name)} -f {where.known_hosts[-1]}"
            ) from error
        except paramiko.PasswordRequiredException as error:
            raise StartError(
                f"{where}: the key {', '.join(keys)} has a passphrase; add it to an agent: ssh-add {keys[0]}"
            ) from error
        except socket.gaierror as error:
            raise StartError(
                f"{where}: the name {where.address} is not known ({error.strerror}); mend [[host]] address,"
                " or add it to ~/.ssh/config or /etc/hosts"
            ) from error
        except LOST as error:
            transport = self._client.get_transport()
            reached = transport is not None and transport.is_active() and transport.initial_kex_done
            if reached or isinstance(error, paramiko.AuthenticationException):
                tried = f"keys tried: {', '.join(keys) or 'those of the agent and ~/.ssh/id_*'}"
                absent = f"; not there: {', '.join(missing)}" if missing else ""
                raise StartError(
                    f"{where}: does not let us in ({error}); {tried}{absent}; try: ssh -v -p {where.port}"
                    f" {where.user}@{where.address}"
                ) from error
            raise StartError(
                f"{where}: not reached within {limit:g} s ({type(error).__name__}: {error}); try: ssh -v"
                f" -p {where.port} {where.user}@{where.address} true"
            ) from error
        self._transport.set_keepalive(KEEPALIVE_S)
        wire = self._transport.sock
        if isinstance(wire, socket.socket):  # through a jump host it is that connection's channel
            silence_ms = round(where.silence_s * 1000)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)

    @property
    def _transport(self) -> paramiko.Transport:
        transport = self._client.get_transport()
        if transport is None or not transport.is_active():
            raise StartError(f"{self.where}: the connection is lost")
        return transport

    def tunnel(self, address: str, port: int) -> paramiko.Channel:
        """A TCP connection that the host makes for us.

        Raises:
            StartError: if it cannot.
        """
        try:
            return self._transport.open_channel(
                "direct-tcpip", (address, port), ("127.0.0.1", 0), timeout=self.where.connect_s
            )
        except LOST as error:
            wanted = joined(address, port)
            raise StartError(f"{self.where}: cannot reach {wanted} from there: {error}") from error

    def open(self, command: str) -> paramiko.Channel:
        """Start a shell command; its standard streams are the channel's.

        Raises:
            StartError: if the connection is lost.
        """
        try:
            channel = self._transport.open_session(timeout=self.where.connect_s)
            channel.exec_command(command)
        except LOST as error:
            raise StartError(f"{self.where}: the connection is lost: {error}") from error
        return channel

    def run(self, command: str, given: bytes = b"", limit_s: float = 60.0) -> Answer:
        """Run a shell command to its end, with ``given`` on its standard input.

        Raises:
            StartError: if the connection is lost, or the command exceeds ``limit_s``.
        """
        channel = self.open(command)
        try:
            return self._exchange(channel, command, given, limit_s)
        finally:
            with contextlib.suppress(*LOST):  # it is going already
                channel.close()

    def _exchange(self, channel: paramiko.Channel, command: str, given: bytes, limit_s: float) -> Answer:
        deadline = time.monotonic() + limit_s
        out, err = bytearray(), bytearray()
        rest = memoryview(given)
        channel.settimeout(1.0)
        try:
            while not (channel.exit_status_ready() and (channel.eof_received or channel.closed)):
                if time.monotonic() > deadline:
                    raise StartError(f"{self.where}: {command[:200]}: not done within {limit_s:g} s")
                self._drain(channel, out, err)
                if rest and channel.send_ready():
                    rest = rest[self._send(channel, bytes(rest[:CHUNK])) :]
                elif not rest and not channel.eof_sent:
                    channel.shutdown_write()
                else:
                    select.select([channel], [], [], SEND_POLL_S if rest else READ_POLL_S)
            self._drain(channel, out, err)
        except LOST as error:
            raise StartError(f"{self.where}: the connection is lost: {error}") from error
        code = channel.recv_exit_status()
        if code < 0 and not channel.eof_received:  # a command that a signal ended has closed its output
            raise StartError(f"{self.where}: the connection is lost: {command[:200]} gave no exit status")
        return Answer(code, bytes(out), bytes(err))

    @staticmethod
    def _send(channel: paramiko.Channel, piece: bytes) -> int:
        """How much of a piece was sent, or need not be, because the command has ended without reading it."""
        try:
            return channel.send(piece)
        except OSError:
            if channel.closed:
                return len(piece)
            raise

    @staticmethod
    def _drain(channel: paramiko.Channel, out: bytearray, err: bytearray) -> None:
        while channel.recv_ready():
            out += channel.recv(CHUNK)
        while channel.recv_stderr_ready():
            err += channel.recv_stderr(CHUNK)

    def close(self) -> None:
        """Close it; what runs over it sees its end."""
        with contextlib.suppress(*LOST):  # it is going already
            self._client.close()

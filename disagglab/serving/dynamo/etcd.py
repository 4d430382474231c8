"""etcd: the registry in which Dynamo's workers announce themselves, and a small client for it.

The client speaks etcd's JSON gateway through httpx: what a lesson needs is six calls. Of the libraries on
PyPI, etcd3 has had no release since 2020, and etcd3gw keeps neither the revision of an answer nor the
confirmation of a watch, and reads a watch by network chunks instead of by messages.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from disagglab.address import url_of
from disagglab.config.schema import Lab
from disagglab.errors import LabError
from disagglab.hosts.host import Host, HostProcess
from disagglab.serving import http
from disagglab.serving.service import HTTP_TIMEOUT_S, Service

FOLDERS = ("/usr/bin", "/usr/local/bin")  # beside PATH
MEND = "apt-get install etcd-server"
READY_DEADLINE_S = 60.0  # ready after 2 s where nothing else runs
MEMBER = "lab"
# The data folder lies in the scratch folder of the process: etcd reserves 123 MB for its log, and an owned
# process's scratch folder is gone when the process is, however that ends.
IN_SCRATCH = 'exec "$0" --data-dir "$TMPDIR/etcd" "$@"'
EXPIRY_CHECK_S = 0.5  # how often etcd looks for leases that have run out (lessor.go, runLoop)


@dataclass(frozen=True)
class Lease:
    """A lease. ``ttl_s``: what etcd granted, which may be more than what was asked for."""

    id: int
    ttl_s: int


@dataclass(frozen=True)
class Entry:
    """A key. Revisions count the changes of the whole store; ``lease`` is 0 for a key without one."""

    key: str
    value: str
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True)
class Listing:
    """The keys under a prefix, by name, all as they were at ``revision`` of the store."""

    revision: int
    entries: tuple[Entry, ...]

    @property
    def values(self) -> dict[str, str]:
        """Value by key."""
        return {entry.key: entry.value for entry in self.entries}


@dataclass(frozen=True)
class Change:
    """A change that a watch reported. ``at_s``: when it was read, ``time.monotonic()``."""

    key: str
    value: str
    deleted: bool
    revision: int
    at_s: float


class EtcdClient:
    """Calls of etcd's JSON gateway. Keys and values are text.

    Args:
        url: of the server, ``http://ADDRESS:PORT``.
        sender: makes the requests; without one, a client of its own.
    """

    def __init__(self, url: str, sender: httpx.Client | None = None) -> None:
        self.url = url
        self._sender = sender or httpx.Client(timeout=HTTP_TIMEOUT_S, verify=http.NO_AUTHORITIES)

    def put(self, key: str, value: str, lease: int = 0) -> int:
        """Write a key; the revision that this made. ``lease``: the key goes when this lease does."""
        asked = {"key": encode(key), "value": encode(value), "lease": str(lease)}
        return int(self._ask("/v3/kv/put", asked)["header"]["revision"])

    def get_prefix(self, prefix: str) -> Listing:
        """Every key that begins with ``prefix``."""
        found = self._ask("/v3/kv/range", key_range(prefix))
        entries = tuple(entry_of(row) for row in found.get("kvs", ()))
        return Listing(int(found["header"]["revision"]), entries)

    def grant(self, ttl_s: int) -> Lease:
        """A new lease, which ends ``ttl_s`` after its last sign of life."""
        found = self._ask("/v3/lease/grant", {"TTL": str(ttl_s)})
        return Lease(int(found["ID"]), int(found["TTL"]))

    def keep_alive(self, lease: int) -> int:
        """One sign of life; seconds that the lease has from now, 0 if it is gone."""
        return int(self._ask("/v3/lease/keepalive", {"ID": str(lease)})["result"].get("TTL", 0))

    def remaining_s(self, lease: int) -> int | None:
        """Whole seconds that a lease has left; None if it is gone."""
        left = int(self._ask("/v3/lease/timetolive", {"ID": str(lease)}).get("TTL", 0))
        return None if left < 0 else left

    def revoke(self, lease: int) -> int:
        """End a lease and delete its keys; the revision that this made."""
        return int(self._ask("/v3/lease/revoke", {"ID": str(lease)})["header"]["revision"])

    @contextlib.contextmanager
    def watch(self, prefix: str, limit_s: float, from_revision: int = 0) -> Iterator[Iterator[Change]]:
        """Every change of a key under ``prefix``, in order. On entry etcd has confirmed the watch.

        Args:
            prefix: what the keys begin with.
            limit_s: how long there may be no change, s.
            from_revision: changes since then come first; 0: none from before the watch.

        Raises:
            LabError: if there is no change for ``limit_s``, or etcd ends the watch.
        """
        asked = {"create_request": {**key_range(prefix), "start_revision": str(from_revision)}}
        limits = httpx.Timeout(HTTP_TIMEOUT_S, read=limit_s)
        with self._sender.stream("POST", f"{self.url}/v3/watch", json=asked, timeout=limits) as answer:
            if answer.status_code != httpx.codes.OK:
                answer.read()
                raise _refused(self.url, "/v3/watch", answer)
            messages = self._messages(answer, prefix, limit_s)
            if not next(messages).get("created"):
                raise LabError(f"etcd {self.url} did not confirm a watch of {prefix}")
            yield (change for message in messages for change in changes_of(message, time.monotonic()))

    def close(self) -> None:
        """Close the connections."""
        self._sender.close()

    def _messages(self, answer: httpx.Response, prefix: str, limit_s: float) -> Iterator[dict[str, Any]]:
        try:
            for line in answer.iter_lines():
                if line.strip():
                    yield result_of(line, prefix)
        except httpx.ReadTimeout as error:
            raise LabError(f"etcd reported no change of {prefix} for {limit_s:g} s") from error
        raise LabError(f"etcd {self.url} closed the watch of {prefix}; see its log")

    def _ask(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = self._sender.post(f"{self.url}{path}", json=asked)
        except httpx.HTTPError as error:
            raise LabError(f"etcd {self.url}{path}: {type(error).__name__} {error}; see its log") from error
        if answer.status_code != httpx.codes.OK:
            raise _refused(self.url, path, answer)
        found: dict[str, Any] = answer.json()
        return found


def _refused(url: str, path: str, answer: httpx.Response) -> LabError:
    return LabError(f"etcd {url}{path} answers {answer.status_code}: {answer.text.strip()}")


def encode(text: str) -> str:
    """Text as the gateway takes bytes: base64."""
    return base64.b64encode(text.encode()).decode()


def decode(text: str) -> str:
    """The inverse of :func:`encode`; what is no UTF-8 is replaced."""
    return base64.b64decode(text).decode(errors="replace")


def key_range(prefix: str) -> dict[str, str]:
    """``key`` and ``range_end`` of all keys that begin with ``prefix``: up to the next text of its length.

    The empty prefix is every key, which etcd writes as a zero byte at both ends (rpc.proto, RangeRequest).
    """
    start = prefix.encode() or b"\0"
    end = start[:-1] + bytes([start[-1] + 1]) if prefix else b"\0"  # no byte of UTF-8 is 255
    return {"key": base64.b64encode(start).decode(), "range_end": base64.b64encode(end).decode()}


def entry_of(row: Mapping[str, str]) -> Entry:
    """A key as the gateway gives it: base64, numbers as text, and nothing at all for empty and 0."""
    return Entry(
        key=decode(row["key"]),
        value=decode(row.get("value", "")),
        create_revision=int(row.get("create_revision", 0)),
        mod_revision=int(row["mod_revision"]),
        lease=int(row.get("lease", 0)),
    )


def result_of(line: str, prefix: str) -> dict[str, Any]:
    """One message of a watch.

    Raises:
        LabError: if it says that the watch has ended, such as at a revision that was compacted away.
    """
    message = json.loads(line)
    result: dict[str, Any] = message.get("result", {})
    if "error" in message or result.get("canceled"):
        why = message.get("error") or result.get("cancel_reason") or f"compacted: {line}"
        raise LabError(f"etcd ended the watch of {prefix}: {why}")
    return result


def changes_of(message: Mapping[str, Any], at_s: float) -> list[Change]:
    """The changes in one message of a watch; a put is what names no other type."""
    return [
        Change(
            key=decode(event["kv"]["key"]),
            value=decode(event["kv"].get("value", "")),
            deleted=event.get("type", "PUT") == "DELETE",
            revision=int(event["kv"]["mod_revision"]),
            at_s=at_s,
        )
        for event in message.get("events", ())
    ]


@dataclass(frozen=True)
class EtcdServer(Service):
    """A running etcd. ``url`` is what Dynamo's ``ETCD_ENDPOINTS`` takes."""

    name: str
    url: str
    argv: tuple[str, ...]
    process: HostProcess
    client: EtcdClient

    @property
    def command(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.argv)

    def is_ready(self) -> bool:
        """Whether it says that it is healthy: it has elected itself."""
        try:
            answer = http.get(f"{self.url}/health", HTTP_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK and answer.json().get("health") == "true"

    def stop(self) -> None:
        """End it; its data goes with it."""
        self.client.close()
        super().stop()


def find_etcd(host: Host) -> str:
    """Path of the program on a host.

    Raises:
        LabError: if it is not there.
    """
    try:
        return str(host.facts.find_command("etcd", extrapaths=FOLDERS))
    except ValueError as error:
        raise LabError(f"host {host.name} has no etcd in PATH, {', '.join(FOLDERS)}; {MEND}") from error


def etcd_argv(program: str, url: str, peer_url: str) -> list[str]:
    """The command of a cluster of one member, with its data in ``$TMPDIR``.

    ``peer_url``: where other members would reach it; etcd listens there in any case.
    """
    return [
        *("sh", "-c", IN_SCRATCH, program),
        *("--name", MEMBER, "--logger", "zap"),
        *("--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
        *("--initial-cluster", f"{MEMBER}={peer_url}"),
    ]


def start_etcd(host: Host, lab: Lab, program: str, name: str = "etcd") -> EtcdServer:
    """Start an empty etcd beside the controller and wait until it has elected itself.

    Raises:
        StartError: if it ends or is not ready in time; the message holds the end of its log.
    """
    address = lab.controller.address
    port, peer_port = host.reserve_port(address), host.reserve_port(address)
    base = url_of(address, port)
    argv = etcd_argv(program, base, url_of(address, peer_port))
    env = {"ETCD_UNSUPPORTED_ARCH": "arm64"} if _is_arm(host) else {}  # 3.4 asks for it; 3.5 does not
    process = host.start(name, argv, env, lab.controller.cpus, [port, peer_port])
    return EtcdServer(name, base, tuple(argv), process, EtcdClient(base)).brought_up(READY_DEADLINE_S)


def _is_arm(host: Host) -> bool:
    return bool(host.facts.check_output("uname -m") == "aarch64")

"""The client of etcd's JSON gateway, and the command of the server; nothing is started.

The answers are what etcd 3.4.23 sent, without the cluster's and the member's number. They come through
httpx's own machinery for reading an answer, in pieces that fall where the network would let them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from disagglab.errors import LabError
from disagglab.serving.dynamo import etcd
from disagglab.serving.dynamo.etcd import Entry, EtcdClient, Lease

URL = "http://127.0.0.1:2379"
CREATED = '{"result":{"header":{"revision":"1","raft_term":"2"},"created":true}}\n'
PUT = (
    '{"result":{"header":{"revision":"2","raft_term":"2"},"events":[{"kv":{"key":"YQ==","create_revision":"2",'
    '"mod_revision":"2","version":"1","value":"YQ==","lease":"4590190578801117704"}}]}}\n'
)
DELETE = (
    '{"result":{"header":{"revision":"3","raft_term":"2"},"events":[{"type":"DELETE","kv":{"key":"YQ==",'
    '"mod_revision":"3"}}]}}\n'
)
COMPACTED = '{"result":{"header":{"revision":"9"},"canceled":true,"compact_revision":"5"}}\n'


class Pieces(httpx.SyncByteStream):
    """An answer that arrives in pieces of ``size`` bytes; then nothing comes, or it ends."""

    def __init__(self, text: str, size: int, silent: bool) -> None:
        self._data, self._size, self._silent = text.encode(), size, silent

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._data), self._size):
            yield self._data[start : start + self._size]
        if self._silent:
            raise httpx.ReadTimeout("timed out")


class Gateway:
    """Answers each path with a text; ``asked`` has the body of every request."""

    def __init__(self, status: int = 200, size: int = 10_000, silent: bool = True, **texts: str) -> None:
        self._status, self._size, self._silent, self._texts = status, size, silent, texts
        self.asked: list[Any] = []

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(json.loads(request.content))
        name = request.url.path.rpartition("/")[2]
        if name == "watch":
            return httpx.Response(self._status, stream=Pieces(self._texts[name], self._size, self._silent))
        return httpx.Response(self._status, text=self._texts[name])

    @property
    def client(self) -> EtcdClient:
        """A client whose requests end here."""
        return EtcdClient(URL, httpx.Client(transport=httpx.MockTransport(self._answer)))


def test_a_put_sends_base64_and_returns_the_revision() -> None:
    gateway = Gateway(put='{"header":{"revision":"2","raft_term":"2"}}')

    assert gateway.client.put("a", "ü", lease=7) == 2

    (asked,) = gateway.asked
    assert base64.b64decode(asked["key"]) == b"a"
    assert base64.b64decode(asked["value"]) == "ü".encode()
    assert asked["lease"] == "7"


def test_a_listing_has_every_field_of_a_key() -> None:
    row = '{"key":"YQ==","create_revision":"2","mod_revision":"4","version":"1","value":"eA==","lease":"12"}'
    gateway = Gateway(range=f'{{"header":{{"revision":"5"}},"kvs":[{row}],"count":"1"}}')

    listing = gateway.client.get_prefix("a")

    assert listing.revision == 5
    assert listing.entries == (Entry("a", "x", 2, 4, 12),)
    assert listing.values == {"a": "x"}


def test_what_the_gateway_leaves_out_is_empty_or_zero() -> None:
    row = '{"key":"YQ==","create_revision":"2","mod_revision":"4","version":"1"}'
    found = Gateway(range=f'{{"header":{{"revision":"5"}},"kvs":[{row}],"count":"1"}}').client.get_prefix("a")
    nothing = Gateway(range='{"header":{"revision":"5"}}').client.get_prefix("a")

    assert (found.entries[0].value, found.entries[0].lease) == ("", 0)
    assert nothing.entries == ()


@pytest.mark.parametrize(
    ("prefix", "start", "end"),
    [("v1/", b"v1/", b"v10"), ("a", b"a", b"b"), ("ü", b"\xc3\xbc", b"\xc3\xbd"), ("", b"\0", b"\0")],
)
def test_a_prefix_is_a_range(prefix: str, start: bytes, end: bytes) -> None:
    found = etcd.key_range(prefix)

    assert (base64.b64decode(found["key"]), base64.b64decode(found["range_end"])) == (start, end)


def test_a_lease_is_what_was_granted() -> None:
    gateway = Gateway(grant='{"header":{"revision":"1"},"ID":"4590190578801117702","TTL":"2"}')

    assert gateway.client.grant(1) == Lease(4590190578801117702, 2)
    assert gateway.asked == [{"TTL": "1"}]


def test_a_lease_that_is_gone_has_no_time() -> None:
    alive = Gateway(
        keepalive='{"result":{"header":{"revision":"2"},"ID":"5","TTL":"4"}}\n',
        timetolive='{"header":{"revision":"2"},"ID":"5","TTL":"3","grantedTTL":"4","keys":["YQ=="]}',
    ).client
    last_second = Gateway(timetolive='{"header":{"revision":"2"},"ID":"5","grantedTTL":"4"}').client
    gone = Gateway(
        keepalive='{"result":{"header":{"revision":"3"},"ID":"5"}}\n',
        timetolive='{"header":{"revision":"3"},"ID":"5","TTL":"-1"}',
    ).client

    assert (alive.keep_alive(5), alive.remaining_s(5)) == (4, 3)
    assert last_second.remaining_s(5) == 0
    assert (gone.keep_alive(5), gone.remaining_s(5)) == (0, None)


def test_a_refusal_says_what_etcd_said() -> None:
    said = '{"error":"etcdserver: requested lease not found","code":5}'

    with pytest.raises(LabError, match=r"/v3/lease/revoke answers 404: .*requested lease not found"):
        Gateway(status=404, revoke=said).client.revoke(5)


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_messages_of_a_watch_may_be_cut_anywhere(size: int) -> None:
    gateway = Gateway(watch=CREATED + PUT + "\n" + DELETE, size=size)

    with gateway.client.watch("a", 1.0, from_revision=2) as changes:
        put, delete = next(changes), next(changes)

    assert (put.key, put.value, put.deleted, put.revision) == ("a", "a", False, 2)
    assert (delete.key, delete.value, delete.deleted, delete.revision) == ("a", "", True, 3)
    assert gateway.asked[0]["create_request"]["start_revision"] == "2"


def test_two_events_in_one_message_are_two_changes() -> None:
    both = json.loads(DELETE)
    both["result"]["events"].insert(0, json.loads(PUT)["result"]["events"][0])

    with Gateway(watch=CREATED + json.dumps(both) + "\n").client.watch("a", 1.0) as changes:
        found = [next(changes), next(changes)]

    assert [(change.revision, change.deleted) for change in found] == [(2, False), (3, True)]


def test_silence_is_an_error_and_not_an_end() -> None:
    with (
        pytest.raises(LabError, match=r"reported no change of a for 1 s"),
        Gateway(watch=CREATED + PUT).client.watch("a", 1.0) as changes,
    ):
        list(changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CREATED, "closed the watch"),
        (CREATED + COMPACTED, "compacted"),
        (CREATED + '{"error":{"grpc_code":14,"message":"transport is closing"}}\n', "transport is closing"),
    ],
)
def test_a_watch_that_ends_says_why(text: str, said: str) -> None:
    with (
        pytest.raises(LabError, match=said),
        Gateway(watch=text, silent=False).client.watch("a", 1.0) as changes,
    ):
        list(changes)


def test_a_watch_that_was_not_confirmed_is_refused() -> None:
    with pytest.raises(LabError, match="did not confirm"), Gateway(watch=PUT).client.watch("a", 1.0):
        pass


def test_the_server_listens_only_where_it_is_told() -> None:
    argv = etcd.etcd_argv("/usr/bin/etcd", "http://10.0.0.1:5001", "http://10.0.0.1:5002")

    assert argv[:2] == ["sh", "-c"]
    assert argv[3] == "/usr/bin/etcd"
    options = dict(zip(argv[4::2], argv[5::2], strict=True))
    assert options["--listen-client-urls"] == options["--advertise-client-urls"] == "http://10.0.0.1:5001"
    assert options["--listen-peer-urls"] == "http://10.0.0.1:5002"
    assert options["--initial-cluster"] == f"{options['--name']}=http://10.0.0.1:5002"

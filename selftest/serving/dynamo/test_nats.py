"""What the NATS server says of itself, and its command; no server is started.

The answers are what nats-server 2.15.1 sent, shortened to the keys that are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.errors import LabError, StartError
from disagglab.hosts.host import local_host
from disagglab.serving.dynamo import nats
from disagglab.serving.dynamo.nats import JetStream, NatsClient, Stream, Subscription

PORTS = (23700, 23709)  # none is taken
CONNZ: dict[str, Any] = {
    "num_connections": 2,
    "total": 2,
    "offset": 0,
    "limit": 1024,
    "connections": [
        {
            "cid": 5,
            "name": "probe",
            "subscriptions": 2,
            "subscriptions_list_detail": [
                {"subject": "_INBOX.2zeVzLXs2MNuoZq5z8hzc2.*", "sid": "1", "msgs": 2, "cid": 5},
                {"subject": "a.b", "qgroup": "q", "sid": "2", "msgs": 0, "cid": 5},
            ],
        },
        {"cid": 6, "subscriptions": 0},
    ],
}
CONFIG = {"store_dir": "/run/jetstream", "sync_interval": 120000000000}
STREAM = {
    "name": "kv",
    "config": {"name": "kv", "subjects": ["kv.>"], "storage": "file"},
    "state": {"messages": 3, "bytes": 105, "first_seq": 2, "last_seq": 4, "consumer_count": 1},
}


def test_connections_have_their_subscriptions() -> None:
    probe, silent = nats.parse_connections(CONNZ)

    inbox, queued = probe.subscriptions
    assert (probe.name, inbox.messages) == ("probe", 2)
    assert queued == Subscription("a.b", "q", 0)
    assert silent == NatsClient("", ())


def test_a_part_of_the_connections_is_refused() -> None:
    with pytest.raises(LabError, match="listed 2 of 1025 connections"):
        nats.parse_connections({**CONNZ, "total": 1025})


def test_streams_of_all_accounts_are_listed_by_name() -> None:
    other = {**STREAM, "name": "events"}
    answer = {
        "config": CONFIG,
        "account_details": [{"name": "$G", "stream_detail": [STREAM]}, {"stream_detail": [other]}, {}],
    }

    found = nats.parse_jetstream(answer)

    assert found.store == "/run/jetstream"
    assert found.sync_interval_s == pytest.approx(120.0)
    assert [stream.name for stream in found.streams] == ["events", "kv"]
    assert found.streams[1] == Stream("kv", ("kv.>",), "file", 3, 2, 4, 1)


def test_a_server_without_streams_has_none() -> None:
    found = nats.parse_jetstream({"config": CONFIG})
    assert found == JetStream("/run/jetstream", found.sync_interval_s, ())
    assert found.sync_interval_s == pytest.approx(120.0)


def test_a_missing_count_is_an_error() -> None:
    state = {key: value for key, value in STREAM["state"].items() if key != "messages"}  # type: ignore[attr-defined]
    answer = {"config": CONFIG, "account_details": [{"stream_detail": [{**STREAM, "state": state}]}]}

    with pytest.raises(KeyError, match="messages"):
        nats.parse_jetstream(answer)


def test_the_server_listens_on_one_address() -> None:
    argv = nats.nats_argv("/opt/nats-server", "10.0.0.1", 5001, 5002, "/run/store")

    assert argv[0] == "/opt/nats-server"
    assert "-js" in argv
    for option, value in {"-a": "10.0.0.1", "-p": "5001", "-m": "5002", "-sd": "/run/store"}.items():
        assert argv[argv.index(option) + 1] == value


def test_the_folder_of_the_overlay_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, elsewhere = tmp_path / "overlay", tmp_path / "elsewhere"
    for folder in (beside, elsewhere):
        folder.mkdir()
        (folder / "nats-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin:/bin")
    host = local_host("run", PORTS, tmp_path, "python")

    first = nats.find_nats(host, str(beside))
    (beside / "nats-server").unlink()
    second = nats.find_nats(host, str(beside))
    (elsewhere / "nats-server").unlink()
    host.close()

    assert (first, second) == (str(beside / "nats-server"), str(elsewhere / "nats-server"))
    with pytest.raises(LabError, match=r"no nats-server in .*overlay or PATH; make setup DYNAMO=1"):
        nats.find_nats(host, str(beside))


@pytest.mark.usefixtures("state")
def test_a_server_that_does_not_come_up_leaves_no_store(tmp_path: Path) -> None:
    """The stand-in makes its store, as the server does, and fails."""
    program = tmp_path / "nats-server"
    program.write_text('#!/bin/sh\nfor last; do :; done\nmkdir -p "$last/jetstream"\necho no room\nexit 1\n')
    program.chmod(0o755)
    host = local_host("run", PORTS, tmp_path, "python")

    with pytest.raises(StartError, match=r"nats ended; command: (?s:.*)no room"):
        nats.start_nats(host, load_lab("embedded"), str(program))

    host.close()
    assert (tmp_path / "nats.log").exists()
    assert not (tmp_path / "nats-store").exists()

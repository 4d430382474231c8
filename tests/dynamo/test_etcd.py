"""etcd as a registry: who is there, who has come, who has gone.

Dynamo's workers write their addresses into etcd under ``v1/instances/``, each under a lease; frontends list
that prefix and watch it. No engine runs here: the keys are written by the test, as a worker would write them.

The oracle is etcd's revision, one number that counts all changes of the store, and for leases the clock of
this test: a lease may end after its time, never before. After its time etcd has to notice, every 0.5 s, and
to write the deletion to disk.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest

from disagglab.config.schema import Lab
from disagglab.errors import LabError
from disagglab.hosts.hosts import Hosts
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.serving.dynamo import etcd
from disagglab.serving.dynamo.etcd import EXPIRY_CHECK_S, EtcdClient, EtcdServer

ASKED_TTL_S = 3  # Dynamo asks for 30 (ETCD_LEASE_TTL); the smaller, the shorter the test
HEARTBEATS = 5  # at half of the TTL each, as Dynamo does: together 2.5 TTL
SLACK_S = EXPIRY_CHECK_S + 1.5  # a busy machine runs etcd, its disk and this test late
CHANGE_LIMIT_S = 15.0  # for a change that was asked for; only a failing test waits so long
WORKERS = 20


@pytest.fixture(scope="module")
def own_etcd(hosts: Hosts, lab: Lab, store: Store, etcd_program: str) -> Iterator[EtcdServer]:
    """An etcd that nobody else writes to: the session's counts the changes of Dynamo's workers too."""
    server = etcd.start_etcd(hosts.controller, lab, etcd_program, "etcd-alone")
    store.commands["etcd-alone"] = server.command
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def registry(own_etcd: EtcdServer) -> EtcdClient:
    """The client of this module's etcd."""
    return own_etcd.client


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test writes under, in the form of Dynamo's keys."""
    return f"v1/instances/lesson-{uuid.uuid4().hex[:8]}/backend/generate/"


def test_a_registration_is_read_back(registry: EtcdClient, prefix: str) -> None:
    """A worker's key is found under its prefix with its value, its lease and the revision that wrote it.

    This is service discovery as DNS would not do it: the answer is the registry's present state and not a
    cached one, and each entry is tied to its owner's sign of life. Dynamo puts the lease's number into the
    key, so two workers cannot overwrite each other.
    """
    lease = registry.grant(ASKED_TTL_S)
    key = f"{prefix}{lease.id:x}"
    before = registry.get_prefix(prefix)

    revision = registry.put(key, '{"transport": "tcp"}', lease.id)
    found = registry.get_prefix(prefix)

    assert before.entries == (), f"{prefix} is not empty before anything was registered: {before}"
    assert [entry.key for entry in found.entries] == [key]
    (entry,) = found.entries
    assert entry.value == '{"transport": "tcp"}'
    assert entry.lease == lease.id
    assert entry.create_revision == entry.mod_revision == revision == found.revision
    assert revision == before.revision + 1, "a put is one change of the store, and reads are none"
    registry.revoke(lease.id)


def test_a_watch_reports_changes_in_their_order(registry: EtcdClient, prefix: str, record: Recorder) -> None:
    """A watch reports puts and deletions in the order of their revisions, each exactly once.

    A frontend that polled would see states and miss what happened between two polls: a worker that restarted
    looks as if it had never gone. A watch delivers the changes themselves, as a replicated log does; two
    frontends that have read up to the same revision know the same.
    """
    lease = registry.grant(ASKED_TTL_S)
    took = []

    with registry.watch(prefix, CHANGE_LIMIT_S) as changes:
        written = []
        for text in ("starting", "ready", "draining"):
            asked_s = time.monotonic()
            written.append((registry.put(f"{prefix}a", text, lease.id), text))
            change = next(changes)
            took.append(change.at_s - asked_s)
            assert (change.revision, change.value, change.deleted) == (*written[-1], False)
        gone = registry.revoke(lease.id)
        last = next(changes)

    assert [revision for revision, _ in written] == list(range(written[0][0], written[0][0] + 3))
    assert (last.key, last.revision, last.deleted) == (f"{prefix}a", gone, True)
    record.numbers("put until the watch reports it", took, "s", what="changes")


def test_list_then_watch_misses_nothing(registry: EtcdClient, prefix: str) -> None:
    """What happens between a listing and the watch after it is reported first, if the watch names the
    revision.

    List, then watch, is a race: a worker that registers between the two is in neither. The listing says at
    which revision it was true, and the watch starts at the next one. A watch from now on shows that the gap
    is real.
    """
    registry.put(f"{prefix}a", "listed")
    listing = registry.get_prefix(prefix)
    between = registry.put(f"{prefix}b", "between")

    with (
        registry.watch(prefix, CHANGE_LIMIT_S, from_revision=listing.revision + 1) as complete,
        registry.watch(prefix, CHANGE_LIMIT_S) as from_now,
    ):
        after = registry.put(f"{prefix}c", "after")
        seen = [next(complete), next(complete)]
        first_of_late = next(from_now)

    assert listing.values == {f"{prefix}a": "listed"}
    assert [(change.revision, change.value) for change in seen] == [(between, "between"), (after, "after")]
    assert first_of_late.revision == after, "a watch from now on is not told what happened before it"


def test_a_clean_exit_takes_all_keys_at_once(registry: EtcdClient, prefix: str, record: Recorder) -> None:
    """Revoking a lease deletes every key under it, in one revision, without waiting for its time.

    A worker has several keys: one for each of its endpoints, one for its model. Nobody may see half of them:
    the deletion is one transaction. It takes milliseconds, and only a worker that can still speak does it;
    the next two tests are about one that cannot.
    """
    lease, other = registry.grant(ASKED_TTL_S), registry.grant(ASKED_TTL_S)
    for number in range(WORKERS):
        registry.put(f"{prefix}{number:02}", "mine", lease.id)
    registry.put(f"{prefix}other", "another's", other.id)

    with registry.watch(prefix, CHANGE_LIMIT_S) as changes:
        asked_s = time.monotonic()
        revision = registry.revoke(lease.id)
        gone = [next(changes) for _ in range(WORKERS)]

    took_s = gone[-1].at_s - asked_s
    record.numbers("clean exit until the watch reports it", [took_s], "s", what="exits")
    assert {change.revision for change in gone} == {revision}, "the keys of one lease went one after another"
    assert all(change.deleted for change in gone)
    assert registry.get_prefix(prefix).values == {f"{prefix}other": "another's"}
    assert took_s < lease.ttl_s, f"took {took_s:.2f} s: the lease of {lease.ttl_s} s had run out by itself"
    registry.revoke(other.id)


def test_a_silent_worker_is_gone_after_its_ttl(registry: EtcdClient, prefix: str, record: Recorder) -> None:
    """Without a sign of life a key is deleted when its lease's time is over: not before, and at most 2 s
    after.

    A crash tells nobody. From outside, a dead worker and a slow network look the same, so all a registry can
    do is to wait: a short time declares the living dead, a long one lets frontends send requests to the dead.
    The time is the price of every crash. A key without a lease shows the alternative: it stays, and so would
    the address of a worker that died.
    """
    registry.put(f"{prefix}no-lease", "stays")
    asked_s = time.monotonic()
    lease = registry.grant(ASKED_TTL_S)
    granted_s = time.monotonic()
    registry.put(f"{prefix}worker", "here", lease.id)

    with registry.watch(prefix, lease.ttl_s + CHANGE_LIMIT_S) as changes:
        gone = next(changes)

    least_s, most_s = gone.at_s - granted_s, gone.at_s - asked_s
    record.numbers(
        "silence until the key is gone", [most_s], "s", arm=f"TTL {lease.ttl_s} s", what="silent workers"
    )
    assert lease.ttl_s >= ASKED_TTL_S, f"etcd granted {lease.ttl_s} s, less than {ASKED_TTL_S} s"
    assert (gone.key, gone.deleted) == (f"{prefix}worker", True)
    assert most_s >= lease.ttl_s, f"gone after {most_s:.2f} s, before its {lease.ttl_s} s were over"
    assert least_s <= lease.ttl_s + SLACK_S, f"gone only after {least_s:.2f} s of {lease.ttl_s} s"
    assert registry.get_prefix(prefix).values == {f"{prefix}no-lease": "stays"}
    assert registry.remaining_s(lease.id) is None


def test_heartbeats_keep_a_key(registry: EtcdClient, prefix: str, record: Recorder) -> None:
    """Renewed at half of its time, a lease lives on past it; it ends one TTL after the last renewal.

    So a crash is noticed between half a TTL (it came just before the next renewal) and a whole one (just
    after the last). With the 30 s that Dynamo asks for, that is 15 to 30 s in which requests still go to the
    dead worker, unless something else tells first, such as a refused connection.
    """
    lease = registry.grant(ASKED_TTL_S)
    began_s = time.monotonic()
    registry.put(f"{prefix}worker", "here", lease.id)

    with registry.watch(prefix, lease.ttl_s + CHANGE_LIMIT_S) as changes:
        for _ in range(HEARTBEATS):
            time.sleep(lease.ttl_s / 2)  # the heartbeat's period
            last_s = time.monotonic()
            assert registry.keep_alive(lease.id) == lease.ttl_s, "the lease was gone at a renewal in time"
            answered_s = time.monotonic()
        lived_s = last_s - began_s
        gone = next(changes)

    record.numbers("kept by heartbeats", [lived_s], "s", arm=f"TTL {lease.ttl_s} s", what="workers")
    record.numbers(
        "last heartbeat until the key is gone",
        [gone.at_s - last_s],
        "s",
        arm=f"TTL {lease.ttl_s} s",
        what="workers",
    )
    assert lived_s > 2 * lease.ttl_s, f"{lived_s:.2f} s do not show that a lease outlives {lease.ttl_s} s"
    assert gone.deleted, f"the first change after the put is {gone}"
    assert gone.at_s - last_s >= lease.ttl_s, f"gone {gone.at_s - last_s:.2f} s after a renewal"
    assert gone.at_s - answered_s <= lease.ttl_s + SLACK_S
    assert registry.keep_alive(lease.id) == 0, "a lease that is gone was renewed"


def test_a_lease_that_is_gone_takes_no_key(registry: EtcdClient, prefix: str) -> None:
    """A worker that comes back after its lease has ended cannot register under it; it needs a new one.

    A process that was suspended does not know that it was declared dead. Its lease is a token of an earlier
    life, and a write under it is refused, so that a frontend never sees a key whose end nobody watches over.
    """
    lease = registry.grant(ASKED_TTL_S)
    registry.revoke(lease.id)

    with pytest.raises(LabError, match="requested lease not found"):
        registry.put(f"{prefix}worker", "back", lease.id)

    assert registry.get_prefix(prefix).entries == ()

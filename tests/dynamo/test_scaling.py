"""Workers come, go and crash while clients send requests to a frontend that is never restarted.

Two workers serve already. Two more are started beside them, in one start; then one of these is asked to go
(SIGTERM), and the other is killed (SIGKILL). Each of the three events happens once, under observation, and
the tests are about what was seen.

The oracles are on both sides of the frontend, and none is the frontend's word: what the client received,
token by token; the workers' own counters; etcd's watch for when a key came and went, and its lease for when
it may. Greedy answers are compared up to a tie, as measure/same_answer.py has it: a stream that goes on
elsewhere is computed in other batches there, which rounds differently.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence

import httpx
import pytest

from disagglab.experiments.scaling import Attempt
from disagglab.experiments.scaling_events import (
    AFTERWARDS,
    LEASE_SLACK_S,
    LONG_TOKENS,
    MIGRATIONS,
    Added,
    Crew,
    Killed,
    Removed,
)
from disagglab.measure import same_answer
from disagglab.measure.same_answer import Agreement
from disagglab.results.recorder import Recorder

pytestmark = pytest.mark.lab_has("one_host", "ipv4")


def _failed(attempts: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in attempts if attempt.completion is None]


def _told(failed: Sequence[Attempt], log: object) -> str:
    """What went wrong, for who reads a failed test."""
    first = f"; the first: {failed[0].wrong}, {failed[0].last}" if failed else ""
    return f"{len(failed)} requests failed{first}; see {log}"


def test_added_workers_get_requests_without_a_restart(crew: Crew, added: Added, record: Recorder) -> None:
    """A worker that is added answers requests within seconds of its key in etcd; the frontend goes on, and
    no request fails.

    Nobody tells the frontend. It watches a prefix of etcd; the worker writes its key when its model is
    loaded, and not before, so there is no time in which it is known and cannot answer. vllm-router has its
    workers in its command: there, one worker more is a new router. What lasts is the start of the engine.
    """
    took_s = [first - made for made, first in zip(added.made_s, added.first_s, strict=True)]
    starts_s = [worker.ready_s or 0.0 for worker in added.workers]
    failed, sent = _failed(added.attempts), len(added.attempts)
    counted = sum(added.after.values()) - sum(added.before.values())

    record.numbers("start until ready, two at once", starts_s, "s", what="workers")
    record.numbers(
        "key in etcd until the first request is finished",
        took_s,
        "s",
        what="workers",
        command=added.workers[0].plan.command,
        note="the worker's own counter, asked every 0.1 s",
    )
    record.numbers("requests sent meanwhile", [sent], "requests", arm="two workers added")
    record.numbers("of these, failed", [len(failed)], "requests", arm="two workers added")
    assert not failed, _told(failed, crew.plain.process.log)
    assert counted == sent, (
        f"{sent} requests were answered, the workers have finished {counted}: {added.after}"
    )
    assert min(took_s) >= 0, f"a request was finished {-min(took_s):.1f} s before its worker had a key"
    assert crew.plain.process.alive, f"the frontend has ended; see {crew.plain.process.log}"


def test_a_removed_worker_finishes_what_it_has_begun(crew: Crew, removed: Removed, record: Recorder) -> None:
    """A worker that is asked to go gives up its key at once, and still finishes the answers that are shorter
    than its drain; no request is lost.

    The order is what makes this safe: first no new work, then the work in hand, then the end. The drain here
    is longer than the longest answer that counts (the test checks it); Dynamo's own 5 s may not be.
    """
    drain_s = crew.guests.drain_s
    failed, sent = _failed(removed.attempts), len(removed.attempts)
    lasted_s = [one.ended_s - removed.asked_s for one in removed.kept]
    arm = f"drain {drain_s:.1f} s"

    record.numbers(
        "SIGTERM until the key is gone", [removed.key_s - removed.asked_s], "s", arm=arm, what="workers"
    )
    record.numbers(
        "SIGTERM until the process is gone", [removed.gone_s - removed.asked_s], "s", arm=arm, what="workers"
    )
    record.numbers("SIGTERM until the answers in hand are whole", lasted_s, "s", arm=arm, what="answers")
    record.numbers("requests sent meanwhile", [sent], "requests", arm="a worker removed")
    record.numbers("of these, failed", [len(failed)], "requests", arm="a worker removed")
    broken = _failed(removed.kept)
    assert not broken, _told(broken, removed.worker.process.log)
    assert min(lasted_s) > 0, "the answers were whole before the worker was asked to go; ask for longer ones"
    assert [len(one.token_ids) for one in removed.kept] == [crew.kept_tokens] * 2
    assert sent, "no request flowed while the worker was removed"
    assert not failed, _told(failed, crew.plain.process.log)
    assert removed.key_s - removed.asked_s < drain_s, (
        "the key outlived the drain: new requests came all the time"
    )
    assert removed.gone_s - removed.asked_s >= drain_s, "the process was gone before its drain was over"
    assert crew.plain.process.alive, f"the frontend has ended; see {crew.plain.process.log}"


def test_an_answer_longer_than_the_drain_is_cut(crew: Crew, removed: Removed, record: Recorder) -> None:
    """An answer that is not whole when the drain is over is cut, and the client is told so inside its stream.

    The drain is a time and not a condition: the engine stops when it is over, whatever it is doing. The
    status was sent with the first token and says 200, so the error can only be an event; a client that looks
    at the status alone takes half an answer for a whole one.
    """
    cut = removed.cut

    record.numbers(
        "SIGTERM until a longer answer is cut",
        [cut.ended_s - removed.asked_s],
        "s",
        arm=f"drain {crew.guests.drain_s:.1f} s",
        what="answers",
        note=f"after {len(cut.token_ids)} of {LONG_TOKENS} tokens, status {cut.status}: {cut.last}",
    )
    assert cut.completion is None, f"whole after {cut.ended_s - removed.asked_s:.1f} s; ask for more tokens"
    assert cut.ended_s - removed.asked_s >= crew.guests.drain_s, f"cut within its drain: {cut.last}"
    assert 0 < len(cut.token_ids) < LONG_TOKENS
    assert cut.status == httpx.codes.OK
    assert '"error"' in cut.last, f"it ended without saying why: {cut.wrong}; last event: {cut.last}"


def test_a_killed_worker_stays_in_etcd_until_its_lease_ends(
    crew: Crew, killed: Killed, record: Recorder
) -> None:
    """The key of a worker that crashed goes when its lease is over: not before, and at most 2 s after.

    A crash says nothing to etcd. How long the lease still had is read from etcd right after the crash; nobody
    can renew it then. Dynamo renews at half of the time, so a key stays for between a half and a whole lease.
    """
    lease_s = crew.guests.planes.lease_s
    took_s = killed.key_s - killed.before_s

    record.numbers("SIGKILL until the key is gone", [took_s], "s", arm=f"lease {lease_s} s", what="workers")
    assert killed.remaining_s is not None, "the lease was gone already: a crash was told to etcd"
    assert killed.key_s - killed.after_s >= killed.remaining_s, (
        f"gone after {killed.key_s - killed.after_s:.1f} s, its lease had {killed.remaining_s} s or more"
    )
    assert killed.key_s - killed.told_s <= killed.remaining_s + 1 + LEASE_SLACK_S, (
        f"gone only after {killed.key_s - killed.told_s:.1f} s of less than {killed.remaining_s + 1} s"
    )
    assert took_s <= lease_s + LEASE_SLACK_S


def test_a_stream_on_a_killed_worker_ends_with_an_error(crew: Crew, killed: Killed, record: Recorder) -> None:
    """Without migration, a stream on a worker that is killed ends at once with an error event; its status was
    200.

    The frontend does not wait for etcd: the connection to the worker broke, and that is news enough for the
    requests on it. Only what has no connection yet depends on the lease.
    """
    broken = killed.plain
    took_s = broken.ended_s - killed.before_s

    record.numbers(
        "SIGKILL until the client sees the error",
        [took_s],
        "s",
        arm="--migration-limit 0",
        what="streams",
        command=crew.plain.command,
        note=f"after {len(broken.token_ids)} tokens, status {broken.status}: {broken.last}",
    )
    assert broken.completion is None, f"whole before or after the kill: {len(broken.token_ids)} tokens"
    assert 0 < len(broken.token_ids) < crew.stream_tokens
    assert broken.status == httpx.codes.OK
    assert '"error"' in broken.last, f"it ended without saying why: {broken.wrong}; last event: {broken.last}"
    assert broken.ended_s < killed.key_s, "the error came with the end of the lease, not with the crash"


def test_a_stream_goes_on_on_another_worker(crew: Crew, killed: Killed, record: Recorder) -> None:
    """With migration, a stream whose worker is killed goes on elsewhere, to the last token.

    The frontend keeps what it has passed on, and sends prompt and tokens so far to another worker as a longer
    prompt: the KV cache is lost, the text is not. It is computed again, which the client sees as a long gap.
    """
    found = killed.migrated
    assert found.completion is not None, _told([found], crew.migrating.process.log)

    record.numbers(
        "longest gap of a stream that migrates",
        [max(found.completion.gaps_s)],
        "s",
        arm=f"--migration-limit {MIGRATIONS}",
        what="streams",
        command=crew.migrating.command,
        note=f"{killed.had} of {crew.stream_tokens} tokens before",
    )
    assert 0 < killed.had < crew.stream_tokens, f"{killed.had} tokens before the kill: it was not under way"
    assert found.ended_s > killed.after_s
    assert len(found.token_ids) == found.completion.output_tokens == crew.stream_tokens


@pytest.mark.lab_has("real_weights")
def test_a_stream_that_migrates_says_the_same(crew: Crew, killed: Killed, record: Recorder) -> None:
    """A stream that went on on another worker has the tokens that it would have had.

    Compared twice, up to near ties: with an undisturbed answer, and from the kill on with the answer to the
    prompt and all that came before.
    """
    found = killed.migrated
    assert found.completion is not None, _told([found], crew.migrating.process.log)
    whole = same_answer.agree(killed.undisturbed, found.completion)
    rest = _agree_from(killed, found)
    record.numbers(
        "tokens of a migrated stream that equal an undisturbed one's",
        [whole.compared],
        "tokens",
        arm=f"--migration-limit {MIGRATIONS}",
        what="count",
        note=f"{killed.had} before the kill; whole: {whole}; after the kill: {rest}",
    )
    assert rest.outcome != same_answer.DIFFERENT, f"after the kill it goes on with other tokens: {rest}"
    assert whole.outcome != same_answer.DIFFERENT, f"the whole answer is another one: {whole}"


def test_an_addressed_stream_does_not_migrate(crew: Crew, killed: Killed) -> None:
    """A request that names its worker ends with an error when that one is killed, whatever the migration
    limit.

    An address is an order and not a preference. Whoever places requests by hand, as an external router does,
    has to send them again by hand.
    """
    broken = killed.addressed

    assert broken.completion is None, "the stream was whole although its worker was killed"
    assert 0 < len(broken.token_ids) < crew.stream_tokens
    assert '"error"' in broken.last, f"it ended without saying why: {broken.wrong}; last event: {broken.last}"


def test_a_request_sent_to_a_dead_worker_is_refused(crew: Crew, killed: Killed, record: Recorder) -> None:
    """A frontend that has not heard of the crash sends a request to the dead worker; without migration it is
    answered with an error.

    Until its lease ends the dead worker stands in the registry, with all the blocks that it ever stored. So
    the requests that gain most from its cache are those that fail: affinity keeps them together.
    """
    refused = killed.to_dead

    record.numbers(
        "a request to a dead worker until the client sees the error",
        [refused.ended_s - refused.sent_s],
        "s",
        arm="--migration-limit 0",
        what="requests",
        note=f"status {refused.status}: {refused.last}",
    )
    assert refused.sent_s > killed.after_s
    assert refused.completion is None, "another worker answered, although its blocks are on the dead one"
    assert refused.ended_s < killed.key_s, "it hung until the lease had ended"
    assert "503" in refused.last or refused.status >= httpx.codes.INTERNAL_SERVER_ERROR, (
        f"no error that a client can tell: {refused.status} {refused.wrong}; {refused.last}"
    )


def test_migration_covers_the_time_until_the_lease_ends(crew: Crew, killed: Killed, record: Recorder) -> None:
    """Between the crash and the end of the lease, no request fails with migration; after it, none without.

    A request that is sent to the dead worker finds nobody, and either the client hears of it or the frontend
    tries another worker. How many that are without migration is a figure and no claim: lots are drawn between
    idle workers, and while the registry lists the dead one, even a frontend that has met it or had streams
    there may draw it again. ``DYN_RUNTIME_INHIBITED_DURATION_SECS`` sets for how long a frontend leaves an
    instance aside after a failure; it was not tried.
    """
    arms = {
        "--migration-limit 0, had streams there": killed.acquainted,
        "--migration-limit 0, had none": killed.unacquainted,
        f"--migration-limit {MIGRATIONS}": killed.migrates,
    }
    until = {arm: one.sent(killed.after_s, killed.key_s) for arm, one in arms.items()}
    for arm, attempts in until.items():
        failed = _failed(attempts)
        record.numbers(
            "failed between crash and end of the lease",
            [len(failed)],
            "requests",
            arm=arm,
            what="crashes",
            note=f"of {len(attempts)}" + (f"; {failed[0].status}: {failed[0].last}" if failed else ""),
        )
    assert all(until.values()), f"no request was sent while the dead worker was listed: {until}"
    failed = _failed(killed.migrates.attempts)
    assert not failed, _told(failed, crew.migrating.process.log)
    afterwards = [attempt for one in arms.values() for attempt in one.sent(killed.settled_s)]
    assert len(afterwards) >= AFTERWARDS * len(arms)
    assert not _failed(afterwards), _told(_failed(afterwards), crew.plain.process.log)


def test_nothing_of_a_killed_worker_is_left(killed: Killed) -> None:
    """The engine of a worker that was killed ends too, and its supervisor needs no SIGKILL for that.

    The engine is a process of its own, and two processes share a fate only if somebody sees to it: here the
    supervisor, which ends what a command has left. An engine that is left keeps its memory, or its GPU, and
    the next worker on the node does not start.
    """
    ended = killed.ended
    assert len(killed.pids) > 1, f"only {killed.pids} ran: where was the engine?"
    assert ended, "the supervisor has ended without a report; who ended the engine?"
    assert ended["reason"] == "command ended", f"it was asked to end before it saw the crash: {ended}"
    assert ended["code"] == -signal.SIGKILL, f"the worker ended otherwise than by SIGKILL: {ended}"
    assert ended["killed"] == [], f"SIGTERM was not enough for {ended['killed']} of {killed.pids}"


def _agree_from(killed: Killed, found: Attempt) -> Agreement:
    """What came after the kill, against the answer to the prompt and all that came before it."""
    assert found.completion is not None
    rest = dataclasses.replace(found.completion, token_ids=found.token_ids[killed.had :])
    return same_answer.agree(killed.continued, rest)

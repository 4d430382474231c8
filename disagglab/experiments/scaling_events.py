"""Workers added, one removed, one killed, each once, under observation: what the scaling lesson looks at.

Two workers serve already. Two more are started beside them, in one start; then one of these is asked to go
(SIGTERM), and the other is killed (SIGKILL). Clients send requests to frontends that are never restarted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from disagglab import waiting
from disagglab.errors import InvalidRun
from disagglab.experiments import gauges
from disagglab.experiments.scaling import (
    TIMEOUT,
    AskedStream,
    Attempt,
    SteadyClients,
    Watching,
    joining,
)
from disagglab.progress import ProgressLine
from disagglab.serving.dynamo.deployment import DynamoDeployment
from disagglab.serving.dynamo.etcd import EXPIRY_CHECK_S, EtcdClient
from disagglab.serving.dynamo.parts import BLOCK_SIZE, KV, Frontend, Worker, body, on_worker
from disagglab.serving.openai import Completion, prompt_of
from disagglab.serving.service import POLL_S
from disagglab.serving.vllm import require_memory

MIGRATIONS = 3  # --migration-limit of the second frontend
LEASE_SHORT_S, LEASE_FULL_S = 10, 30  # the second is Dynamo's own
LEASE_SLACK_S = EXPIRY_CHECK_S + 1.5  # a busy machine runs etcd, its disk and this test late

ALONE_TOKENS = 40  # of one answer on the idle machine, which tells its speed
LONG_TOKENS = 1500  # an answer that no drain here can wait for
DRAIN_MOST_S = 10.0  # the test waits it out
DRAIN_SHARE = 1 / 3  # of the time that LONG_TOKENS take on the idle machine
KEPT_S, KEPT_LEAST = 1.0, 24  # an answer in hand: s on the idle machine, a few times that on the busy one
STREAM_S, STREAM_LEAST = 2.0, 60  # a stream whose worker is killed, which takes tenths of a second

START_LIMIT_S = 600.0  # without any change in etcd while workers start; a start takes a minute
EVENT_LIMIT_S = 60.0  # for what happens within seconds; only a failing test waits so long
AFTERWARDS = 5  # requests through each frontend after the dead worker's key has gone
START_PAUSE_S = 1.0  # of the one user whose requests flow while workers start, which is slow enough
ASK_S = 0.1  # how often a counter or gauge is asked
RUSH = 4  # users more when the first new worker is there: together one for each of the four, and one over
STEER_ATTEMPTS = 3
PLAIN_SALT = 21  # of the prompt whose blocks no other worker ever has


@dataclass(frozen=True)
class Crew:
    """Who takes part. ``kept_tokens``, ``stream_tokens``: of answers that something happens to.

    Frontends: ``plain`` and ``stranger`` with --migration-limit 0, ``migrating`` with MIGRATIONS. The
    stranger has nothing to do with any worker before one is killed.
    """

    present: DynamoDeployment
    guests: DynamoDeployment
    plain: Frontend
    stranger: Frontend
    migrating: Frontend
    sender: httpx.Client
    kept_tokens: int
    stream_tokens: int

    def ask(self, frontend: Frontend, tokens: int, salt: int, worker: Worker | None = None) -> AskedStream:
        """A request under way; addressed to one worker, or wherever the frontend sends it."""
        request = self.request(self.prompt(salt), tokens)
        return AskedStream(self.sender, frontend.url, on_worker(request, worker) if worker else request)

    def request(self, prompt: list[int], tokens: int) -> dict[str, object]:
        """A greedy request."""
        return body(self.present.served_name, prompt, tokens)

    def prompt(self, salt: int) -> list[int]:
        """A prompt of four whole blocks, and one token that has to be computed in any case."""
        return prompt_of(4 * round(self.plain.metrics().value(BLOCK_SIZE)) + 1, salt)

    def watch(self, worker: Worker, limit_s: float) -> Watching:
        """Watches for the end of a worker's key."""
        key = self.guests.key(worker)
        return Watching(EtcdClient(self.guests.planes.etcd), key, lambda change: change.deleted, 1, limit_s)


@dataclass(frozen=True)
class Added:
    """What was seen while two workers were added.

    ``made_s``: when the key of each came; ``first_s``: when each had finished a request, by its counter.
    ``before`` and ``after``: requests that every worker had finished, by process.
    """

    workers: tuple[Worker, Worker]
    made_s: tuple[float, ...]
    first_s: tuple[float, ...]
    attempts: tuple[Attempt, ...]
    before: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True)
class Removed:
    """What was seen while a worker was removed. ``kept``: streams on it within its drain; ``cut``: beyond."""

    worker: Worker
    asked_s: float
    key_s: float
    gone_s: float
    kept: tuple[Attempt, ...]
    cut: Attempt
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class Killed:
    """What was seen while a worker was killed, between ``before_s`` and ``after_s``.

    ``remaining_s``: whole seconds that its lease had left, asked between ``after_s`` and ``told_s``.
    ``settled_s``: when no frontend listed it any more. ``plain``, ``migrated``, ``addressed``: streams
    on it through a frontend that does not migrate, through one that does, and through that with its address.
    ``had``: tokens of the second when the worker was killed. ``pids``: its processes; ``ended``: its
    supervisor's report: why it ended what was left (reason), the status of the worker's first process (code),
    and which pids needed SIGKILL (killed). ``to_dead``: through the stranger, a prompt whose blocks the dead
    worker has.
    ``acquainted``, ``unacquainted``, ``migrates``: other requests, through the plain frontend, the stranger
    and the one that migrates.
    """

    worker: Worker
    before_s: float
    after_s: float
    told_s: float
    remaining_s: int | None
    key_s: float
    settled_s: float
    plain: Attempt
    migrated: Attempt
    addressed: Attempt
    had: int
    pids: tuple[int, ...]
    ended: dict[str, Any]
    to_dead: Attempt
    acquainted: SteadyClients
    unacquainted: SteadyClients
    migrates: SteadyClients
    undisturbed: Completion
    continued: Completion


@contextlib.contextmanager
def gathered(present: DynamoDeployment, short: bool) -> Iterator[Crew]:
    """Frontends over workers that serve, and room for guests whose drain suits this machine's speed."""
    with (
        present.routed(KV) as one,
        present.routed(KV) as other,
        present.routed(KV, migration_limit=MIGRATIONS) as third,
        httpx.Client(timeout=TIMEOUT) as sender,
    ):
        plain, stranger, migrating = one.router, other.router, third.router
        assert isinstance(plain, Frontend)
        assert isinstance(stranger, Frontend)
        assert isinstance(migrating, Frontend)
        request = body(present.served_name, prompt_of(33, 1), ALONE_TOKENS)
        alone = AskedStream(sender, plain.url, request).attempt()
        if alone.completion is None:
            raise InvalidRun(f"{plain.name}: {alone.wrong}; {alone.last}; see {plain.process.log}")
        tpot_s = (alone.completion.e2e_s - alone.completion.ttft_s) / (ALONE_TOKENS - 1)
        drain_s = min(DRAIN_MOST_S, LONG_TOKENS * tpot_s * DRAIN_SHARE)
        lease_s = LEASE_SHORT_S if short else LEASE_FULL_S
        guests = joining(present, "-guest", drain_s, lease_s)
        kept, stream = (
            min(max(least, round(seconds / tpot_s)), LONG_TOKENS)
            for seconds, least in ((KEPT_S, KEPT_LEAST), (STREAM_S, STREAM_LEAST))
        )
        with guests:
            yield Crew(present, guests, plain, stranger, migrating, sender, kept, stream)


def add(crew: Crew, line: ProgressLine) -> Added:
    """Start two workers while requests flow. ``line``: shows how far they are."""
    guests = crew.guests
    host = guests.hosts.of(guests.nodes[0])
    require_memory(host, guests.lab, 2)
    present = crew.present.workers
    before, over = _counts(present), threading.Event()
    with (
        concurrent.futures.ThreadPoolExecutor() as threads,
        SteadyClients(crew.plain.url, crew.present.served_name, 1, START_PAUSE_S) as steady,
    ):
        watching = Watching(
            EtcdClient(guests.planes.etcd),
            f"v1/instances/{guests.namespace}/",
            lambda change: "/generate/" in change.key and not change.deleted,
            2,
            START_LIMIT_S,
        )
        try:
            workers = guests.launch(guests.nodes[0]), guests.launch(guests.nodes[-1])
            threads.submit(_busy, steady, watching, over)
            firsts = [threads.submit(_first_finished, worker, watching, over) for worker in workers]
            guests.wait(line)
            first_s = tuple(first.result() for first in firsts)
        finally:
            over.set()
    after = _counts((*present, *workers))
    keys = {change.key: change.at_s for change in watching.changes()}
    made_s = tuple(keys[guests.key(worker)] for worker in workers)
    return Added(workers, made_s, first_s, steady.attempts, before, after)


def remove(crew: Crew, added: Added) -> Removed:
    """Ask the first guest to go while three streams come from it and others flow.

    Raises:
        InvalidRun: if what it should finish takes longer than its drain.
    """
    worker, drain_s = added.workers[0], crew.guests.drain_s
    with SteadyClients(crew.plain.url, crew.present.served_name) as steady:
        cut = crew.ask(crew.plain, LONG_TOKENS, 10, worker).begun(EVENT_LIMIT_S)
        kept = [
            crew.ask(crew.plain, crew.kept_tokens, salt, worker).begun(EVENT_LIMIT_S) for salt in (11, 12)
        ]
        gauges.await_running(worker, 3)
        watching = crew.watch(worker, EVENT_LIMIT_S)
        asked_s = time.monotonic()
        crew.guests.remove(worker)
        gone_s = time.monotonic()
        found = tuple(one.attempt() for one in kept)
        lost = cut.attempt()
    (deleted,) = watching.changes()
    if slow := [one for one in found if one.ended_s - asked_s > drain_s]:
        raise InvalidRun(
            f"{worker.name}: an answer of {crew.kept_tokens} tokens ended {slow[0].ended_s - asked_s:.1f} s"
            f" after SIGTERM, the drain is {drain_s:.1f} s; that proves nothing: raise DRAIN_MOST_S"
        )
    return Removed(worker, asked_s, deleted.at_s, gone_s, found, lost, steady.attempts)


def kill(crew: Crew, added: Added) -> Killed:
    """Kill the second guest while three streams come from it; requests flow until its key has gone."""
    worker, guests, name = added.workers[1], crew.guests, crew.present.served_name
    registry = EtcdClient(guests.planes.etcd)
    migrating, prompt = _steered(crew, worker)
    tokens = crew.stream_tokens
    plain = crew.ask(crew.plain, tokens, PLAIN_SALT, worker).begun(EVENT_LIMIT_S)
    addressed = crew.ask(crew.migrating, tokens, 22, worker).begun(EVENT_LIMIT_S)
    gauges.await_running(worker, 3)
    pids = tuple(worker.process.tree())
    watching = crew.watch(worker, guests.planes.lease_s + EVENT_LIMIT_S)
    with (
        SteadyClients(crew.plain.url, name, 1) as acquainted,
        SteadyClients(crew.migrating.url, name, 1) as migrates,
    ):
        had, before_s = migrating.tokens, time.monotonic()
        guests.kill(worker)
        after_s = time.monotonic()
        remaining_s = registry.remaining_s(int(worker.instance, 16))
        told_s = time.monotonic()
        to_dead = crew.ask(crew.stranger, 1, PLAIN_SALT).attempt()
        with SteadyClients(crew.stranger.url, name, 1) as unacquainted:
            _await_end(worker)
            worker.process.stop()
            (deleted,) = watching.changes()
            settled_s = _settled(crew, worker)
            steady = acquainted, unacquainted, migrates
            for each in steady:
                each.await_sent(AFTERWARDS, settled_s, EVENT_LIMIT_S)
    registry.close()
    seen = migrating.attempt()
    return Killed(
        worker,
        before_s,
        after_s,
        told_s,
        remaining_s,
        deleted.at_s,
        settled_s,
        plain.attempt(),
        seen,
        addressed.attempt(),
        had,
        pids,
        worker.process.ended or {},
        to_dead,
        *steady,
        _reference(crew, prompt, tokens),
        _reference(crew, [*prompt, *seen.token_ids[:had]], tokens - had),
    )


def _busy(steady: SteadyClients, keys: Watching, over: threading.Event) -> None:
    """From the first key on, as many requests at once as there are workers.

    With fewer, a frontend in mode ``kv`` may leave a worker that has come without work for long: between
    those that are idle and have no block of the prompt it draws lots, and a new one has no better lot.
    """
    while not keys.so_far:
        if over.wait(ASK_S):
            return
    steady.add(RUSH)


def _first_finished(worker: Worker, keys: Watching, over: threading.Event) -> float:
    """When a worker had finished a request. It is asked from the first key on, to be left alone before."""

    def late() -> InvalidRun:
        return InvalidRun(f"{worker.plan.process_name} finished no request; see {worker.process.log}")

    def done() -> bool:
        return bool(keys.so_far) and gauges.finished(worker) > 0

    waiting.until(lambda: done() or over.is_set(), START_LIMIT_S, late, ASK_S)
    if not done():
        raise late()
    return time.monotonic()


def _counts(workers: Sequence[Worker]) -> dict[str, int]:
    """Requests that each worker has finished, by process, when none has any in hand.

    Raises:
        InvalidRun: if one still has, although every client has its answer.
    """
    for worker in workers:
        gauges.await_idle(worker)
    return {worker.plan.process_name: gauges.finished(worker) for worker in workers}


def _steered(crew: Crew, worker: Worker) -> tuple[AskedStream, list[int]]:
    """A stream that the worker answers although it carries no address, and its prompt.

    An address binds a request to its worker for good. So the worker gets the prompt first, by address, and
    the frontend then sends the same prompt to where its blocks lie. Nothing else may run meanwhile.
    """
    for salt in range(30, 30 + STEER_ATTEMPTS):
        crew.ask(crew.migrating, 1, salt, worker).attempt()
        asked = crew.ask(crew.migrating, crew.stream_tokens, salt).begun(EVENT_LIMIT_S)
        with contextlib.suppress(InvalidRun):
            gauges.await_running(worker, 1)
            return asked, crew.prompt(salt)
        asked.attempt()
    raise InvalidRun(
        f"{crew.migrating.name} sent none of {STEER_ATTEMPTS} prompts to {worker.plan.process_name}, which"
        f" had their blocks; does it hear its events? {crew.migrating.process.log}"
    )


def _await_end(worker: Worker) -> None:
    """Wait until a killed worker's supervisor has ended what was left: asked to stop before it saw the crash,
    it would report that as its reason.
    """
    waiting.last_answer(lambda: not worker.process.tree(), EVENT_LIMIT_S, ASK_S)


def _settled(crew: Crew, worker: Worker) -> float:
    """When no frontend lists a worker any more."""
    frontends = crew.plain, crew.stranger, crew.migrating
    waiting.until(
        lambda: not any(worker.instance in frontend.instances() for frontend in frontends),
        EVENT_LIMIT_S,
        lambda: InvalidRun(f"{crew.plain.name} still lists {worker.instance}; see {crew.plain.process.log}"),
        POLL_S,
    )
    return time.monotonic()


def _reference(crew: Crew, prompt: list[int], tokens: int) -> Completion:
    """The answer of a worker that nothing happens to, without anything cached, with its gaps."""
    request = on_worker(crew.request(prompt, tokens), crew.present.workers[0])
    request |= {"logprobs": 2, "cache_salt": f"reference-{len(prompt)}"}
    found = AskedStream(crew.sender, crew.plain.url, request).attempt()
    if found.completion is None:
        raise InvalidRun(f"no undisturbed answer: {found.wrong}; {found.last}")
    return found.completion

"""Rounds: every arm takes its turn at every subject, in an order that is mirrored every other round.

So slow drift of the machine cancels: who was first is last in the next round. Within a round all arms get the
same prompts, since they share a seed; between rounds the prompts change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from disagglab.config.workload import Workload
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.measure.run import measure
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.results.seconds import Phase, spends
from disagglab.serving.topology import Topology

A = TypeVar("A")
S = TypeVar("S")

WARM_UP_ROUND = -1


def mirrored(arms: Sequence[A], number: int) -> Sequence[A]:
    """The arms in the order of a round, by its number from 0 on."""
    return arms if number % 2 == 0 else arms[::-1]


@dataclass(frozen=True)
class Trial(Generic[A, S]):
    """One arm's turn at a subject. ``number``: of the round, from 0 on, or WARM_UP_ROUND; ``planned``: how
    many rounds.
    """

    number: int
    planned: int
    arm: A
    subject: S
    seed: int

    def said(self, *what: str) -> str:
        """The turn as a line of progress; words that are empty are left out."""
        planned = max(self.planned, self.number + 1)
        where = "warm-up" if self.number == WARM_UP_ROUND else f"round {self.number + 1} of {planned}"
        return ", ".join(filter(None, (where, *what)))


def trials(
    arms: Sequence[A],
    subjects: Callable[[int], Sequence[S]],
    rounds: int,
    seed: Callable[[int, int], int],
    cap: int = 0,
) -> Iterator[Trial[A, S]]:
    """All turns, round by round; in a round subject by subject, so that what is compared is close in time.

    Args:
        subjects: of a round, by its number; asked when the round begins, so it may go by earlier ones.
        seed: of a subject in a round, by the round's number and the subject's position.
        cap: how many rounds are made if ``subjects`` still has any when the planned ``rounds`` are over.
    """
    for number in range(max(rounds, cap)):
        for position, subject in enumerate(subjects(number)):
            shared = seed(number, position)
            for arm in mirrored(arms, number):
                yield Trial(number, rounds, arm, subject, shared)


def _charged(number: int) -> contextlib.AbstractContextManager[None]:
    """Whose seconds a run's are: a warm-up's all count as such."""
    warms_up = number == WARM_UP_ROUND
    return spends(Phase.WARM_UP, whole=True) if warms_up else contextlib.nullcontext()


def runs(
    engine: LoadEngine,
    over: Iterable[Trial[Topology, Workload]],
    shape: KvShape,
    store: Store,
    show: Callable[[str], None],
    named: Callable[[Workload], str] = lambda workload: workload.name,
) -> Iterator[Run]:
    """Measure every turn, and store its run at once, valid or not.

    Args:
        named: what progress calls a workload.

    Raises:
        Died: after the run in which a server or the router died; no later one could be valid.
    """
    for turn in over:
        show(turn.said(named(turn.subject), turn.arm.name))
        with _charged(turn.number):
            run = measure(engine, turn.arm, turn.subject, turn.seed, turn.number, shape)
            store.add_run(run)
        yield run
        if run.invalid is not None:
            turn.arm.require_alive()

"""Turns of a search: candidates run start by start, since a start costs more than a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from disagglab.config.schema import WaySection
from disagglab.config.setting import Candidate, Setting, StartKey, start_key
from disagglab.errors import ConfigError, StartError
from disagglab.results.records import Run
from disagglab.serving.topology import Topology

NAME = "try"  # of the ways that play candidates: try-0 is the lab's own setting


def ways_of(settings: Mapping[str, Sequence[Setting]]) -> dict[Candidate, WaySection]:
    """The way that plays each candidate, ``KIND@try-N`` with N its place among the settings drawn.

    Args:
        settings: by kind, as :func:`disagglab.config.drawing.draw` gives them.
    """
    return {
        Candidate(kind, one): one.way(kind, f"{NAME}-{number}", one.words, "not known: it is tried")
        for kind, each in settings.items()
        for number, one in enumerate(each)
    }


def by_start(
    candidates: Sequence[Candidate], running: StartKey | None, source: random.Random
) -> list[list[Candidate]]:
    """Candidates in groups that the same servers play; the groups in an order drawn by lot, so that what
    drifts during a rung favours none, but for those that run already, which are first.

    Args:
        running: key of the servers that run; None where there are none.
    """
    groups: dict[StartKey, list[Candidate]] = {}
    for one in candidates:
        groups.setdefault(start_key(one), []).append(one)
    keys = list(groups)
    source.shuffle(keys)
    keys.sort(key=lambda key: key != running)
    return [groups[key] for key in keys]


class Turns:
    """Measures the candidates of a rung (:data:`disagglab.experiments.halving.Measure`).

    A start that fails puts out every candidate that these servers would have played: to try it again for
    each would cost as many failed starts.

    Args:
        play: a candidate's topology with its servers ready; may raise StartError or ConfigError.
        run: one run on it with the prompts of a seed, with its proof; invalid runs come back as such.
    """

    def __init__(self, play: Callable[[Candidate], Topology], run: Callable[[Topology, int], Run]) -> None:
        self._play, self._run = play, run
        self._running: StartKey | None = None

    def __call__(
        self, candidates: Sequence[Candidate], seed: int, rung: str
    ) -> Mapping[Candidate, Run | str]:
        """One run of each candidate, or why there is none."""
        found: dict[Candidate, Run | str] = {}
        for group in by_start(candidates, self._running, random.Random(f"{seed} {rung}")):
            self._running = start_key(group[0])
            for one in group:
                try:
                    topology = self._play(one)
                except (StartError, ConfigError) as error:
                    self._running = None
                    found.update(dict.fromkeys(group[group.index(one) :], f"did not start: {error}"))
                    break
                found[one] = self._run(topology, seed)
        return found

"""Conversations on every arm in turns: what is found in prefix caches, how long turns take, and verdicts.

The replicate is a whole dialogue on one arm, as it is a whole run elsewhere: requests inside wait in the same
queues. Every arm gets the same dialogue in a round but for its first words, which are new each time, so that
no arm finds what another left. Each account is proved before a figure is taken from it.
"""

from __future__ import annotations

import dataclasses
import random
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence

from disagglab.config.traffic import Dialogue, dialogue
from disagglab.errors import InvalidRun
from disagglab.experiments import routing
from disagglab.experiments.beside_dynamo import PAIRS, tagged
from disagglab.experiments.rounds import trials
from disagglab.experiments.routing import Held, Size
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import CLIENT_BOUND
from disagglab.measure.ledger import FOUND, QUERIED
from disagglab.measure.talk import Spoken, talk
from disagglab.results.gate import GateState, State
from disagglab.results.records import FigureRow, Ledger, Sent, VerdictRow
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import DISAGGREGATED, REPLICATED, SINGLE, SINGLE_AGAIN, Topology
from disagglab.stats.metric import Metric, percentile
from disagglab.stats.verdict import Verdict, holm, judge, noise_floor

CONVERSATIONS = "conversations"  # in the place of a workload's name
MARGIN = 0.05
HIT_RATE, TTFT, E2E, THROUGHPUT = "hit_rate", "ttft_p50", "e2e_mean", "output_tokens_per_s"


def _hit_rate(held: Held) -> float:
    """Of n tokens k: (k + 1/2) / (n + 1), so that its logarithm exists; see :class:`.stats.metric.Metric`."""
    return (sum(held.hits.values()) + 0.5) / (sum(held.queries.values()) + 1)


_OF_A_DIALOGUE: tuple[Metric[Held], ...] = (
    Metric(HIT_RATE, "share of prompt tokens", "higher", _hit_rate),
    Metric(
        TTFT, "s", "lower",
        lambda held: percentile([turn.ttft_s for turn in held.talk.turns], 50),
    ),
    Metric(
        E2E, "s", "lower",
        lambda held: statistics.fmean(turn.e2e_s for turn in held.talk.turns),
    ),
    Metric(
        THROUGHPUT, "tokens/s", "higher",
        lambda held: sum(turn.output_tokens for turn in held.talk.turns) / held.talk.duration_s,
    ),
)  # fmt: skip
FIGURES = {metric.name: metric for metric in _OF_A_DIALOGUE}


def said(size: Size, order_seed: int) -> Dialogue:
    """What one arm is told in one round. Its first words are new, so nothing of it is in any cache.

    Six digits, so that the prompts of all arms are equally long.
    """
    nonce = f"Note {secrets.randbelow(900_000) + 100_000}"
    return dialogue(
        size.conversations,
        size.turns,
        shared_system=False,
        nonce=nonce,
        seed=order_seed,
        output_tokens=size.output_tokens,
    )


def hold(topology: Topology, spoken: Dialogue, shape: KvShape, concurrency: int) -> Held:
    """One dialogue on one arm, with proof by the servers' counters; see :func:`.routing.run_arm`.

    Disaggregated, hits are those of the prefill servers, since only they save computing; bytes and tokens are
    proved as for any run (:func:`disagglab.measure.ledger.prove`).

    Raises:
        InvalidRun: if a request failed, the accounts do not agree, or the client was the bottleneck.
        TransferError: if KV moved otherwise than computed.
    """
    if topology.kind == DISAGGREGATED:
        arm = _hold_apart(topology, spoken, shape, concurrency)
    else:
        arm = routing.run_arm(topology, spoken, concurrency=concurrency, ids=False)
    shares = [arm.requests[server.name] for server in topology.servers]
    if topology.kind == REPLICATED and max(shares) - min(shares) > 1:
        raise InvalidRun(f"{topology.name}: round robin did not alternate: requests by server {arm.requests}")
    client = arm.talk.client
    if client is not None and client.cpu_share > CLIENT_BOUND:
        raise InvalidRun(
            f"{topology.name}: the client was busy {client.cpu_share:.0%} of the time, so it is what was"
            " measured; hold fewer conversations at once"
        )
    return arm


def _hold_apart(topology: Topology, spoken: Dialogue, shape: KvShape, concurrency: int) -> Held:
    before = ledger.read(topology)
    url, model = topology.router.url, topology.served_name
    found = talk(url, model, spoken, concurrency=concurrency, ids=False)
    routing.require_no_failure(topology.name, found, len(spoken.order))
    after = ledger.settle(topology, before, len(found.turns))
    size = ledger.block_size(after.snapshots[topology.decode[0].name])
    sent = shared_out(found.turns, ledger.compare(topology, before, after), size)
    book = ledger.prove(topology, before, after, sent, shape, topology.version)

    def on_prefill(metric: str) -> dict[str, int]:
        names = [server.name for server in topology.prefill]
        return {name: round(delta(before.snapshots[name], after.snapshots[name], metric)) for name in names}

    arm = Held(topology.name, found, dict(book.finished), on_prefill(FOUND), on_prefill(QUERIED))
    asked, computed = sum(arm.queries.values()), book.prefill_computed_tokens
    if asked - computed != sum(arm.hits.values()):
        raise InvalidRun(
            f"{topology.name}: prefill looked for {asked:,} prompt tokens, found {sum(arm.hits.values()):,}"
            f" and computed {computed:,}"
        )
    return arm


def shared_out(trials: Sequence[Spoken], book: Ledger, block: int) -> list[Sent]:
    """The requests, with what the prefix caches held shared out so that the totals are the counters'.

    Which turn found how much is not known where two talk at once; the bytes that have to move depend on the
    total alone, because caches hold whole blocks.

    Raises:
        InvalidRun: if a total is no multiple of ``block``, or more than the prompts' whole blocks.
    """
    prompts = sum(turn.prompt_tokens for turn in trials)
    left = {"decode": book.cached_tokens, "prefill": prompts - book.prefill_computed_tokens}
    sent = []
    for turn in trials:
        most = (turn.prompt_tokens - 1) // block * block
        held = {role: min(rest, most) for role, rest in left.items()}
        left = {role: rest - held[role] for role, rest in left.items()}
        sent.append(Sent(turn.prompt_tokens, turn.output_tokens, held["decode"], held["prefill"]))
    if any(left.values()) or any(one.held_by_decode % block or one.held_by_prefill % block for one in sent):
        raise InvalidRun(
            f"prefix caches held {book.cached_tokens:,} tokens on decode and"
            f" {prompts - book.prefill_computed_tokens:,} on prefill: not whole blocks of {block} of these"
            " prompts"
        )
    return sent


def talk_rounds(
    arms: Sequence[Topology],
    rounds: int,
    size: Size,
    told: Callable[[Topology, Dialogue], Held],
    progress: Callable[[str], None],
) -> dict[str, list[Held]]:
    """Every arm holds the dialogue in every round, in mirrored order; by arm, one a round.

    Within a round all arms have the same order of turns. Before, each has a few turns that do not count.

    Args:
        told: :func:`hold` with what it needs besides.

    Raises:
        InvalidRun: if a single request of any arm failed; then there is no figure of any.
        TransferError: see :func:`hold`.
    """
    found: dict[str, list[Held]] = {arm.name: [] for arm in arms}
    for arm in arms:
        progress(f"warm-up, {arm.name}")
        told(arm, said(dataclasses.replace(size, conversations=arm.cycle, turns=1), 0))
    for turn in trials(arms, lambda _: [size], rounds, lambda *_: random.getrandbits(31)):
        progress(turn.said(turn.arm.name))
        found[turn.arm.name].append(told(turn.arm, said(turn.subject, turn.seed)))
    return found


def value(arm: Held, figure: str) -> float:
    """One of FIGURES, of one arm in one round.

    Raises:
        InvalidRun: if there is no turn.
    """
    found = FIGURES[figure].formula(arm) if arm.talk.turns else None
    if found is None:
        raise InvalidRun(f"{arm.name}: no turn was answered")
    return found


def values(told: Mapping[str, Sequence[Held]], arm: str, figure: str) -> list[float]:
    """A figure of an arm, a value a round; empty if the arm was not measured. ``arm``: without TAG."""
    return [value(one, figure) for one in told.get(tagged(arm), ())]


def talk_rows(told: Mapping[str, Sequence[Held]]) -> list[VerdictRow]:
    """A row a figure and pair of PAIRS that was measured; all are one family. Then the A/A pairs."""
    asked = [
        (figure, baseline, candidate)
        for baseline, candidate in PAIRS
        for figure in FIGURES
        if values(told, baseline, figure) and values(told, candidate, figure)
    ]
    verdicts = [judge(_paired(told, *row), FIGURES[row[0]].better, MARGIN) for row in asked]
    adjusted = holm([verdict.p for verdict in verdicts])
    rows = [
        _row(told, row, verdict, GateState(State.BESIDE), p, len(adjusted))
        for row, verdict, p in zip(asked, verdicts, adjusted, strict=True)
    ]
    for figure in FIGURES:
        if values(told, SINGLE_AGAIN, figure):
            identical = (figure, SINGLE, SINGLE_AGAIN)
            verdict = judge(_paired(told, *identical), FIGURES[figure].better, MARGIN)
            rows.append(_row(told, identical, verdict, GateState(State.IDENTICAL), None))
    return rows


def _paired(
    told: Mapping[str, Sequence[Held]], figure: str, baseline: str, candidate: str
) -> list[tuple[float, float]]:
    return list(zip(values(told, baseline, figure), values(told, candidate, figure), strict=True))


def _row(
    told: Mapping[str, Sequence[Held]],
    asked: tuple[str, str, str],
    verdict: Verdict,
    gate: GateState,
    p_adjusted: float | None,
    family: int | None = None,
) -> VerdictRow:
    figure, baseline, candidate = asked
    identical = _paired(told, figure, SINGLE, SINGLE_AGAIN) if values(told, SINGLE_AGAIN, figure) else []
    return VerdictRow.of(
        verdict,
        workload=CONVERSATIONS,
        metric=figure,
        unit=FIGURES[figure].unit,
        candidate=tagged(candidate),
        baseline=tagged(baseline),
        candidate_value=statistics.fmean(values(told, candidate, figure)),
        baseline_value=statistics.fmean(values(told, baseline, figure)),
        gate=gate,
        p_adjusted=p_adjusted,
        family=family,
        floor=noise_floor(identical) if identical else None,
    )


def talk_figures(told: Mapping[str, Sequence[Held]], size: Size) -> list[FigureRow]:
    """Every figure of every arm, for the history of sessions."""
    definition = "-".join(map(str, dataclasses.astuple(size)))
    return [
        FigureRow(
            CONVERSATIONS,
            arm,
            metric.name,
            metric.unit,
            metric.better,
            tuple(value(one, metric.name) for one in made),
            definition,
        )
        for arm, made in told.items()
        for metric in FIGURES.values()
        if made
    ]

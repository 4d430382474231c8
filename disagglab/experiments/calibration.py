"""The speeds of a lab, measured one at a time while nothing else runs: what every prediction is made from.

A prompt alone on a node, steps of one to many sequences on all nodes at once, and the same prompts through
prefill and decode nodes. docs/explanation/break-even.md says what is fitted to them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from disagglab.config.schema import Lab
from disagglab.config.workload import CHUNK, Workload
from disagglab.errors import InvalidRun
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.measure.run import measure
from disagglab.predict import speedfit, stepbudget
from disagglab.predict.breakeven import Cluster, Speeds
from disagglab.predict.speedfit import HandedTime, PrefillTime, StepTime
from disagglab.results.records import Run
from disagglab.results.run_folder import Store
from disagglab.serving.prometheus import delta
from disagglab.serving.topology import Topology
from disagglab.stats import linefit
from disagglab.stats.linefit import LineFit

SEED = 67_000
PROMPT_SHARES, SHORT_PROMPT_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2), (1 / 32, 1 / 8, 1 / 4)  # of max_model_len
BATCHES, SHORT_BATCHES = (2, 4, 8, 16), (8,)  # sequences on each node; 1 is measured with the prompts
PASSES, SHORT_PASSES = 2, 1  # the quieter one counts, because a shared core is slow for seconds at a time
PROMPT_REPEATS, PROMPT_OUTPUT, STEP_OUTPUT = 2, 8, 24  # requests; tokens
PREFILL_TIME = "vllm:request_prefill_time_seconds_sum"


@dataclass(frozen=True)
class Calibration:
    """The speeds of a lab, and what they were fitted to."""

    prefills: list[PrefillTime]
    steps: list[StepTime]
    handed: list[HandedTime]
    link: LineFit
    speeds: Speeds

    def cluster(self, lab: Lab, shape: KvShape, block_size: int) -> Cluster:
        """The lab as the models take it; ``block_size`` in tokens, as its servers say."""
        budget = stepbudget.of_lab(lab)
        return Cluster(
            self.speeds,
            layout(shape, block_size),
            lab.vllm.version,
            budget.tokens,
            len(lab.prefill),
            len(lab.decode),
            budget.sequences,
        )


def calibrate(
    engine: LoadEngine,
    single: Topology,
    replicated: Topology,
    disaggregated: Topology,
    shape: KvShape,
    max_model_len: int,
    store: Store,
    progress: Callable[[str], None],
    short: bool = False,
) -> Calibration:
    """Measure and fit all speeds; every run is proved by its ledger and kept in the store.

    Args:
        max_model_len: of the servers, tokens; prompts are shares of it.
        short: fewer lengths, one batch, one pass.

    Raises:
        InvalidRun: if a run breaks a rule, or no step held all sequences of its batch.
    """
    shares = SHORT_PROMPT_SHARES if short else PROMPT_SHARES
    lengths = [max(CHUNK, int(share * max_model_len)) for share in shares]
    batches = SHORT_BATCHES if short else BATCHES
    nodes = len(replicated.servers)
    alone: dict[int, list[tuple[PrefillTime, StepTime]]] = {length: [] for length in lengths}
    handed: dict[int, list[HandedTime]] = {length: [] for length in lengths}
    together: dict[int, list[StepTime]] = {batch: [] for batch in batches}
    seed = SEED

    def run(topology: Topology, prompt: int, output: int, requests: int, concurrency: int) -> Run:
        nonlocal seed
        seed += 1
        progress(f"{topology.name}, {requests} prompts of {prompt} tokens, {concurrency} at once")
        asked = Workload(
            name=f"speed-{prompt}-{concurrency}",
            prompt_tokens=prompt,
            output_tokens=output,
            requests=requests,
            concurrency=concurrency,
        )
        done = measure(engine, topology, asked, seed, 0, shape)
        store.add_run(done)
        if done.invalid is not None:
            raise InvalidRun(f"speeds of {topology.name}, {asked.name}: {done.invalid}")
        return done

    for topology in (single, replicated, disaggregated):
        meet = max(nodes, topology.cycle)  # the first request of a pair is slower, through a router above all
        run(topology, lengths[0], 2, meet, meet)
    for _ in range(SHORT_PASSES if short else PASSES):
        for length in lengths:
            alone[length].append(alone_on(single, run(single, length, PROMPT_OUTPUT, PROMPT_REPEATS, 1)))
            handed[length].append(handed_over(run(disaggregated, length, PROMPT_OUTPUT, PROMPT_REPEATS, 1)))
        for batch in batches:
            done = run(replicated, CHUNK, STEP_OUTPUT, nodes * batch, nodes * batch)
            together[batch].append(step_of(done, batch))
    prefills = [min((one for one, _ in rows), key=lambda one: one.ttft_s) for rows in alone.values()]
    steps = [min((one for _, one in rows), key=lambda one: one.step_s) for rows in alone.values()]
    steps += [min(rows, key=lambda one: one.step_s) for rows in together.values()]
    quieter = [min(rows, key=lambda one: one.ttft_s) for rows in handed.values()]
    transfers = [one for rows in handed.values() for one in rows]
    link = linefit.fit([one.kv_bytes for one in transfers], [one.transfer_s for one in transfers])
    return Calibration(prefills, steps, quieter, link, speedfit.fit_speeds(prefills, steps, quieter, link))


def alone_on(topology: Topology, run: Run) -> tuple[PrefillTime, StepTime]:
    """TTFT of prompts that came one at a time, and the steps between their tokens.

    Raises:
        InvalidRun: if the run has no readings of its servers' counters, or no gap between two tokens.
    """
    if run.readings is None:
        raise InvalidRun(f"{run.topology}: the run has no counters, so what the server counts is not known")
    before, after = run.readings
    counted = sum(
        delta(before.snapshots[server.name], after.snapshots[server.name], PREFILL_TIME)
        for server in topology.servers
    )
    length, output = run.workload.prompt_tokens, run.workload.output_tokens
    gaps = [gap for one in run.itl_s for gap in one]
    if not gaps:
        raise InvalidRun(f"{run.topology}: no answer has two tokens, so the time of a step is not known")
    outside = (sum(run.ttft_s) - counted) / len(run.ttft_s)
    return (
        PrefillTime(length, statistics.median(run.ttft_s), outside),
        StepTime(1, length + output / 2, statistics.median(gaps)),
    )


def handed_over(run: Run) -> HandedTime:
    """TTFT of prompts that came one at a time and crossed the link, and their transfers.

    Raises:
        InvalidRun: if the run was not proved, or nothing was transferred in it.
    """
    book = run.ledger
    if book is None or not book.transfers:
        raise InvalidRun(f"{run.topology}: the run has no ledger, so its transfers are not known")
    moved, seconds = book.kv_bytes / book.transfers, book.transfer_s / book.transfers
    return HandedTime(run.workload.prompt_tokens, statistics.median(run.ttft_s), moved, seconds)


def step_of(run: Run, batch: int) -> StepTime:
    """Steps in which all sequences of a closed loop decode, ``batch`` on each node.

    Raises:
        InvalidRun: if there is no such step.
    """
    gaps = speedfit.full_gaps(run)
    if not gaps:
        raise InvalidRun(f"{batch} sequences a node: the first had its answer before the last had a token")
    context = run.workload.prompt_tokens + run.workload.output_tokens / 2
    return StepTime(batch, context, statistics.median(gaps))

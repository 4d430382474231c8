"""KV transfers under other settings, on a pool of blocks as traffic leaves it.

On a fresh server the blocks of a prompt lie side by side, and NIXL merges them into a few large pieces.
Traffic returns blocks in another order than it took them, and soon every block is a piece of its own. So
the pools of all servers are first passed through by traffic, more than once; what is measured then is what
a user would see.

Only with ``--variant NAME`` (a [[variant]] of the lab file, several if repeated). The servers of every
variant are resident beside the lab's own, on the same nodes; each turn measures all of them, in mirrored
order. The expectation of a variant stands in the lab file before it is measured.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import pytest

from disagglab import figures, ledger, moved, transfertrace
from disagglab.comparison import measure
from disagglab.kv import KvShape
from disagglab.kvlayout import layout
from disagglab.load import LoadEngine, Run
from disagglab.moved import Moved
from disagglab.recorder import Recorder
from disagglab.section import Lab
from disagglab.session import Session
from disagglab.store import Store, VerdictRow
from disagglab.topology import Topology
from disagglab.verdict import Direction, judge
from disagglab.workload import Workload

SEED = 83_000
PASSES = 2.0  # times that traffic goes through each pool of blocks before anything counts
MOST_AGEING_RUNS, SHORT_AGEING_RUNS = 12, 2
SHORT, LONG = 1 / 8, 1 / 2  # of max_model_len: 2,048 and 8,192 tokens of 16,384
BUSY, SHORT_BUSY = 16, 4  # requests under way at once
POOL_USE = 0.8  # of a pool, by all requests under way
MARGIN = 0.05
TIME, SHARE, THROUGHPUT = "transfer time", "transfer / TTFT", "output tokens/s"


@dataclass
class Settings:
    """The lab's own setting first, then the variants; ``ageing``: descriptors per MiB, run by run, by arm."""

    arms: list[Topology]
    workloads: list[Workload]
    ageing: dict[str, list[float]] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)

    @property
    def own(self) -> str:
        """The arm of the lab's own setting."""
        return self.arms[0].name

    def moved(self, arm: str, workload: Workload) -> list[Moved]:
        """What the connector did, turn by turn."""
        return [moved.of(run) for run in self.runs[arm, workload.name]]


def pool_tokens(topology: Topology) -> int:
    """Tokens that the smallest pool of KV blocks of a topology holds."""
    configs = [ledger.cache_config(server.metrics()) for server in topology.servers]
    return min(int(one["num_gpu_blocks"]) * int(one["block_size"]) for one in configs)


def workloads_of(lab: Lab, tokens: int, short: bool) -> list[Workload]:
    """One prompt at a time and many at once, of two lengths; ``tokens``: of a pool."""
    most = SHORT_BUSY if short else BUSY
    found = []
    for what, share, alone, waves, output in (("short", SHORT, 8, 3, 64), ("long", LONG, 4, 2, 16)):
        prompt = int(share * lab.model.max_model_len) - (output if share == LONG else 0)
        answer = max(2, round(output * lab.scale.output))
        at_once = max(1, min(most, int(POOL_USE * tokens / (prompt + answer))))
        shape = {"prompt_tokens": prompt, "output_tokens": answer}
        requests = max(2, round(alone / (4 if short else 1)))
        found.append(Workload(name=f"alone-{what}", requests=requests, concurrency=1, **shape))
        name = f"{at_once}-at-once-{what}"
        found.append(Workload(name=name, requests=waves * at_once, concurrency=at_once, **shape))
    return found


def done(run: Run, store: Store) -> Run:
    """Keep the run; a transfer that was not proved ends the session's part."""
    store.add_run(run)
    assert run.invalid is None, run.invalid
    return run


@pytest.fixture(scope="module")
def settings(
    live: Session,
    lab: Lab,
    engine: LoadEngine,
    disaggregated: Topology,
    variants: list[Topology],
    shape: KvShape,
    store: Store,
) -> Settings:
    """Pools aged, then every arm on every workload in every round, in mirrored order."""
    if not variants:
        pytest.skip("VARIANT: asked for with --variant NAME, a [[variant]] of the lab file")
    arms = [disaggregated, *variants]
    pools = {arm.name: pool_tokens(arm) for arm in arms}
    found = Settings(arms, workloads_of(lab, min(pools.values()), live.short))
    line = live.progress("settings")
    with live.uncaptured():
        traffic = found.workloads[1]
        most = SHORT_AGEING_RUNS if live.short else MOST_AGEING_RUNS
        for arm in arms:
            each = traffic.requests * traffic.tokens / pools[arm.name]
            found.ageing[arm.name], found.passes[arm.name] = [], 0.0
            while found.passes[arm.name] < PASSES and len(found.ageing[arm.name]) < most:
                line.show(
                    f"ageing the pools of {arm.name}, {found.passes[arm.name]:.1f} of {PASSES:g} passes"
                )
                run = done(
                    measure(engine, arm, traffic, SEED + len(found.ageing[arm.name]), -1, shape), store
                )
                found.ageing[arm.name].append(moved.of(run).descriptors_per_mib)
                found.passes[arm.name] += each
        for number in range(live.rounds):
            for position, workload in enumerate(found.workloads):
                seed = SEED + 100 * (number + 1) + position
                for arm in arms if number % 2 == 0 else reversed(arms):
                    line.show(f"round {number + 1} of {live.rounds}, {workload.name}, {arm.name}")
                    run = done(measure(engine, arm, workload, seed, number, shape), store)
                    found.runs.setdefault((arm.name, workload.name), []).append(run)
        line.done(f"{len(found.runs)} runs a round")
    return found


def test_traffic_scatters_the_blocks(settings: Settings, lab: Lab, shape: KvShape, record: Recorder) -> None:
    """Descriptors per MiB before and after traffic; never more than one for each block and layer, K and V.

    A free list is a queue: blocks are appended in the order in which requests end, last block first, and
    taken from the front. After one pass a prompt's blocks are wherever others left them.
    """
    for arm in settings.arms:
        block = ledger.block_size(arm.decode[0].metrics())
        for number, value in enumerate(settings.ageing[arm.name], 1):
            record.numbers(
                f"descriptors per MiB, ageing run {number}", [value], "1/MiB", arm=arm.name, what="run"
            )
        for workload in settings.workloads:
            counted = settings.moved(arm.name, workload)
            record.numbers(
                f"descriptors per MiB, {workload.name}",
                [one.descriptors_per_mib for one in counted],
                "1/MiB",
                arm=arm.name,
                note=f"{counted[0].bytes / counted[0].transfers / 2**20:.1f} MiB a transfer; blocks of"
                f" {block} tokens; pools passed through {settings.passes[arm.name]:.1f} times before",
            )
            blocks = layout(shape, block).bytes_to_move(workload.prompt_tokens, lab.vllm.version)
            most = 2 * len(shape.layers) * -(-workload.prompt_tokens // block)
            for one in counted:
                assert one.bytes == one.transfers * blocks
                assert 1 <= one.descriptors / one.transfers <= most, f"{arm.name}, {workload.name}: {one}"


def test_transfers_under_each_setting(settings: Settings, lab: Lab, store: Store, record: Recorder) -> None:
    """Every variant is judged against the lab's own setting: transfer time, its share of TTFT, throughput.

    Paired by turn; the same prompts within a turn. The time is the connector's own, from posting to the
    engine's look that finds it done.
    """
    expected = {variant.name: f"{variant.what}; expected: {variant.expects}" for variant in lab.variants}
    values: dict[tuple[str, str, str], list[float]] = {}
    for arm in settings.arms:
        note = expected.get(arm.name.partition("@")[2], "the lab's own setting")
        for workload in settings.workloads:
            runs, counted = settings.runs[arm.name, workload.name], settings.moved(arm.name, workload)
            found = {
                TIME: ([one.seconds / one.transfers for one in counted], "s"),
                "posting": ([one.post_s / one.transfers for one in counted], "s"),
                "bandwidth": ([one.gb_per_s for one in counted], "GB/s"),
                SHARE: (
                    [figures.figures(run)["transfer_share_of_ttft"] or 0.0 for run in runs],
                    "share of TTFT",
                ),
                "TTFT p50": ([figures.figures(run)["ttft_p50"] or 0.0 for run in runs], "s"),
                THROUGHPUT: (
                    [figures.figures(run)["output_tokens_per_s"] or 0.0 for run in runs],
                    "tokens/s",
                ),
            }
            for name, (series, unit) in found.items():
                values[arm.name, workload.name, name] = series
                command = runs[0].command
                record.numbers(
                    f"{name}, {workload.name}", series, unit, arm=arm.name, note=note, command=command
                )
    for arm in settings.arms[1:]:
        for workload in settings.workloads:
            for name, unit, better in ((TIME, "s", "lower"), (THROUGHPUT, "tokens/s", "higher")):
                store.add(row(values, settings.own, arm.name, workload.name, name, unit, better))
    for name in (TIME, "bandwidth"):
        series = {
            arm.name: (
                [float(place) for place in range(len(settings.workloads))],
                [statistics.median(values[arm.name, one.name, name]) for one in settings.workloads],
            )
            for arm in settings.arms
        }
        record.plot(
            f"{name} of a KV transfer under each setting",
            "",
            "s" if name == TIME else "GB/s",
            series,
            style="points",
            caption="Median over turns; pools aged by traffic.",
            ticks=[one.name for one in settings.workloads],
        )
    assert all(one > 0 for series in values.values() for one in series), (
        "a figure of a proved run is not positive"
    )


def row(
    values: dict[tuple[str, str, str], list[float]],
    own: str,
    arm: str,
    workload: str,
    name: str,
    unit: str,
    better: Direction,
) -> VerdictRow:
    """The verdict on one figure of a variant, as the report shows it."""
    theirs, ours = values[own, workload, name], values[arm, workload, name]
    verdict = judge(list(zip(theirs, ours, strict=True)), better, MARGIN)
    return VerdictRow(
        workload=workload,
        metric=name,
        unit=unit,
        candidate=arm,
        baseline=own,
        candidate_value=statistics.fmean(ours),
        baseline_value=statistics.fmean(theirs),
        outcome=verdict.outcome,
        effect=verdict.effect,
        low=verdict.low,
        high=verdict.high,
        rounds=verdict.rounds,
        smallest_detectable=verdict.smallest_detectable,
        gate="variant",
        reason=verdict.reason,
        p_adjusted=verdict.p,
        p_sign_flip=verdict.p_sign_flip,
    )


def test_a_transfer_is_over_before_the_engine_looks(settings: Settings, lab: Lab, record: Recorder) -> None:
    """Posting, the last look that found it under way, the look that found it done: every transfer, step by
    step.

    The engine looks once a step, so a transfer that ends early in a step is found at its end. What lies
    between the last two looks is no work of the link. The log and the connector's counters tell of the same
    bytes.
    """
    if not lab.transport.trace:
        pytest.skip("TRACE: asked for with trace = true in [transport]")
    for arm in settings.arms:
        traced = [
            one
            for server in arm.servers
            for one in transfertrace.read(server.process.log.read_text(errors="replace").splitlines())
        ]
        assert traced, f"{arm.name}: no server logged a transfer; look: grep 'transfer {{' in its log"
        for workload in settings.workloads:
            counted = settings.moved(arm.name, workload)
            size = counted[0].bytes // counted[0].transfers
            same = [one for one in traced if one.bytes == size]
            runs = sum(one.transfers for one in counted)
            assert len(same) >= runs, (
                f"{arm.name}, {workload.name}: {runs} transfers counted, {len(same)} logged"
            )
        for size in sorted({one.bytes for one in traced}):
            same = [one for one in traced if one.bytes == size]
            for name, series in (
                ("posting", [one.posted_s for one in same]),
                ("until the look that found it done", [one.done_s for one in same]),
                ("of that, after the last look before", [one.unseen_s for one in same]),
                ("descriptors", [float(one.descriptors) for one in same]),
            ):
                unit = "1" if name == "descriptors" else "s"
                record.numbers(
                    f"{name}, {size / 2**20:.1f} MiB", series, unit, arm=arm.name, what="transfers",
                    note="all transfers of the session, the ageing ones too",
                )  # fmt: skip
            assert all(0 <= one.unseen_s <= one.done_s for one in same)

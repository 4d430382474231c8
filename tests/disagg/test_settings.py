"""KV transfers under other settings, on a pool of blocks as traffic leaves it.

On a fresh server the blocks of a prompt lie side by side, and NIXL merges them into a few large pieces.
Traffic returns blocks in another order than it took them, and soon every block is a piece of its own. So the
pools of all servers are first aged by many short prompts with long answers, until a probe finds them as
scattered as the probe before; what is measured then is what a user would see. The oracles are the connector's
counters, each run proved to the byte, the log of every transfer, and the number of blocks and layers.

Only with ``--way NAME`` (a [[way]] of the lab file, several if repeated). The servers of every
way are resident beside the lab's own, on the same nodes; each turn measures all of them, in mirrored
order. The expectation of a way stands in the lab file before it is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.experiments import pool_ageing
from disagglab.experiments.pool_ageing import Ageing
from disagglab.experiments.rounds import trials
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger, transfer_stats
from disagglab.measure.bench import LoadEngine
from disagglab.measure.run import measure
from disagglab.measure.transfer_stats import BANDWIDTH, ITL, THROUGHPUT, TIME, UNITS, Moved
from disagglab.predict import scattered_reads
from disagglab.pytest_plugin.session import Session
from disagglab.results.gate import GateState, State
from disagglab.results.recorder import Recorder
from disagglab.results.records import Run, VerdictRow
from disagglab.results.run_folder import Store
from disagglab.serving import transfer_log
from disagglab.serving.topology import Topology
from disagglab.serving.transfer_log import Traced
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import holm, judge

SEED = 83_000
MARGIN = 0.05
JUDGED: dict[str, Direction] = {TIME: "lower", THROUGHPUT: "higher"}
AGEING_ROUND = -1


@dataclass
class Settings:
    """The lab's own setting first, then the ways; ``made``: every run of an arm, in order, ageing and
    probes too; ``logged``: the transfers that each server of an arm logged in these runs. ``worst``: the
    descriptors of a prompt of so many tokens on an arm, if each block and layer is one.
    """

    arms: list[Topology]
    workloads: list[Workload]
    worst: Callable[[Topology, int], int]
    ageing: dict[str, Ageing] = field(default_factory=dict)
    made: dict[str, list[Run]] = field(default_factory=dict)
    logged: dict[str, dict[str, list[Traced]]] = field(default_factory=dict)

    def runs(self, arm: Topology, workload: Workload) -> list[Run]:
        """The runs of one workload on one arm, turn by turn."""
        return [run for run in self.made[arm.name] if run.workload.name == workload.name]


def logged_by(arm: Topology) -> dict[str, list[Traced]]:
    """The transfers that each server of an arm has logged up to now."""
    return {server.name: transfer_log.read(server.process.lines_so_far()) for server in arm.servers}


@pytest.fixture(scope="module")
def settings(
    live: Session,
    lab: Lab,
    engine: LoadEngine,
    disaggregated: Topology,
    ways: list[Topology],
    shape: KvShape,
    store: Store,
) -> Settings:
    """Pools aged, then every arm on every workload in every round, in mirrored order."""
    apart = [topology for topology in ways if topology.decode]  # the others move no KV
    if not apart:
        pytest.skip("WAY: asked for with --way NAME, a [[way]] of the lab file that moves KV")
    arms = [disaggregated, *apart]
    pool = min(map(pool_ageing.tokens_of, arms))
    blocks = {arm.name: layout(shape, ledger.block_size(arm.decode[0].metrics())) for arm in arms}
    found = Settings(
        arms,
        pool_ageing.workloads(lab, pool, live.short),
        worst=lambda arm, tokens: scattered_reads.descriptors(blocks[arm.name], tokens, arm.version),
        made={arm.name: [] for arm in arms},
    )
    earlier = {arm.name: logged_by(arm) for arm in arms}
    line = live.progress("settings")

    def go(arm: Topology, workload: Workload, seed: int, number: int) -> Run:
        run = measure(engine, arm, workload, seed, number, shape)
        store.add_run(run)
        if run.invalid is not None:
            raise InvalidRun(run.invalid)
        found.made[arm.name].append(run)
        return run

    def age(arm: Topology) -> Ageing:
        probe = pool_ageing.probe(found.workloads, ledger.block_size(arm.decode[0].metrics()))

        def send(workload: Workload) -> Moved:
            before = len(found.made[arm.name])
            line.show(f"ageing the pools of {arm.name}, run {(before + 1) // 2}, {workload.name}")
            return transfer_stats.of(go(arm, workload, SEED + before, AGEING_ROUND))

        def probed() -> float:
            one = send(probe)
            return one.descriptors / one.transfers / found.worst(arm, probe.prompt_tokens)

        traffic = pool_ageing.traffic(found.workloads, pool)
        return pool_ageing.age(traffic, pool_ageing.tokens_of(arm), most, send, probed)

    most = pool_ageing.SHORT_AGEING_RUNS if live.short else pool_ageing.MOST_AGEING_RUNS
    with live.uncaptured():
        for arm in arms:
            found.ageing[arm.name] = age(arm)
        for turn in trials(
            arms,
            lambda _: found.workloads,
            live.rounds,
            lambda number, position: SEED + 100 * (number + 1) + position,
        ):
            line.show(turn.said(turn.subject.name, turn.arm.name))
            go(turn.arm, turn.subject, turn.seed, turn.number)
        line.done(f"{len(arms) * len(found.workloads)} runs a round")
    for arm in arms:
        found.logged[arm.name] = {
            server: lines[len(earlier[arm.name][server]) :] for server, lines in logged_by(arm).items()
        }
    return found


def test_pieces_never_exceed_blocks_and_layers(settings: Settings, record: Recorder) -> None:
    """Every run, before, while and after pools age, has at most one descriptor for each block and layer.

    A layer's keys and values of a block lie together; settings that put all layers of a block together stay
    far below. A free list is a queue: blocks are appended in the order in which requests end, last block
    first, and taken from the front. Where the probes do not settle, later rounds are of another pool than
    earlier ones, and the note says so.
    """
    for arm in settings.arms:
        for run in settings.made[arm.name]:
            counted, most = transfer_stats.of(run), settings.worst(arm, run.workload.prompt_tokens)
            assert counted.transfers <= counted.descriptors <= counted.transfers * most, (
                f"{arm.name}, {run.workload.name}: {counted}; at most {most} descriptors a transfer"
            )

    for arm in settings.arms:
        ageing = settings.ageing[arm.name]
        for name, values in (("before", [ageing.fresh]), ("after each run of", ageing.probes)):
            name = f"descriptors of the worst possible, probe {name} ageing traffic"
            record.numbers(name, values, "share", arm=arm.name, what="probes", note=str(ageing))
        for workload in settings.workloads:
            every = [transfer_stats.of(run) for run in settings.runs(arm, workload)]
            record.numbers(
                f"descriptors per MiB, {workload.name}",
                [one.descriptors_per_mib for one in every],
                "1/MiB",
                arm=arm.name,
                note=f"{every[0].bytes / every[0].transfers / transfer_stats.MIB:.1f} MiB a transfer; at most"
                f" {settings.worst(arm, workload.prompt_tokens)} descriptors each; pools {ageing}",
            )
    probes = {name: [one.fresh, *one.probes] for name, one in settings.ageing.items()}
    record.plot(
        "Scattering of a pool of blocks by traffic",
        "ageing runs before the probe",
        "descriptors / worst possible",
        {name: (range(len(values)), values) for name, values in probes.items()},
        caption="; ".join(f"{name}: {one}" for name, one in settings.ageing.items()) + ".",
    )


def test_transfers_under_each_setting(settings: Settings, lab: Lab, store: Store, record: Recorder) -> None:
    """Every way is judged against the lab's own setting: transfer time and throughput.

    Paired by turn; the same prompts within a turn; after Holm over all ways, workloads and figures. The
    time is the connector's own, from posting to the engine's look that finds it done. Posting, share of TTFT
    and p99 ITL are recorded beside: the pull connector posts in the engine's own thread.
    """
    expected = {way.arm: f"{way.what}; expected: {way.expects}" for way in lab.ways}
    values = {
        (arm.name, workload.name): transfer_stats.series(settings.runs(arm, workload))
        for arm in settings.arms
        for workload in settings.workloads
    }
    rows = verdicts(settings, values)

    for row in rows:
        store.add(row)
    for arm in settings.arms:
        note = expected.get(arm.name, "the lab's own setting")
        note += f"; pools {settings.ageing[arm.name]}"
        for workload in settings.workloads:
            command = settings.runs(arm, workload)[0].command
            for name, found in values[arm.name, workload.name].items():
                named = f"{name}, {workload.name}"
                record.numbers(named, found, UNITS[name], arm=arm.name, note=note, command=command)
    for name in (TIME, BANDWIDTH, ITL):
        having = [one for one in settings.workloads if name in values[settings.arms[0].name, one.name]]
        if not having:
            continue
        record.plot(
            f"{name} under each setting",
            "",
            UNITS[name],
            {
                arm.name: (
                    range(len(having)),
                    [statistics.median(values[arm.name, one.name][name]) for one in having],
                )
                for arm in settings.arms
            },
            style="points",
            caption="Median over turns; pools aged by traffic.",
            ticks=[one.name for one in having],
        )


def verdicts(settings: Settings, values: dict[tuple[str, str], dict[str, list[float]]]) -> list[VerdictRow]:
    """A row a way, workload and judged figure, against the lab's own setting; all are one family."""
    own, *others = (arm.name for arm in settings.arms)
    asked = [(arm, one.name, name) for arm in others for one in settings.workloads for name in JUDGED]
    judged = []
    for arm, workload, name in asked:
        pairs = list(zip(values[own, workload][name], values[arm, workload][name], strict=True))
        judged.append(judge(pairs, JUDGED[name], MARGIN))
    adjusted = holm([verdict.p for verdict in judged])
    return [
        VerdictRow.of(
            verdict,
            workload=workload,
            metric=name,
            unit=UNITS[name],
            candidate=arm,
            baseline=own,
            candidate_value=statistics.fmean(values[arm, workload][name]),
            baseline_value=statistics.fmean(values[own, workload][name]),
            gate=GateState(State.WAY),
            p_adjusted=p,
            family=len(adjusted),
        )
        for (arm, workload, name), verdict, p in zip(asked, judged, adjusted, strict=True)
    ]


@pytest.mark.lab_has("trace")
def test_every_transfer_is_logged(settings: Settings, lab: Lab, record: Recorder) -> None:
    """The servers' logs tell of the same transfers as the connector's counters: number, bytes, descriptors.

    All runs since the first probe count, in total and run by run. Each line has the end of the posting, the
    last look that found the transfer under way, and the look that found it done. The engine looks once a
    step, so a transfer that ends early in a step is found at its end. The time after the last look before is
    an upper bound of what was no work of the link: the transfer may have ended at any moment of it.
    """
    for arm in settings.arms:
        runs = settings.made[arm.name]
        counted = [transfer_stats.of(run) for run in runs]
        lines = [one for server in settings.logged[arm.name].values() for one in server]
        assert sum(one.transfers for one in counted) == len(lines), arm.name
        assert sum(one.bytes for one in counted) == sum(one.bytes for one in lines), arm.name
        assert sum(one.descriptors for one in counted) == sum(one.descriptors for one in lines), arm.name
        by_run = transfer_log.by_run(
            settings.logged[arm.name], [run.ledger.transfers_by for run in runs if run.ledger is not None]
        )
        for run, told, one in zip(runs, by_run, counted, strict=True):
            what = f"{arm.name}, round {run.round}, {run.workload.name}"
            assert sum(line.bytes for line in told) == one.bytes, what
            assert sum(line.descriptors for line in told) == one.descriptors, what
            assert all(0 <= line.unseen_s <= line.done_s for line in told), what

        for workload in settings.workloads:
            told = [
                line
                for run, here in zip(runs, by_run, strict=True)
                for line in here
                if run.workload.name == workload.name
            ]
            for name, series, unit in (
                ("posting", [line.posted_s for line in told], "s"),
                ("until the look that found it done", [line.done_s for line in told], "s"),
                ("of that, after the last look before", [line.unseen_s for line in told], "s"),
                ("descriptors", [line.descriptors for line in told], "1"),
            ):
                note = "upper bound of what was no work of the link" if name.startswith("of that") else ""
                named = f"{name}, each transfer, {workload.name}"
                record.numbers(named, series, unit, arm=arm.name, what="transfers", note=note)

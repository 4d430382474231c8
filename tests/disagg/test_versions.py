"""Two vLLM releases on the same nodes, in turns, measured by the same client.

Only with ``--against X.Y.Z`` (or ``make versions OLD=X.Y.Z``). Stored results of another day are for trends:
a machine has good and bad hours. Here the servers of both releases are resident, idle while the other is
measured, and every round asks both the same prompts. Each run has the proof of path that any run has; for the
transfer that includes the block rule of its release, to the byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest

from disagglab.config.labs import with_release
from disagglab.config.schema import Lab
from disagglab.experiments.comparison import Comparison, figure_rows, run_rounds
from disagglab.experiments.verdicts import version_rows
from disagglab.hosts import release
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.measure import ledger
from disagglab.measure.bench import LoadEngine
from disagglab.pytest_plugin.session import Session
from disagglab.results.arm import Arm
from disagglab.results.recorder import Recorder
from disagglab.results.records import Sent
from disagglab.results.run_folder import Store
from disagglab.serving import openai, release_diff
from disagglab.serving.release_diff import Behaviour
from disagglab.serving.topology import DISAGGREGATED, SINGLE, SINGLE_AGAIN, Deployment, Topology, running

OUTPUT_TOKENS = 4
PROBE_SALT = 31_000


@dataclasses.dataclass(frozen=True)
class Pair:
    """The topologies of two releases: by kind, the lab's and the other's."""

    lab: dict[str, Topology]
    other: dict[str, Topology]


@pytest.fixture(scope="module")
def pair(
    live: Session, hosts: Hosts, lab: Lab, weights: Model, deployment: Deployment, single: Topology,
    disaggregated: Topology,
) -> Iterator[Pair]:  # fmt: skip
    """The lab's servers, and beside them those of the release of ``--against``."""
    if not live.against:
        pytest.skip("AGAINST: asked for with --against X.Y.Z, which names another vLLM release")
    other = Deployment(hosts, with_release(lab, live.against), weights, tag=f"@{live.against}")
    with contextlib.ExitStack() as ended:
        with live.uncaptured():
            ended.enter_context(running([other], lambda _: live.progress(f"servers of vLLM {live.against}")))
        for server in other.servers:
            live.store.commands[f"server {server.name} (vLLM {live.against})"] = server.plan.command
        yield Pair(
            {SINGLE: single, DISAGGREGATED: disaggregated},
            {kind: other.topology(kind) for kind in (SINGLE, DISAGGREGATED)},
        )


@pytest.fixture(scope="module")
def behaviours(pair: Pair, hosts: Hosts, lab: Lab) -> tuple[Behaviour, Behaviour]:
    """What the older and the newer release show of themselves, after a transfer on each."""
    found = []
    for topologies in (pair.lab, pair.other):
        topology = topologies[DISAGGREGATED]
        fields = release_diff.handshake(topology, openai.prompt_of(2 * lab.block_size + 1, PROBE_SALT))
        python = topology.servers[0].plan.argv[0]
        argv = [python, "-m", "vllm.entrypoints.cli.main", "serve", "--help=all"]
        lines = hosts.of(topology.servers[0].plan.node).run(
            f"help-{topology.version}", argv, {"COLUMNS": "200"}, release_diff.HELP_LIMIT_S
        )
        found.append(
            Behaviour(
                topology.version,
                release_diff.metric_families(topology.servers),
                release_diff.options_of("\n".join(lines)),
                fields,
            )
        )
    found.sort(key=lambda one: tuple(map(int, one.version.split("."))))
    return found[0], found[1]


def test_both_releases_say_who_they_are(pair: Pair, live: Session, lab: Lab) -> None:
    """The servers answer /version with the releases that were asked for; each runs from its own Python."""
    for topologies, version in ((pair.lab, lab.vllm.version), (pair.other, live.against)):
        for server in topologies[DISAGGREGATED].servers:
            release.require_served(server.name, server.url, version)
    pythons = {topologies[SINGLE].servers[0].plan.argv[0] for topologies in (pair.lab, pair.other)}
    assert len(pythons) == 2, f"both releases run from {pythons}"


def test_differences_of_behaviour(behaviours: tuple[Behaviour, Behaviour], record: Recorder) -> None:
    """Metric families, options of ``vllm serve`` and handshake fields that appeared or vanished.

    What the ledger counts has to be there in both: a renamed metric is an error that names its likely
    successor.
    """
    older, newer = behaviours
    for one in behaviours:
        assert one.options, f"vllm serve --help=all of {one.version} names no option"
        release_diff.require_metrics(one, ledger.METRICS)
    for change in release_diff.compare(older, newer):
        for how, names in (
            ("appeared", change.appeared),
            ("vanished", change.vanished),
            ("changed type", change.altered),
        ):
            if change.what == release_diff.OPTIONS and how == "changed type":
                continue  # a help text tells no types
            record.numbers(
                f"{change.what} that {how} from {older.version} to {newer.version}",
                [len(names)],
                "names",
                what="count",
                note=", ".join(names) or "none",
            )


@pytest.mark.parametrize("tokens_over", [0, 1, -1], ids=["whole blocks", "one more", "one less"])
def test_block_rule_of_both_releases(
    pair: Pair, lab: Lab, shape: KvShape, record: Recorder, tokens_over: int
) -> None:
    """A prompt at the edge of a block moves the same bytes in both releases, and exactly as computed."""
    length = 3 * lab.block_size + tokens_over
    moved = {}
    for topologies in (pair.lab, pair.other):
        topology = topologies[DISAGGREGATED]
        request = openai.body(
            topology.served_name, openai.prompt_of(length, PROBE_SALT + 10 + tokens_over), OUTPUT_TOKENS
        )
        before = ledger.read(topology)
        openai.complete(topology.router.url, request | {"cache_salt": f"rule-{tokens_over}"})
        after = ledger.settle(topology, before, 1)
        sent = [Sent(length, OUTPUT_TOKENS)]
        book = ledger.prove(topology, before, after, sent, shape, topology.version)
        moved[topology.version] = book.kv_bytes
        record.numbers(
            f"KV bytes, {length} prompt tokens", [book.kv_bytes], "B", arm=topology.name, what="transfer"
        )
    expected = {version: layout(shape, lab.block_size).bytes_to_move(length, version) for version in moved}
    assert moved == expected


@pytest.mark.lab_has("gates")
def test_figures_of_both_releases(
    pair: Pair, live: Session, lab: Lab, engine: LoadEngine, shape: KvShape, store: Store, record: Recorder
) -> None:
    """Single and disaggregated of both releases in interleaved rounds: one verdict a figure.

    Candidate is the lab's release. No enforced gate may find it worse, after Holm over all of them.
    """
    arms = [pair.lab[SINGLE], pair.other[SINGLE], pair.lab[DISAGGREGATED], pair.other[DISAGGREGATED]]
    arms.append(dataclasses.replace(pair.lab[SINGLE], name=SINGLE_AGAIN))
    workloads = lab.gated_workloads
    line = live.progress(f"vLLM {lab.vllm.version} and {live.against}")
    with live.uncaptured():
        found: Comparison = run_rounds(
            engine, arms, workloads, live.rounds, store, shape, line.show, slo=lab.slo
        )
    assert not found.invalid(), found.invalid()[0].invalid
    for figure in figure_rows(found):
        command = found.valid(figure.workload, figure.arm)[0].command
        name = f"{figure.metric}, {figure.workload}"
        record.numbers(name, figure.values, figure.unit, arm=figure.arm, command=command)
        if live.comparison is None or Arm.parse(figure.arm).tag:  # else the session has these figures already
            store.add(figure)
    rows = version_rows(found, lab, live.against)
    for row in rows:
        store.add(row)
    worse = [row for row in rows if row.gate.fails]
    assert not worse, "\n".join(
        f"{row.candidate} {row.workload} {row.metric}: {row.effect:+.1%} [{row.low:+.1%}, {row.high:+.1%}]"
        for row in worse
    )

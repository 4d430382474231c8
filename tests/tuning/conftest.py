"""Fixtures of the tuning lesson: servers that take turns, the search, its winners, and their campaign."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from disagglab.config import drawing, way
from disagglab.config.arms import DISAGGREGATED, KINDS, OWN, REPLICATED, Arms
from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab, SloSection
from disagglab.config.search_checks import asked, workload_of
from disagglab.config.search_space import TuningSection
from disagglab.config.workload import Workload
from disagglab.experiments import campaign as campaigns
from disagglab.experiments.campaign import Campaign, Speeds
from disagglab.experiments.comparison import figure_rows
from disagglab.experiments.halving import search
from disagglab.experiments.searching import measurer
from disagglab.experiments.turns import Contender, Load
from disagglab.experiments.verdicts import verdict_rows
from disagglab.hosts.hosts import Hosts
from disagglab.hosts.weights import Model
from disagglab.kv.shape import KvShape
from disagglab.measure.bench import LoadEngine
from disagglab.predict.frontier_forecast import FrontierForecast
from disagglab.predict.simulation import Served
from disagglab.pytest_plugin.session import Session
from disagglab.results import frontier, frontier_file, search_record, search_words, speed, tuned_lab
from disagglab.results.frontier import Frontier
from disagglab.results.price import Price
from disagglab.results.promise import Promise
from disagglab.results.run_folder import Store
from disagglab.results.search_record import Search
from disagglab.results.seconds import Phase, spends
from disagglab.serving.boot import USUAL_START_S
from disagglab.serving.fleet import Fleet

SHORT_SETTINGS, SHORT_RATES, SHORT_ROUNDS = 2, (0.7,), 1
FORECAST = "frontier-forecast.json"


@pytest.fixture(scope="session")
def tuning(live: Session, lab: Lab, request: pytest.FixtureRequest) -> TuningSection:
    """What is searched; with ``--short`` the lab's own setting and one other, of the two kinds that the same
    servers play, at one rate in one round.
    """
    options = request.config
    settings = options.getoption("--settings") or (SHORT_SETTINGS if live.short else None)
    found = asked(lab, options.getoption("--tune-workload") or "", settings)
    if not live.short:
        rounds = options.getoption("--rounds")
        return found.model_copy(update={"rounds": rounds} if rounds else {})
    less = {"rates": SHORT_RATES, "rounds": SHORT_ROUNDS, "confirm": 1, "disaggregated": None}
    kinds = [kind for kind in found.kinds if kind in (REPLICATED, DISAGGREGATED)]
    return found.model_copy(update={**less, "kinds": kinds or found.kinds})


@pytest.fixture(scope="session")
def workload(lab: Lab, tuning: TuningSection) -> Workload:
    """On which settings are compared, and whose requests the frontier offers."""
    return workload_of(lab, tuning)


@pytest.fixture(scope="session")
def slo(lab: Lab) -> SloSection:
    """The lab's objective."""
    assert lab.slo is not None  # the check of [tuning] asks for it
    return lab.slo


@pytest.fixture(scope="session")
def fleet(live: Session, lab: Lab, tuning: TuningSection, hosts: Hosts, weights: Model) -> Iterator[Fleet]:
    """Servers of ways, which start when their turn comes; all are gone afterwards."""
    if live.deployments:
        pytest.skip("SERVERS-BESIDE: other servers of this session hold the nodes; run pytest -m tuning")
    found = Fleet(
        hosts,
        way.beside(lab, tuning.resident - 1),
        weights,
        tuning.resident,
        lambda what: live.progress(what, USUAL_START_S),
        live.deployments.append,
    )
    try:
        yield found
    finally:
        live.store.write_meta(starts=found.starts)
        with spends(Phase.ENDS):
            found.stop()


@pytest.fixture(scope="session")
def load(live: Session, fleet: Fleet, engine: LoadEngine, shape: KvShape, store: Store) -> Load:
    """Starts, warms up and measures."""
    return Load(fleet, engine, shape, store, live.progress("tuning").show)


@pytest.fixture(scope="session")
def known(live: Session, load: Load, lab: Lab, workload: Workload) -> Speeds:
    """Speeds of the lab's own servers, and the capacity of its replicas; what forecasts are made from."""
    with live.uncaptured():
        return campaigns.speeds(load, lab, workload, live.short)


@pytest.fixture(scope="session")
def searched(
    live: Session,
    load: Load,
    lab: Lab,
    tuning: TuningSection,
    workload: Workload,
    slo: SloSection,
    known: Speeds,
    store: Store,
) -> Search:
    """The whole search; skipped where ``--way`` brings the ways of an earlier one."""
    if live.ways:
        pytest.skip("TUNED: the ways of this session are given by --way")
    settings = drawing.draw(lab, tuning)
    with live.uncaptured():
        found = search(settings, measurer(load, workload), workload, slo, tuning.seed, tuning.confirm)
        line = live.progress("tuning")
        line.tell(search_words.lines(found))
    search_record.write(store.folder, found)
    tuned_lab.write(store.folder, lab, found, str(store.meta["command"]), datetime.datetime.now().date())
    return found


@dataclass(frozen=True)
class Entered:
    """The ways that are compared, and the lab with the gates that these can be judged by."""

    contenders: tuple[Contender, ...]
    lab: Lab


@pytest.fixture(scope="session")
def entered(
    live: Session, lab: Lab, tuning: TuningSection, store: Store, request: pytest.FixtureRequest
) -> Entered:
    """The winners of the search, or the ways of ``--way``; of a kind that has none of its own, the lab's own
    setting. With a twin of the replicas, started again, beside them.
    """
    if live.ways:
        judged, ways = lab, live.ways
        kinds = {one.kind for one in ways}
        own = [kind for kind in tuning.kinds if kind in OWN and kind not in kinds]
    else:
        found: Search = request.getfixturevalue("searched")
        judged = load_lab(str(store.folder / tuned_lab.FILE))
        ways = judged.ways
        kinds = {one.kind for one in ways}
        picked = [one.kind for one in found.outcomes if one.pick is not None]
        own = [kind for kind in picked if kind not in kinds]
    contenders = [*map(Contender.of, own), *map(Contender.of, ways)]
    contenders.sort(key=lambda one: KINDS.index(one.kind))
    if live.short:  # a sharded server is not tuned then, and is compared as it comes
        contenders += [Contender.of(one) for one in lab.ways if one.kind == way.SHARDED and not live.ways][:1]
    twins = [] if live.short else [one.twin for one in contenders if one.kind == REPLICATED][:1]
    arms = Arms(kept=tuple(one.arm for one in contenders))
    return Entered((*contenders, *twins), arms.judged(judged))


@dataclass(frozen=True)
class Foreseen:
    """What was expected before any of it was measured. ``served``: every request of every run."""

    forecast: FrontierForecast
    served: dict[tuple[str, float], tuple[Served, ...]]
    rated: tuple[Workload, ...]


@pytest.fixture(scope="session")
def foreseen(
    lab: Lab,
    tuning: TuningSection,
    workload: Workload,
    slo: SloSection,
    known: Speeds,
    weights: Model,
    entered: Entered,
    store: Store,
) -> Foreseen:
    """The frontier, forecast from the speeds of the lab's own servers; on disk before the first run."""
    rated = campaigns.offered(workload, tuning.rates, known.capacity_per_s)
    copy_bytes_per_s = float(store.meta["speed"]["before"][speed.COPY]) * 1e9
    sends = campaigns.reduces(lab, weights.config, copy_bytes_per_s)
    found, served = campaigns.forecast(lab, known, entered.contenders, rated, tuning.rounds, slo, sends)
    (store.folder / FORECAST).write_text(json.dumps(found.as_dict(), indent=1))
    return Foreseen(found, served, tuple(rated))


@pytest.fixture(scope="session")
def campaign(
    live: Session,
    load: Load,
    lab: Lab,
    tuning: TuningSection,
    slo: SloSection,
    entered: Entered,
    foreseen: Foreseen,
    store: Store,
) -> Campaign:
    """Every way at every offered rate and on the gates' workloads, in turns; verdicts go to the store."""
    gated = {} if live.short else {one.name: one for one in entered.lab.gated_workloads}
    with live.uncaptured():
        found = campaigns.conduct(
            load, entered.contenders, foreseen.rated, list(gated.values()), tuning.rounds, slo
        )
        live.progress("tuning").done(f"{len(found.rated)} + {len(found.gated.runs)} runs")
    if gated:
        for row in verdict_rows(found.gated, entered.lab):
            store.add(row)
        for figure in figure_rows(found.gated):
            store.add(figure)
    if found.died:
        raise found.died
    return found


@pytest.fixture(scope="session")
def measured(
    lab: Lab, slo: SloSection, entered: Entered, campaign: Campaign, store: Store, live: Session
) -> Frontier:
    """The frontier, in ``frontier.json``."""
    places = campaigns.footprints(lab, entered.contenders)
    origin = {"run": live.run_id, "lab": lab.name}
    found = frontier.collect(campaign.rated, places, Promise.of(slo), Price.of_section(lab.price), "", origin)
    frontier_file.write(found, store.folder)
    return found

"""Hit rates of routing strategies: predicted first, then measured from the engines' own counters.

Two equal servers, each with a cache that is too small for everything that is said and large enough for half
of it. The oracle is threefold, and in each arm all three have to agree (experiments/routing.py): growth of
``vllm:prefix_cache_hits_total``, the sum of ``usage.cached_tokens``, and a replay of the real token ids on a
model of each server's cache, request by request. The prediction knows less: it takes the questions, stand-ins
for the answers, the size of the caches and the rule of the strategy, and is on disk before the first request.
Requests go one at a time, so that nothing but the strategy decides and a replay is exact. What load adds is
seen in rounds of their own, with two requests under way.
"""

from __future__ import annotations

import dataclasses
import secrets
import statistics
from collections.abc import Mapping, Sequence

import pytest

from disagglab.config.traffic import Dialogue, dialogue, sketch
from disagglab.errors import InvalidRun
from disagglab.experiments import routing
from disagglab.experiments.rounds import mirrored
from disagglab.experiments.routing import Held, Size, run_arm
from disagglab.measure import ledger
from disagglab.predict.hitforecast import HitForecast, forecast, replay
from disagglab.predict.strategies import ONE_AT_A_TIME, STRATEGIES, Strategy
from disagglab.pytest_plugin.session import Session
from disagglab.results.gate import GateState, State
from disagglab.results.recorder import Recorder
from disagglab.results.records import VerdictRow
from disagglab.results.run_folder import Store
from disagglab.serving import openai
from disagglab.serving.topology import Deployment
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import judge

pytestmark = pytest.mark.lab_has("ipv4")

SEED = 7  # of the order of requests in the first round; each round has its own
OWN, SHARED, LOADED = "own system prompts", "one system prompt", "two at once"
AT_ONCE = 2  # requests under way, where load is to tell equals apart
RICH = Size(conversations=4, turns=4, output_tokens=16, blocks=0)  # all of it fits one full-size cache
UNLIMITED = 10_000  # blocks: more than is ever said
SMALL = Size(conversations=2, turns=2, output_tokens=4, blocks=0)  # for controls
LEFT_OUT = ("power_of_two",)  # of the short form: without load it is a draw, as random is
BASELINE, CANDIDATES = "round_robin", ("session_hash", "kv_aware")
GO_BY_LOAD = ("power_of_two", "cache_aware")  # candidates of the full form
CLAIMED_RATE = 0.70  # or more; the notebooks that this suite grew from expected 70 to 85 %
CLAIMED_REDUCTION = 0.30  # or more, of latency against a router that sees no cache; they expected 30 to 40 %
MARGIN = 0.05
NOWHERE = "tcp://127.0.0.1:1"  # nobody publishes there


@dataclasses.dataclass(frozen=True)
class Measured:
    """A strategy's forecast and its arms, one a round."""

    forecast: HitForecast
    arms: list[Held]


def said(size: Size, shared: bool, seed: int = SEED) -> Dialogue:
    """A dialogue of which no server has seen a block."""
    return dialogue(
        size.conversations,
        size.turns,
        shared_system=shared,
        nonce=f"Desk {secrets.token_hex(3)}",
        seed=seed,
        output_tokens=size.output_tokens,
    )


def predict(workers: Deployment, one: Dialogue, strategy: Strategy) -> HitForecast:
    """The hit rate of a dialogue that nobody has held yet."""
    server = workers.servers[0]
    requests = sketch(one, lambda messages: openai.tokenize_chat(server.url, workers.served_name, messages))
    return forecast(strategy, requests, len(workers.servers), *routing.cache_size(server.metrics()))


def routed(workers: Deployment, strategy: Strategy, one: Dialogue, concurrency: int = 1) -> Held:
    """One arm behind a router of its own."""
    with workers.routed(strategy) as topology:
        return run_arm(topology, one, strategy, concurrency=concurrency)


def measure(
    workers: Deployment, live: Session, size: Size, traffic: str, names: Sequence[str], concurrency: int = 1
) -> dict[str, Measured]:
    """Forecasts of all strategies, stored; then one arm of each."""
    keep = Recorder(live.store, "routing", "forecast")
    dialogues = {name: said(size, traffic == SHARED) for name in names}
    rules = ONE_AT_A_TIME if concurrency == 1 else STRATEGIES
    found = {}
    for name, one in dialogues.items():
        predicted = predict(workers, one, rules[name])
        limits = [predicted.low, predicted.rate, predicted.high]
        keep.numbers(f"hit rate, forecast, {traffic}", limits, "ratio", arm=name, what="limits and mean",
                     note=f"{rules[name].what}; {predicted.how}")  # fmt: skip
        found[name] = Measured(predicted, [])
    line = live.progress(f"strategies, {traffic}")
    with live.uncaptured():
        for name, one in dialogues.items():
            line.show(name)
            found[name].arms.append(routed(workers, STRATEGIES[name], one, concurrency))
        line.done(", ".join(f"{name} {each.arms[0].rate:.0%}" for name, each in found.items()))
    return found


@pytest.fixture(scope="module")
def pressure(workers: Deployment, live: Session, routing_size: Size, store: Store) -> dict[str, Measured]:
    """Every strategy, each site with a system prompt of its own: more is said than one cache holds."""
    names = [name for name in STRATEGIES if not (live.short and name in LEFT_OUT)]
    found = measure(workers, live, routing_size, OWN, names)
    live.store.write_meta(routing={name: each.arms[0].rate for name, each in found.items()})
    return found


@pytest.fixture(scope="module")
def shared(workers: Deployment, live: Session, routing_size: Size) -> dict[str, Measured]:
    """Every strategy, with one system prompt for all."""
    if live.short:
        pytest.skip("SHORT: one system prompt for all is measured in the full form")
    return measure(workers, live, routing_size, SHARED, list(STRATEGIES))


@pytest.fixture(scope="module")
def loaded(workers: Deployment, live: Session, routing_size: Size) -> dict[str, Measured]:
    """Round robin and what is held against it with two requests under way: one arm each, then more rounds.

    The same order of requests within a round, and the mirrored order of arms in every other one.
    """
    names = (BASELINE, *CANDIDATES, *(() if live.short else GO_BY_LOAD))
    found = measure(workers, live, routing_size, LOADED, names, AT_ONCE)
    with live.uncaptured():
        for number in range(1, 1 if live.short else live.rounds):
            for name in mirrored(names, number):
                one = said(routing_size, shared=False, seed=SEED + number)
                found[name].arms.append(routed(workers, STRATEGIES[name], one, AT_ONCE))
    return found


def show(record: Recorder, name: str, each: Measured, traffic: str) -> None:
    """Keep what an arm gave, next to what was predicted."""
    arm = each.arms[0]
    split = ", ".join(f"{server} {count}" for server, count in arm.requests.items())
    record.numbers(
        f"hit rate, measured, {traffic}",
        [arm.rate],
        "ratio",
        arm=name,
        what="arms",
        note=f"predicted {each.forecast.low:.3f} to {each.forecast.high:.3f};"
        f" {sum(arm.hits.values()):,} of {sum(arm.queries.values()):,} tokens; requests: {split}",
    )


def require_predicted(name: str, each: Measured) -> None:
    """The measured rate lies in the interval that was stored before."""
    arm, predicted = each.arms[0], each.forecast
    assert predicted.low <= arm.rate <= predicted.high, (
        f"{name}: hit rate {arm.rate:.3f}, predicted {predicted.low:.3f} to {predicted.high:.3f}"
        f" ({predicted.how}); requests by server: {dict(arm.requests)}"
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_hit_rate_is_as_predicted(pressure: Mapping[str, Measured], name: str, record: Recorder) -> None:
    """Under cache pressure each strategy's hit rate lies in the interval that was predicted before it ran.

    A router decides whether a prompt meets the server that computed its beginning. How much that is worth can
    be worked out beforehand, because a prefix cache is a plain machine: a queue of blocks, the least recently
    used one lost first.
    """
    if name not in pressure:
        pytest.skip("SHORT: measured in the full form; without load it draws a server, as random does")
    show(record, name, pressure[name], OWN)
    require_predicted(name, pressure[name])


@pytest.mark.parametrize("name", STRATEGIES)
def test_hit_rate_with_one_system_prompt(shared: Mapping[str, Measured], name: str, record: Recorder) -> None:
    """So it does with one system prompt for all: each server soon holds it, and any strategy finds that."""
    show(record, name, shared[name], SHARED)
    require_predicted(name, shared[name])


def test_a_session_stays_with_its_server(pressure: Mapping[str, Measured], record: Recorder) -> None:
    """Hashed by its session header, a conversation has all of its turns on one server; in turn, it moves.

    A hash keeps a conversation where its KV cache is and asks no server anything. It also sees no load: which
    conversations share a server is chance. It finds more than round robin, unless chance put all of them on
    one server (one dialogue in 32 with six conversations, in 512 with ten): then half of the cache is idle,
    and it finds less. Each dialogue has session ids of its own, so each is another draw.
    """
    sessions, turns = pressure["session_hash"].arms[0], pressure[BASELINE].arms[0]
    numbers = sorted({turn.conversation for turn in sessions.talk.turns})
    moved = [number for number in numbers if len(set(sessions.servers_of(number))) > 1]
    assert not moved, {number: sessions.servers_of(number) for number in moved}
    assert any(len(set(turns.servers_of(number))) > 1 for number in numbers), (
        "round robin kept every conversation on its server, so it shows nothing: shuffle the order otherwise"
    )
    homes = [sum(sessions.servers_of(n)[0] == server for n in numbers) for server in sessions.requests]
    record.numbers("conversations by server", homes, "conversations", arm="session_hash", what="servers")
    assert (sessions.rate > turns.rate) == (min(homes) > 0), (
        f"session hash found {sessions.rate:.3f}, round robin {turns.rate:.3f};"
        f" conversations by server: {homes}"
    )


def test_kv_aware_goes_by_events(pressure: Mapping[str, Measured], record: Recorder) -> None:
    """The router that claims to go by KV events looked up every prompt, and found blocks for later turns.

    The servers' counters cannot tell why a request came to them. These are the router's own, and prove no
    hit: only that it asked (a lookup a request) and was answered (some of them found something).
    """
    arm = pressure["kv_aware"].arms[0]
    requests = len(arm.talk.turns)
    record.numbers(
        "lookups that found blocks", [arm.lookups.get(routing.HIT, 0)], "lookups", arm="kv_aware",
        what="count", note=f"of {requests} requests; all lookups: {dict(arm.lookups)}",
    )  # fmt: skip
    assert sum(arm.lookups.values()) == requests, f"{requests} requests, lookups: {dict(arm.lookups)}"
    assert arm.lookups[routing.HIT] > 0


def test_load_is_what_spreads_conversations(
    pressure: Mapping[str, Measured], loaded: Mapping[str, Measured], record: Recorder
) -> None:
    """One request at a time, kv_aware leaves a server idle; with two under way it uses both.

    A cold prompt is worth the same everywhere, and only load tells equal servers apart. Where nothing is
    under way there is none: every conversation begins on the same server and stays with its history, so half
    of the cache is never used. With two under way the forecast draws among equals; the router need not. How
    much more it finds then depends on which answer came first, so both rates are kept and not compared.
    """
    alone, together = pressure["kv_aware"].arms[0], loaded["kv_aware"].arms[0]
    show(record, "kv_aware", loaded["kv_aware"], LOADED)
    record.numbers(
        "hit rate, one at a time and two at once", [alone.rate, together.rate], "ratio", arm="kv_aware",
        what="one at a time, two at once",
        note=f"requests: {dict(alone.requests)}, {dict(together.requests)}",
    )  # fmt: skip
    assert min(alone.requests.values()) == 0, f"one at a time, no server was idle: {dict(alone.requests)}"
    assert min(together.requests.values()) > 0, f"two at once, a server was idle: {dict(together.requests)}"


def test_a_router_that_hears_nothing_is_refused(workers: Deployment) -> None:
    """With a wrong port for the events, kv_aware answers every request and finds nothing: the arm is refused.

    The control of the test above. Nothing fails and nothing is logged: all answers are 200, every lookup is a
    miss. Only the proof's demand for a lookup that found something tells it from routing by KV cache.
    """
    strategy = STRATEGIES["kv_aware"]
    real = [source for one in workers.servers if (source := one.plan.event_source)]
    sources = [dataclasses.replace(source, events=NOWHERE) for source in real]
    one = said(SMALL, shared=False)
    with (
        workers.routed(strategy, sources) as topology,
        pytest.raises(InvalidRun, match=f"expected 1 or more of {len(one.order)}, got 0"),
    ):
        run_arm(topology, one, strategy)


def test_times_of_hits_and_misses(
    pressure: Mapping[str, Measured], workers: Deployment, record: Recorder
) -> None:
    """A turn that found its history has its first token earlier than one that did not, at equal turn.

    Over all strategies; medians. A turn is a hit if at least the whole blocks of its conversation's last
    prompt were found. An arm with a failed request is refused (``run_arm``), so no latency of it is here.
    """
    arms = [arm for each in pressure.values() for arm in each.arms]
    block = ledger.block_size(workers.servers[0].metrics())
    found = routing.times_by_hit(arms, block)
    for kind, rows in (("hit", found.hits), ("miss", found.misses)):
        for turn, times in rows.items():
            record.numbers(f"TTFT of a {kind}, turn {turn + 1}", times, "s", what="requests")
    both = sorted(set(found.hits) & set(found.misses))
    assert both, f"no turn with hits and misses: {found.hits.keys()} and {found.misses.keys()}"
    ratios = {
        turn + 1: statistics.median(found.hits[turn]) / statistics.median(found.misses[turn]) for turn in both
    }
    record.numbers("median TTFT, hit / miss, at equal turn", list(ratios.values()), "ratio", what="turns")
    assert max(ratios.values()) < 1, (
        "a hit is no earlier than a miss; median TTFT, hit / miss, by turn: "
        + ", ".join(f"{turn}: {ratio:.2f}" for turn, ratio in ratios.items())
        + "; what else ran on this machine?"
    )


def test_what_the_claims_are_worth(loaded: Mapping[str, Measured], live: Session, record: Recorder) -> None:
    """Verdicts on two claims: 70 % or more of prompt tokens found, latency 30 % or more below round robin.

    The notebooks that this suite grew from expected 70 to 85 % and 30 to 40 % of cache-aware routing, and
    showed both on a simulated router. Judged is the lower end of each: more than was claimed meets it, too.
    Rounds of round robin, session hash and KV-aware, in the full form also of the two policies that go by
    load, are measured in turns; the short form has one round, from which nothing can be concluded.
    """
    candidates = [name for name in loaded if name != BASELINE]
    for name in candidates:
        claimed = [(CLAIMED_RATE, arm.rate) for arm in loaded[name].arms]
        live.store.add(row(name, "hit rate", "ratio", "claimed, 70 %", claimed, "higher"))
        for metric in ("ttft", "e2e"):
            pairs = list(zip(medians(loaded[BASELINE], metric), medians(loaded[name], metric), strict=True))
            live.store.add(row(name, f"{metric}_p50", "s", BASELINE, pairs, "lower"))
            for arm, values in zip((BASELINE, name), zip(*pairs, strict=True), strict=True):
                record.numbers(f"{metric}_p50 of all turns", values, "s", arm=arm, what="arms")
    assert sum(row.workload == WORKLOAD for row in live.store.verdicts) == 3 * len(candidates)


WORKLOAD = "conversations under cache pressure, two at once"


def medians(each: Measured, metric: str) -> list[float]:
    """The median TTFT or E2E of each arm, s."""
    return [statistics.median(getattr(turn, f"{metric}_s") for turn in arm.talk.turns) for arm in each.arms]


def row(
    name: str,
    metric: str,
    unit: str,
    baseline: str,
    pairs: list[tuple[float, float]],
    better: Direction,
) -> VerdictRow:
    """A verdict, and whether its interval bears the claim out; never a gate.

    Of a hit rate it does if all of it lies at or above the baseline, which is the claimed rate; of a latency
    if all of it is a reduction by at least CLAIMED_REDUCTION.
    """
    verdict = judge(pairs, better, MARGIN)
    if better == "higher":
        said, met, missed = "", verdict.low >= 0, verdict.high < 0
    else:
        said = f"-{CLAIMED_REDUCTION:.0%}".replace("%", " %")
        met, missed = verdict.high <= -CLAIMED_REDUCTION, verdict.low > -CLAIMED_REDUCTION
    found = "met" if met else "not met" if missed else "open"
    state = GateState(State.CLAIM, about=said, answer=found)
    if verdict.rounds == 1:
        state = GateState(State.CLAIM, answer="no verdict from one round")
    means = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
    return VerdictRow.of(
        verdict,
        workload=WORKLOAD,
        metric=metric,
        unit=unit,
        candidate=name,
        baseline=baseline,
        candidate_value=means[1],
        baseline_value=means[0],
        gate=state,
    )


def without_limit(arm: Held, block: int, one_server: bool = False) -> int:
    """Tokens that the same ids would have found in caches that never run full.

    ``one_server``: all of them on one, which is the most that any placement can find; else each where it was.
    """
    turns = arm.talk.turns
    names = list(arm.requests)
    servers = [0 if one_server else names.index(str(turn.server)) for turn in turns]
    return sum(replay([routing.request_of(turn) for turn in turns], servers, UNLIMITED, block))


def test_strategy_matters_less_where_all_fits(
    pressure: Mapping[str, Measured], workers: Deployment, live: Session, record: Recorder
) -> None:
    """Cache pressure costs round robin hits; where all that is said fits one cache, it loses none.

    What a server does not hold, because another has served the last turn, it computes once, and then keeps
    unless something pushes it out. Under pressure the same detour costs the next conversation its blocks as
    well. Each arm's measured hits are held against a replay of its own token ids on the servers that took
    them, with room for everything: fewer under pressure, equal without. What round robin still lacks then of
    the most that can be found, a replay on one server, is the price of the detours alone.
    """
    if live.short:
        pytest.skip("SHORT: a cache that holds everything is measured in the full form")
    found = measure(workers, live, RICH, "all of it fits", (BASELINE, "session_hash"))
    for name, each in found.items():
        show(record, name, each, "all of it fits")
        require_predicted(name, each)
    block = ledger.block_size(workers.servers[0].metrics())
    pressed, free = pressure[BASELINE].arms[0], found[BASELINE].arms[0]
    hits = [sum(arm.hits.values()) for arm in (pressed, free)]
    kept = [without_limit(arm, block) for arm in (pressed, free)]
    most = [without_limit(arm, block, one_server=True) for arm in (pressed, free)]
    for what, limits in (("caches without limit", kept), ("the most that can be found", most)):
        record.numbers(
            f"hits of round robin, of {what}", [hit / limit for hit, limit in zip(hits, limits, strict=True)],
            "ratio", arm=BASELINE, what="with pressure, without",
        )  # fmt: skip
    assert hits[0] < kept[0], (
        f"under pressure {hits[0]:,} tokens found, without a limit {kept[0]:,}: none lost"
    )
    assert hits[1] == kept[1], f"all fits, and {hits[1]:,} tokens were found of {kept[1]:,} without a limit"

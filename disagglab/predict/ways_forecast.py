"""What each way to use a lab's nodes would make of a workload at several rates, from its lab file alone: what
``disagglab predict --workload`` prints. docs/explanation/ways.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from disagglab import text
from disagglab.config.schema import Lab
from disagglab.config.workload import Workload
from disagglab.errors import ConfigError, Problem
from disagglab.predict import breakeven, frontier_forecast, sharding, stepbudget, ways
from disagglab.predict.breakeven_map import Assumed
from disagglab.predict.frontier_forecast import FrontierForecast
from disagglab.predict.ways import Planned

SEEDS = tuple(range(5))
# Of one all-reduce beside its bytes; assumed, of the usual size between GPUs of one host. Over Ethernet it is
# more.
REDUCE_LATENCY_S = 10e-6


@dataclass(frozen=True)
class WaysForecast:
    """A forecast of every way, with what it assumes, one sentence each."""

    lab: str
    model: str
    forecast: FrontierForecast
    assumptions: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        return {
            "lab": self.lab,
            "model": self.model,
            "forecast": self.forecast.as_dict(),
            "assumptions": list(self.assumptions),
        }

    def lines(self) -> list[str]:
        """One table a rate, the way with the highest goodput marked, and then the assumptions."""
        said = self.forecast
        found = [
            f"{self.lab}, {self.model}, {said.workload}: good requests/s, TTFT within"
            f" {said.ttft_limit_s:g} s and TPOT within {said.tpot_limit_s * 1e3:g} ms;",
            f"means over {len(said.seeds)} draws of arrivals; *: the most",
        ]
        for rate in said.rates_per_s:
            rows = [["way", "good/s", "good", "tokens/s", "TTFT p50", "TPOT p50", "ITL p99"]]
            for one in said.points:
                if one.rate_per_s != rate:
                    continue
                mark = "*" if one.arm == said.winner(rate) else ""
                times = (one.ttft_p50_s, one.tpot_p50_s, one.itl_p99_s)
                rows.append(
                    [
                        one.arm,
                        f"{mark}{one.goodput_per_s:.3g}",
                        f"{one.attainment:.0%}",
                        f"{one.output_tokens_per_s:.4g}",
                        *("-" if each is None else f"{each * 1e3:.4g} ms" for each in times),
                    ]
                )
            found += ["", f"{rate:.4g} requests/s"]
            found += [f"  {line}" for line in text.table(rows, right=range(1, len(rows[0])))]
        return [*found, "", "assumptions:", *(f"- {line}" for line in self.assumptions)]


def predict(lab: Lab, known: Assumed, workload: Workload, loads: Sequence[float]) -> WaysForecast:
    """Every way of a lab: its own arms, its [[way]] sections, and one server over all nodes.

    Args:
        workload: as it is on the lab; a closed loop is taken as an open one of as many requests.
        loads: offered rates, as shares of what the lab's replicas can bear at the workload's lengths.

    Raises:
        ConfigError: if the lab has no [slo], or an option of a way makes no sense.
    """
    if lab.slo is None:
        wrong = "missing, and goodput counts requests that meet it"
        raise ConfigError([Problem(lab.where("slo"), "[slo]", wrong, "add ttft_s and tpot_s")])
    planned = [*ways.own(lab), *(ways.of_way(lab, one) for one in lab.ways)]
    if all(one.kind != "sharded" for one in planned):
        ranks = len(lab.nodes)
        budget = stepbudget.of_lab(lab, ranks=ranks)
        planned.append(
            Planned("sharded", "sharded", step_tokens=budget.tokens, max_seqs=budget.sequences, ranks=ranks)
        )
    planned, same = _told_apart(planned)
    most = breakeven.capacity_per_s(known.cluster, workload.prompt_tokens, workload.output_tokens)
    offered = [_open(workload, load * most) for load in loads]
    link = known.cluster.speeds.link_bytes_per_s
    reduces = sharding.all_reduces(known.config, lab.model.dtype, link, REDUCE_LATENCY_S)
    found = frontier_forecast.forecast(known.cluster, planned, offered, lab.slo, SEEDS, reduces)
    assumptions = (
        *known.assumptions,
        f"rates are shares of the {most:.4g} requests/s that the replicas can bear; {workload.total_requests}"
        " requests a run, from idle servers to the last answer",
        f"of the lab's own settings {known.budget.said}",
        "one server over all nodes divides weights and work by their number; its all-reduces cross the link"
        f" of KV transfers and take {REDUCE_LATENCY_S * 1e6:g} us each beside their bytes",
        "no prefix is shared, and no sequence waits for KV memory",
        *(f"{arm} is left out: to the model it is {like}" for arm, like in same.items()),
    )
    return WaysForecast(lab.name, known.model, found, assumptions)


def _told_apart(planned: Sequence[Planned]) -> tuple[list[Planned], dict[str, str]]:
    """The ways that the model does not take for an earlier one, and of the others for which."""
    kept: dict[Planned, Planned] = {}
    same: dict[str, str] = {}
    for one in planned:
        first = kept.setdefault(replace(one, arm=""), one)
        if first is not one:
            same[one.arm] = first.arm
    return list(kept.values()), same


def _open(workload: Workload, rate_per_s: float) -> Workload:
    given = workload.model_dump() | {"concurrency": None, "length": None, "rate_per_s": rate_per_s}
    return Workload.model_validate(given | {"requests": workload.run_requests, "shared_prefix_tokens": 0})

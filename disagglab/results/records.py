"""Plain records: what was counted, what a run measured, what was judged. No behaviour beyond reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from disagglab.agent.supervisor import Process
from disagglab.config.workload import Workload
from disagglab.errors import InvalidRun
from disagglab.results.gate import GateState, State
from disagglab.stats.metric import Direction
from disagglab.stats.verdict import NoiseFloor, Rule, Verdict, held_back


@dataclass(frozen=True)
class Snapshot:
    """All samples of one scrape. ``server``: whose; values are as exposed (seconds, bytes, counts)."""

    server: str
    url: str
    samples: tuple[tuple[str, frozenset[tuple[str, str]], float], ...]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples called ``name`` whose labels contain ``labels``.

        Raises:
            InvalidRun: if there is no such sample; the message names it and the address asked.
        """
        wanted = set(labels.items())
        found = [value for sample, have, value in self.samples if sample == name and wanted <= have]
        if not found:
            shown = name + (str(labels) if labels else "")
            raise InvalidRun(
                f"{self.server} exposes no metric {shown}; look: curl -s {self.url} | grep {name}"
            )
        return sum(found)


@dataclass(frozen=True)
class Sent:
    """One request as the client saw it, tokens.

    ``held_by_decode`` and ``held_by_prefill``: how much of the prompt's beginning that server's prefix cache
    holds, in whole blocks; where prefill and decode are one server, ``held_by_decode``.
    """

    prompt_tokens: int
    output_tokens: int
    held_by_decode: int = 0
    held_by_prefill: int = 0


@dataclass(frozen=True)
class Reading:
    """The counters of a topology's servers at one moment, and who answered."""

    snapshots: Mapping[str, Snapshot]
    processes: Mapping[str, Process]


@dataclass(frozen=True)
class Ledger:
    """What the servers counted between two readings. Tokens, bytes, seconds; by server where it says so.

    ``external``, ``computed`` and ``cached`` are prompt tokens by source on the servers that decode: fetched
    from prefill, computed there, found in the prefix cache there. ``prefill_computed``: on prefill servers.
    ``kv_bytes_by``, ``transfers_by``: by the server that counts them, the one that moves the blocks.
    ``served_s``: end-to-end time of the requests by the servers, in all; disaggregated, prefill's part and
    decode's. None in files of earlier versions.
    """

    finished: Mapping[str, int]
    prompt_tokens: Mapping[str, int]
    generated: Mapping[str, int]
    kv_bytes: int
    transfers: int
    transfer_s: float
    failed: int
    expired: int
    external_tokens: int
    computed_tokens: int
    cached_tokens: int
    prefill_computed_tokens: int
    kv_bytes_by: Mapping[str, int] = field(default_factory=dict)
    transfers_by: Mapping[str, int] = field(default_factory=dict)
    served_s: float | None = None


@dataclass(frozen=True)
class ClientLoad:
    """CPU time over wall time of the client, and how late its event loop woke up (99th percentile, most), s.

    Every token's time stamp can be late by that much.
    """

    cpu_share: float
    lag_p99_s: float
    lag_max_s: float


@dataclass(frozen=True)
class Run:
    """One run of a workload on a topology. Per-request lists in the order of sending; seconds, tokens.

    ``start_s``: when each request was sent, from the first of them. ``streams``: which part of the workload
    it belongs to. ``client``: how busy the load engine was; None if it was not seen. ``readings``: the
    servers' counters before and after. ``took_s``: all of it with its proof, by the wall clock; None in files
    of earlier versions. ``energy_j``: what each node's GPUs took meanwhile, J by node; None where no driver
    says it, and in files of earlier versions.
    """

    topology: str
    workload: Workload
    seed: int
    round: int
    command: str
    duration_s: float
    client: ClientLoad | None
    ttft_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    itl_s: tuple[tuple[float, ...], ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    start_s: tuple[float, ...] = ()
    streams: tuple[str, ...] = ()
    ledger: Ledger | None = None
    readings: tuple[Reading, Reading] | None = None
    invalid: str | None = None
    took_s: float | None = None
    energy_j: Mapping[str, float] | None = None

    @property
    def sent(self) -> list[Sent]:
        """The requests, for the ledger."""
        return [Sent(p, o) for p, o in zip(self.prompt_tokens, self.output_tokens, strict=True)]


@dataclass(frozen=True)
class Record:
    """Numbers that a test measured: ``values`` are the replicates, all in ``unit``."""

    module: str
    test: str
    name: str
    unit: str
    values: tuple[float, ...]
    arm: str = ""
    what: str = "runs"
    command: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure for the report. ``series``: label → (x values, y values). ``style``: points, line or bars.

    ``ticks`` name the x positions 0, 1, … where these are no numbers.
    """

    module: str
    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    style: str = "line"
    caption: str = ""
    ticks: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerdictRow:
    """One verdict as the report shows it. ``gate``: what it means for the gate that asked for it.
    ``saturated``: runs of the two arms that fell behind their arrivals.

    ``noise_floor``: half width of the interval between two identical arms, ratio - 1; ``floor_note``: see
    :class:`disagglab.stats.verdict.NoiseFloor`. ``p``, ``p_adjusted``: of the gate's hypothesis, alone and
    after Holm over ``family`` verdicts; None for a pair that no gate asks for, and ``p`` and ``family`` in
    files of earlier versions.

    ``rule``: what ``low``, ``high`` and p hold for, see :class:`disagglab.stats.verdict.Verdict`; files of
    earlier versions have no other than "fixed-n". ``fixed_low``, ``fixed_high``: the fixed-n interval,
    ratio - 1, whatever the rule; None in those files.
    """

    workload: str
    metric: str
    unit: str
    candidate: str
    baseline: str
    candidate_value: float
    baseline_value: float
    outcome: str
    effect: float
    low: float
    high: float
    rounds: int
    smallest_detectable: float | None
    gate: GateState
    reason: str
    noise_floor: float | None = None
    saturated: int = 0
    p_adjusted: float | None = None
    p_sign_flip: float | None = None
    floor_note: str = ""
    p: float | None = None
    family: int | None = None
    rule: Rule = "fixed-n"
    fixed_low: float | None = None
    fixed_high: float | None = None

    @property
    def standing(self) -> str:
        """What is said of the gate: its state, and what Holm's correction holds back."""
        said = self._held_back
        return f"{self.gate}; {said}" if said else str(self.gate)

    @property
    def open(self) -> bool:
        """Whether further rounds could still change what is said of the gate: it is not met, and that is for
        lack of rounds.
        """
        return self.gate.state is not State.MET and (self.outcome == "undecided" or bool(self._held_back))

    @property
    def _held_back(self) -> str:
        if self.p is None or self.p_adjusted is None or self.family is None:
            return ""
        answer = self.gate.want if self.gate.of_a_gate else self.outcome
        if (answer == "better" and self.outcome != "better") or answer in ("equivalent", "undecided"):
            return ""  # it is not the correction that decides
        noun = "gates" if self.gate.of_a_gate else "figures"
        return held_back(str(answer), self.p, self.p_adjusted, self.family, noun)

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        *,
        workload: str,
        metric: str,
        unit: str,
        candidate: str,
        baseline: str,
        candidate_value: float,
        baseline_value: float,
        gate: GateState,
        p: float | None = None,
        p_adjusted: float | None = None,
        family: int | None = None,
        floor: NoiseFloor | None = None,
        saturated: int = 0,
        reason: str | None = None,
    ) -> VerdictRow:
        """The row of a verdict. ``candidate_value``, ``baseline_value``: means of what was compared, in
        ``unit``; ``p``, ``reason``: the verdict's own if it is None.
        """
        return cls(
            workload=workload,
            metric=metric,
            unit=unit,
            candidate=candidate,
            baseline=baseline,
            candidate_value=candidate_value,
            baseline_value=baseline_value,
            outcome=verdict.outcome,
            effect=verdict.effect,
            low=verdict.low,
            high=verdict.high,
            rounds=verdict.rounds,
            smallest_detectable=verdict.smallest_detectable,
            gate=gate,
            reason=verdict.reason if reason is None else reason,
            noise_floor=floor.ratio if floor else None,
            saturated=saturated,
            p_adjusted=p_adjusted,
            p_sign_flip=verdict.p_sign_flip,
            floor_note=floor.note if floor else "",
            p=verdict.p if p is None else p,
            family=family,
            rule=verdict.rule,
            fixed_low=verdict.fixed_low,
            fixed_high=verdict.fixed_high,
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> VerdictRow:
        """A line of ``verdicts.jsonl``, of this version or an earlier one.

        Raises:
            TypeError: if a value is missing.
        """
        known = {one.name: raw[one.name] for one in fields(cls) if one.name in raw}
        if "gate" in known:
            known["gate"] = GateState.parse(str(known["gate"]))
        return cls(**known)

    def as_json(self) -> dict[str, Any]:
        """As a line of ``verdicts.jsonl``; the gate as its text."""
        return asdict(self) | {"gate": str(self.gate)}


@dataclass(frozen=True)
class FigureRow:
    """One run-level figure of one arm, a value a valid round; what trends over sessions are made of.

    ``definition``: of the workload as it was scaled; figures of two definitions are not compared.
    """

    workload: str
    arm: str
    metric: str
    unit: str
    better: Direction
    values: tuple[float, ...]
    definition: str = ""

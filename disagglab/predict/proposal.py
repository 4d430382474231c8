"""What a configurator proposes for a lab, as ways to measure, with what it forecasts of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disagglab import text
from disagglab.config import toml
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, Problem
from disagglab.predict.aiconfigurator import MS_PER_S, Candidate, Question, Worker
from disagglab.predict.armforecast import ArmFigures
from disagglab.predict.stepbudget import SEQUENCES, TOKENS

NAME = "aiconfigurator"  # of a way that starts its servers as the tool's own script does
STEP_NAME = f"{NAME}-step"  # of one whose chunk is the step that the tool's search computed with
RECORD = f"{NAME}.json"
LAB_FILE = f"{NAME}.toml"


@dataclass(frozen=True)
class Deployment:
    """Servers of one arm. ``prefill``: None where every server does both. ``context``: most tokens of
    prompts in a step.
    """

    arm: str
    prefill: Worker | None
    decode: Worker
    context: int

    def batch(self, concurrency: int) -> int:
        """Requests under way at once on each server that decodes."""
        return -(-concurrency // self.decode.count)

    def busy(self, concurrency: int) -> int:
        """Servers that decode at all: with fewer requests than servers some have none."""
        return min(self.decode.count, concurrency)


@dataclass(frozen=True)
class Proposal:
    """A way, the load that the tool chose for it, and what it forecasts there.

    ``table``: the ``[[way]]`` of a lab file. ``concurrency``: requests under way at once in all.
    """

    deployment: Deployment
    table: Mapping[str, Any]
    concurrency: int
    figures: ArmFigures

    @property
    def arm(self) -> str:
        """What reports call it."""
        return self.deployment.arm


@dataclass(frozen=True)
class Answer:
    """All that was asked and answered. ``forecasts``: by arm, at ``asked.concurrency``. ``notes``: a sentence
    each. ``tool``, ``vllm``: whose release, and the release of vLLM that its times are of.
    """

    asked: Question
    tool: str
    vllm: str
    proposals: tuple[Proposal, ...]
    forecasts: Mapping[str, ArmFigures]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; what :func:`read_record` reads again."""
        return {
            "asked": asdict(self.asked),
            "tool": self.tool,
            "vllm": self.vllm,
            "proposals": [
                {
                    "arm": one.arm,
                    "way": one.table,
                    "concurrency": one.concurrency,
                    **asdict(one.figures),
                    "output_tokens_per_s_per_gpu": one.figures.output_tokens_per_s / self.asked.all_gpus,
                }
                for one in self.proposals
            ],
            "forecasts": {arm: asdict(figures) for arm, figures in self.forecasts.items()},
            "notes": list(self.notes),
        }

    def lab_file(self, extends: str) -> str:
        """A lab file with the proposals as its only ways, for ``pytest --lab FILE --way NAME``."""
        head = (
            f"# What {NAME} {self.tool} proposes for {self.asked.lab} and the workload {self.asked.workload},"
            f" by times of vLLM {self.vllm} on {self.asked.system}.\n"
        )
        table = {
            "name": f"{self.asked.lab}-{NAME}",
            "label": f"{self.asked.lab}, ways that {NAME} proposes for {self.asked.workload}",
            "extends": extends,
            "way": [dict(one.table) for one in self.proposals],
        }
        return head + toml.dumps(table)

    def lines(self) -> list[str]:
        """Both tables, and the notes."""
        asked = self.asked
        found = [
            f"{asked.lab}, {asked.workload}: {asked.prompt_tokens:,} tokens in, {asked.output_tokens:,} out;"
            f" TTFT {asked.ttft_s:g} s, TPOT {MS_PER_S * asked.tpot_s:g} ms at most",
            f"{NAME} {self.tool}, times of vLLM {self.vllm} on {asked.system}",
            "",
            "what it proposes, each at the load that it chose",
        ]
        rows = [["arm", "at once", *_HEAD, "options"]]
        for one in self.proposals:
            rows.append([one.arm, str(one.concurrency), *self._cells(one.figures), _options(one.table)])
        found += [f"  {line}" for line in text.table(rows, right=range(1, 6))]
        if self.forecasts:
            found += [
                "",
                f"what it forecasts with {asked.concurrency} requests at once, as {asked.workload} has",
            ]
            rows = [["arm", *_HEAD]]
            rows += [[arm, *self._cells(figures)] for arm, figures in self.forecasts.items()]
            found += [f"  {line}" for line in text.table(rows, right=range(1, 5))]
        return [*found, "", "notes:", *(f"- {note}" for note in self.notes)]

    def _cells(self, figures: ArmFigures) -> list[str]:
        return [
            f"{figures.output_tokens_per_s:,.0f}",
            f"{figures.output_tokens_per_s / self.asked.all_gpus:,.0f}",
            f"{figures.ttft_s:.3f}",
            f"{MS_PER_S * figures.tpot_s:.2f}",
        ]


_HEAD = ("tokens/s", "per GPU", "TTFT s", "TPOT ms")


def read_record(record: Mapping[str, Any], file: str) -> tuple[dict[str, ArmFigures], dict[str, str]]:
    """The forecasts of a record that :meth:`Answer.as_dict` made, by arm; and the workload and definition
    that they are of, by these keys.

    Raises:
        ConfigError: if it is another kind of record, or holds no forecast, as of an open loop.
    """
    try:
        forecasts = {str(arm): ArmFigures(**fields) for arm, fields in record["forecasts"].items()}
        asked = {key: str(record["asked"][key]) for key in ("workload", "definition")}
    except (AttributeError, KeyError, TypeError) as error:
        wrong = f"no record of propose: {type(error).__name__}: {error}"
        raise ConfigError(
            [Problem(file, "forecasts", wrong, "disagglab propose --out writes one")]
        ) from error
    if not forecasts:
        mend = "ask for a workload with concurrency"
        raise ConfigError([Problem(file, "forecasts", "none, as of an open loop", mend)])
    return forecasts, asked


def own(asked: Question) -> list[Deployment]:
    """The lab's own settings, and one server over all of its GPUs, so that they are forecast beside."""

    def equal(arm: str, count: int, ranks: int) -> Deployment:
        return Deployment(arm, None, Worker(count, ranks, {}), asked.step_tokens)

    return [
        equal("single", 1, asked.gpus),
        equal("replicated", asked.nodes, asked.gpus),
        Deployment(
            "disaggregated",
            Worker(asked.prefill_nodes, asked.gpus, {}),
            Worker(asked.decode_nodes, asked.gpus, {}),
            asked.step_tokens,
        ),
        equal("sharded", 1, asked.all_gpus),
    ]


def proposals(
    lab: Lab, asked: Question, found: Iterable[Candidate], tool: str
) -> tuple[tuple[Proposal, ...], tuple[str, ...]]:
    """The candidates as ways of the lab, and in words those that are no way of it.

    The tool's start script allows larger steps than its search computed with. So a way that serves in one
    piece comes twice: as its script starts it, and with the chunk that its forecast is of.
    """
    ways: list[Proposal] = []
    left_out = []
    for one in found:
        kind = _kind(asked, one)
        if kind is None:
            left_out.append(f"no way of {asked.lab}, so left out: {_shape(one)}")
            continue
        ways.append(_proposal(lab, asked, one, kind, NAME, tool))
        if one.step_tokens is not None and one.step_tokens != one.decode.args.get(TOKENS):
            ways.append(_proposal(lab, asked, one, kind, STEP_NAME, tool))
    return tuple(ways), tuple(left_out)


def notes(lab: Lab, asked: Question, found: Sequence[Candidate]) -> list[str]:
    """What its figures are not, one sentence each."""
    first = found[0]
    said = [
        "means at a steady load: no percentile, so nothing on p99 ITL",
        "KV transfer has no term of its own; TTFT disaggregated is that of a prefill alone x 1.8",
        "tokens/s are its requests/s x output tokens; per GPU counts all GPUs of the lab, idle ones too",
    ]
    if first.vllm != lab.vllm.version:
        said.append(f"its times are of vLLM {first.vllm}, the lab's servers are {lab.vllm.version}")
    if (first.dtype, first.kv_dtype) != (lab.model.dtype, lab.kv_dtype):
        said.append(
            f"it computes with {first.dtype} and KV in {first.kv_dtype}, the lab with {lab.model.dtype} and"
            f" {lab.kv_dtype}"
        )
    if len({node.host for node in lab.nodes}) > 1:
        said.append("it takes the GPUs for those of one host; the lab's are on several")
    if asked.concurrency is None:
        said.append(f"{asked.workload} is an open loop, which it has no notion of: no forecast at its rate")
    return said


def _kind(asked: Question, one: Candidate) -> str | None:
    """Which kind of way it is; None where its servers do not lie on whole nodes."""
    if one.prefill is not None:
        whole = one.prefill.ranks == one.decode.ranks == asked.gpus
        fits = one.prefill.count + one.decode.count <= asked.nodes
        return "disaggregated" if whole and fits else None
    if (one.decode.count, one.decode.ranks) == (1, asked.all_gpus) and asked.nodes > 1:
        return "sharded"
    return "replicated" if (one.decode.count, one.decode.ranks) == (asked.nodes, asked.gpus) else None


def _proposal(lab: Lab, asked: Question, one: Candidate, kind: str, name: str, tool: str) -> Proposal:
    args = {key: value for key, value in one.decode.args.items() if key in (TOKENS, SEQUENCES)}
    of_search = name == STEP_NAME and one.step_tokens is not None
    if of_search:
        args[TOKENS] = int(one.step_tokens or 0)
    how = "with the step of its search" if of_search else "as its script starts it"
    figures = one.figures
    table: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "what": f"what {NAME} {tool} proposes for {asked.workload}, {how}",
        "expects": (
            f"with {one.concurrency} requests at once {figures.output_tokens_per_s:,.0f} output tokens/s,"
            f" TTFT {figures.ttft_s:.3f} s, TPOT {MS_PER_S * figures.tpot_s:.2f} ms: its forecast"
            f" for vLLM {one.vllm} on {asked.system}"
        ),
    }
    if one.prefill is None:
        table["args"] = args
    else:
        table["prefill"] = {"args": dict(one.prefill.args)}
        table["decode"] = {"args": args}
        if (one.prefill.count, one.decode.count) != (asked.prefill_nodes, asked.decode_nodes):
            names = [node.name for node in lab.nodes]
            end = one.prefill.count + one.decode.count
            table["prefill"]["nodes"] = names[: one.prefill.count]
            table["decode"]["nodes"] = names[one.prefill.count : end]
    context = one.context_tokens if of_search else None
    servers = Deployment(
        f"{kind}@{name}", one.prefill, one.decode, context or args.get(TOKENS, asked.step_tokens)
    )
    return Proposal(servers, table, one.concurrency, figures)


def _shape(one: Candidate) -> str:
    apart = "" if one.prefill is None else f"{one.prefill.count} x {one.prefill.ranks} GPU prefill and "
    return f"{apart}{one.decode.count} x {one.decode.ranks} GPU{'' if one.prefill is None else ' decode'}"


def _options(table: Mapping[str, Any]) -> str:
    parts = {"": table, "prefill ": table.get("prefill", {}), "decode ": table.get("decode", {})}
    return "; ".join(
        head + ", ".join(f"{key}={value}" for key, value in part["args"].items())
        for head, part in parts.items()
        if part.get("args")
    )

"""NVIDIA's aiconfigurator: what it is asked about a lab, and what it answers.

It lives in an environment of its own and is asked through its command line (Apache-2.0, read here as of
0.12.0). Its times come from kernels that were measured one by one on a GPU, put together to steps of a
server.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, Problem
from disagglab.predict import stepbudget
from disagglab.predict.armforecast import ArmFigures

READ_VERSION = "0.12.0"  # whose output was recorded for selftest/predict/test_aiconfigurator.py
BACKEND = "vllm"
MOST_CANDIDATES = 20  # more than the divisions of a few GPUs that it lists
MS_PER_S = 1000
NO_TIMES = ("float32",)  # dtypes that it has no times of
# Options of the start scripts that it writes which a way takes over. The others are the lab's own
# (--max-model-len is prompt + output + 1,500 there, too short for the lab's other workloads).
SCRIPT_OPTION = re.compile(r'--(max-num-seqs|max-num-batched-tokens|tensor-parallel-size)[ =]"?(\d+)"?')
ESTIMATE_ROW = re.compile(r"^\s*(TTFT|TPOT|seq/s|Backend):\s+(.+?)\s*$", re.MULTILINE)
# What it says when it refuses: its own log lines, then what Python says of an error.
REFUSAL = re.compile(r"\[E\] \[[^\]]+\]\s*(.*)|^(?:\w+Error|Error): (.*)|: error: (.*)", re.MULTILINE)
LONGEST_REFUSAL = 300  # characters; a list of all that it supports follows some


@dataclass(frozen=True)
class Question:
    """What it is asked about a lab and one workload.

    ``definition``: of the workload as the lab scales it. ``gpus``: of each node. ``memory_share``:
    gpu-memory-utilization; None: vLLM's own. ``concurrency``: of a closed loop; None: requests arrive by
    themselves, which it has no notion of. ``step_tokens``: the lab's chunk budget.
    """

    lab: str
    workload: str
    definition: str
    system: str
    prefill_nodes: int
    decode_nodes: int
    gpus: int
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int
    concurrency: int | None
    step_tokens: int
    ttft_s: float
    tpot_s: float
    memory_share: float | None

    @property
    def nodes(self) -> int:
        """All nodes of the lab."""
        return self.prefill_nodes + self.decode_nodes

    @property
    def all_gpus(self) -> int:
        """GPUs of all nodes together."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Worker:
    """Equal servers: how many, over how many GPUs each, and the options that it starts them with."""

    count: int
    ranks: int
    args: Mapping[str, int]


@dataclass(frozen=True)
class Candidate:
    """One division of the GPUs that meets the objective, as its search lists it.

    ``prefill``: None where every server does both. ``concurrency``: requests under way at once in all, which
    it chose; ``figures`` are those at that load. ``step_tokens``: of a step in its search, prompts and decode
    together, and ``context_tokens`` of it those of prompts; None for disaggregated serving, where it says
    none. ``vllm``: the release its times are of.
    """

    prefill: Worker | None
    decode: Worker
    concurrency: int
    figures: ArmFigures
    step_tokens: int | None
    context_tokens: int | None
    dtype: str
    kv_dtype: str
    vllm: str


def question(lab: Lab, workload: str, system: str) -> Question:
    """What it is asked.

    Raises:
        ConfigError: with everything that it cannot answer about such a lab or workload.
    """
    problems = []
    gpus = sorted({len(node.gpus) for node in lab.nodes})
    if gpus[0] == 0:
        wrong = "none on some node, and aiconfigurator has times of NVIDIA GPUs only"
        mend = "name a lab whose nodes have gpus; disagglab predict computes any lab with [speed]"
        problems.append(Problem(lab.file, "node.gpus", wrong, mend))
    elif len(gpus) > 1:
        wrong = f"{gpus[0]} on one node and {gpus[-1]} on another; it divides equal nodes"
        problems.append(Problem(lab.file, "node.gpus", wrong, "name a lab whose nodes have as many each"))
    if lab.slo is None:
        wrong = "missing; it proposes what meets an objective"
        problems.append(Problem(lab.file, "slo", wrong, "add [slo] with ttft_s and tpot_s"))
    if lab.model.dtype in NO_TIMES:
        wrong = f"{lab.model.dtype}; it has times of 16 bits and fewer"
        problems.append(Problem(lab.file, "model.dtype", wrong, "name a lab in bfloat16"))
    load = lab.workload(workload)
    if load.steady is not None:
        wrong = "two lengths of prompt and output at once; it takes one"
        problems.append(Problem(workload, "steady", wrong, "name a workload without [steady]"))
    if problems or lab.slo is None:
        raise ConfigError(problems)
    share = lab.vllm.args.get("gpu-memory-utilization")
    return Question(
        lab=lab.name,
        workload=workload,
        definition=load.definition,
        system=system,
        prefill_nodes=len(lab.prefill),
        decode_nodes=len(lab.decode),
        gpus=gpus[0],
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        prefix_tokens=load.shared_prefix_tokens,
        concurrency=load.concurrency,
        step_tokens=stepbudget.of_lab(lab).tokens,
        ttft_s=lab.slo.ttft_s,
        tpot_s=lab.slo.tpot_s,
        memory_share=None if share is None else float(share),
    )


def search_options(asked: Question, model: str, folder: str) -> list[str]:
    """The arguments that make it search the divisions of the GPUs.

    Chunked prefill is on, as it is in every server of vLLM's V1 engine.

    Args:
        model: folder of the model's config.json. folder: where it writes.
    """
    limits = ["--ttft", f"{asked.ttft_s * MS_PER_S:g}", "--tpot", f"{asked.tpot_s * MS_PER_S:g}"]
    share = [] if asked.memory_share is None else ["--free-gpu-memory-fraction", f"{asked.memory_share:g}"]
    return [
        *("cli", "default", *_common(asked, model), "--total-gpus", str(asked.all_gpus)),
        *(*limits, "--strict-sla", "--enable-chunked-prefill", *share),
        *("--top-n", str(MOST_CANDIDATES), "--save-dir", folder),
    ]


def estimate_options(
    asked: Question, model: str, prefill: Worker | None, decode: Worker, batch: int, context: int
) -> list[str]:
    """The arguments that make it forecast one deployment: servers ``decode``, behind ``prefill`` if given.

    Args:
        batch: requests under way at once on one server of ``decode``.
        context: most tokens of prompts in a step of a server that does both; more than a prompt is not asked.
    """
    common = ["cli", "estimate", *_common(asked, model)]
    if prefill is None:
        ranks = ["--tp-size", str(decode.ranks)]
        most = str(min(asked.prompt_tokens, context))
        return [*common, "--batch-size", str(batch), *ranks, "--ctx-tokens", most]
    return [
        *(*common, "--estimate-mode", "disagg"),
        *("--prefill-num-workers", str(prefill.count), "--prefill-tp-size", str(prefill.ranks)),
        *("--prefill-batch-size", "1"),
        *("--decode-num-workers", str(decode.count), "--decode-tp-size", str(decode.ranks)),
        *("--decode-batch-size", str(batch)),
    ]


def _common(asked: Question, model: str) -> list[str]:
    return [
        *("--model-path", model, "--system", asked.system, "--backend", BACKEND, "--no-color"),
        *("--isl", str(asked.prompt_tokens), "--osl", str(asked.output_tokens)),
        *("--prefix", str(asked.prefix_tokens)),
    ]


def read_search(folder: Path, asked: Question) -> tuple[Candidate, ...]:
    """What a search wrote below the folder that it was given, those that serve in one piece first.

    Raises:
        ConfigError: if it wrote nothing, or something else than READ_VERSION writes.
    """
    found: list[Candidate] = []
    for table in sorted(folder.rglob("best_config_topn.csv")):
        scripts: list[str] = []
        while (script := table.parent / f"top{len(scripts) + 1}" / "run_0.sh").is_file():
            scripts.append(script.read_text(encoding="utf-8"))
        found += candidates(table.read_text(encoding="utf-8"), scripts, asked, str(table))
    if not found:
        raise _unread(str(folder), "no best_config_topn.csv with a row in it")
    return tuple(found)


def candidates(table: str, scripts: Sequence[str], asked: Question, file: str) -> list[Candidate]:
    """The rows of one ``best_config_topn.csv``, each with the start script of its place.

    A row is of the smallest unit; as many of them run as the GPUs hold. Tokens/s are requests/s x output
    tokens, because its own column counts one token less a request where servers do both.

    Raises:
        ConfigError: if a column or a script is missing, or a script is of another division than its row.
    """
    rows = list(csv.DictReader(io.StringIO(table)))
    if len(scripts) < len(rows):
        raise _unread(file, f"{len(rows)} rows and {len(scripts)} start scripts")
    try:
        return [_candidate(row, script, asked) for row, script in zip(rows, scripts, strict=False)]
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise _unread(file, f"{type(error).__name__}: {error}") from error


def _candidate(row: Mapping[str, str], script: str, asked: Question) -> Candidate:
    units = asked.all_gpus // int(row["num_total_gpus"])
    apart = "(p)workers" in row
    starts = _starts(script)
    if len(starts) != 1 + apart:
        raise ValueError(f"{len(starts)} kinds of servers in the start script, {1 + apart} in the table")
    prefixes = ("(p)", "(d)") if apart else ("",)
    workers = []
    for prefix, start in zip(prefixes, starts, strict=True):
        ranks = int(row[f"{prefix}tp"]) * int(row[f"{prefix}pp"]) * int(row[f"{prefix}dp"])
        if ranks != start.pop("tensor-parallel-size", 1):
            raise ValueError(f"{ranks} GPUs a server in the table, other ranks in the start script")
        workers.append(Worker(units * int(row[f"{prefix}workers"] if apart else 1), ranks, start))
    figures = ArmFigures(
        output_tokens_per_s=units * float(row["request_rate"]) * asked.output_tokens,
        ttft_s=float(row["ttft"]) / MS_PER_S,
        tpot_s=float(row["tpot"]) / MS_PER_S,
    )
    last = prefixes[-1]
    return Candidate(
        prefill=workers[0] if apart else None,
        decode=workers[-1],
        concurrency=units * int(row["concurrency"]),
        figures=figures,
        step_tokens=None if apart else round(float(row["num_tokens"])),
        context_tokens=None if apart else int(row["ctx_tokens"]),
        dtype=row[f"{last}gemm"],
        kv_dtype=row[f"{last}kvcache"],
        vllm=row[f"{last}version"],
    )


def _starts(script: str) -> list[dict[str, int]]:
    """The options of each command that starts servers, in the order of the script."""
    return [
        {name: int(value) for name, value in SCRIPT_OPTION.findall(part)}
        for part in script.split("python3 -m dynamo.vllm")[1:]
    ]


def read_estimate(text: str, asked: Question, servers: int) -> ArmFigures:
    """What ``cli estimate`` prints, for so many equal servers beside each other.

    Raises:
        ConfigError: if a row is missing or no number.
    """
    rows = dict(ESTIMATE_ROW.findall(text))
    try:
        return ArmFigures(
            output_tokens_per_s=servers * _number(rows["seq/s"]) * asked.output_tokens,
            ttft_s=_number(rows["TTFT"]) / MS_PER_S,
            tpot_s=_number(rows["TPOT"]) / MS_PER_S,
        )
    except (KeyError, ValueError) as error:
        raise _unread("estimate", f"{type(error).__name__}: {error}") from error


def _number(text: str) -> float:
    return float(text.removesuffix("ms").replace(",", ""))


def refusal(text: str, asked: Question) -> ConfigError:
    """What it said when it ended with an error, as one problem with what may mend it."""
    said = [" ".join(" ".join(groups).split()) for groups in REFUSAL.findall(text)]
    wrong = "; ".join(dict.fromkeys(said)) or "ended with an error and no word that is known here"
    if "not supported for system" in wrong or "No database found" in wrong:
        mend = "name a --system that it has times of, with vLLM; it has none of CPUs or of GB10"
    elif "architecture" in wrong:
        mend = "name a lab with a model that it knows"
    elif "TTFT/TPOT" in wrong:
        mend = "relax [slo], or shorten the prompts: no division meets it, says its model"
    else:
        mend = "run the same arguments by hand; --database-mode HYBRID fills gaps in its times"
    return ConfigError([Problem("aiconfigurator", f"--system {asked.system}", wrong[:LONGEST_REFUSAL], mend)])


def _unread(file: str, wrong: str) -> ConfigError:
    mend = f"install aiconfigurator=={READ_VERSION}, whose output is read here"
    return ConfigError([Problem(file, "(output of aiconfigurator)", wrong, mend)])

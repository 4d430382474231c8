"""Where two nodes answer sooner as prefill and decode than as replicas, predicted from a lab file alone: the
map that ``python -m disagglab predict`` prints, with what it assumes. docs/explanation/break-even.md explains
both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disagglab import text
from disagglab.config.schema import Lab, SpeedSection
from disagglab.errors import ConfigError, Problem
from disagglab.kv import attention, modelconfig
from disagglab.kv.attention import Config
from disagglab.kv.layout import layout
from disagglab.kv.shape import KvShape
from disagglab.predict import breakeven, roofline, stepbudget
from disagglab.predict.breakeven import Cluster, Outcome, Side, lengths
from disagglab.predict.roofline import Efficiency
from disagglab.predict.stepbudget import StepBudget

BITS = 8
LEAST_PROMPT, LEAST_OUTPUT, MOST_OUTPUT = 128, 16, 2048  # tokens; the corners of the map
LETTERS = {"prefill queue": "q", "transfer": "t", "decode batch": "b", "interference": "i"}
OVER = "over"  # in the place of a ratio: disaggregation falls behind, the replicas do not
NEITHER = "none"  # both fall behind


@dataclass(frozen=True)
class Prediction:
    """The map of one lab. ``outcomes``: by load, prompt and output, where the two do not exceed the model's
    length. ``most_sequences``: that a server takes in one batch. ``assumptions``: one sentence each.
    """

    lab: str
    model: str
    cluster: Cluster
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    outcomes: Mapping[float, Mapping[tuple[int, int], Outcome]]
    assumptions: tuple[str, ...]
    most_sequences: int

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON; what is infinite there is null."""
        cells = [
            {"load": load, **_cell_fields(found)}
            for load, cells in self.outcomes.items()
            for found in cells.values()
        ]
        return {
            "lab": self.lab,
            "model": self.model,
            "speeds": asdict(self.cluster.speeds),
            "prefill_nodes": self.cluster.prefill_nodes,
            "decode_nodes": self.cluster.decode_nodes,
            "step_tokens": self.cluster.step_tokens,
            "most_sequences": self.most_sequences,
            "cells": cells,
            "assumptions": list(self.assumptions),
        }

    def lines(self) -> list[str]:
        """One table a load, and then the assumptions."""
        nodes = f"{self.cluster.prefill_nodes} prefill + {self.cluster.decode_nodes} decode"
        found = [
            f"{self.lab}, {self.model}: mean time of a request, {nodes} / {self.cluster.replicas} replicas",
            "below 1 disaggregated serving answers sooner; the letter says what weighs most:",
            "i interference of prefills with decode, q queue for prefill, t transfer, b batch of the decode"
            " node;",
            f"{OVER}: disaggregated serving falls behind, the replicas do not; {NEITHER}: both do;",
            f"*: a batch beyond max-num-seqs ({self.most_sequences:,}); -: longer than the model takes",
        ]
        for load, cells in self.outcomes.items():
            rows = [["prompt \\ output", *(f"{output:,}" for output in self.outputs)]]
            for prompt in self.prompts:
                row = (_shown(cells.get((prompt, output)), self.most_sequences) for output in self.outputs)
                rows.append([f"{prompt:,}", *row])
            found += ["", f"load {load:g} of what the replicas can bear, lengths in tokens"]
            found += [f"  {line}" for line in text.table(rows, right=range(len(rows[0])))]
        return [*found, "", "assumptions:", *(f"- {line}" for line in self.assumptions)]


@dataclass(frozen=True)
class Assumed:
    """A lab as the models take it, from its file alone. ``model``: its name; ``config``: its config.json;
    ``assumptions``: what the speeds rest on, one sentence each.
    """

    model: str
    config: Config
    cluster: Cluster
    budget: StepBudget
    assumptions: tuple[str, ...]


def predict(lab: Lab, known: Assumed, loads: Sequence[float]) -> Prediction:
    """The map of a lab.

    Args:
        known: its speeds, from :func:`assumed`.
        loads: shares of what the replicas can bear, between 0 and 1.
    """
    cluster = known.cluster
    longest = lab.model.max_model_len
    prompts = lengths(LEAST_PROMPT, max(LEAST_PROMPT, longest // 2))
    outputs = lengths(LEAST_OUTPUT, max(LEAST_OUTPUT, min(MOST_OUTPUT, longest // 2)))
    outcomes = {
        load: {
            (prompt, output): breakeven.at_load(cluster, prompt, output, load)
            for prompt in prompts
            for output in outputs
            if prompt + output <= longest
        }
        for load in loads
    }
    return Prediction(
        lab.name,
        known.model,
        cluster,
        tuple(prompts),
        tuple(outputs),
        outcomes,
        (*known.assumptions, *_assumptions(known.budget, outcomes)),
        known.budget.sequences,
    )


def assumed(
    lab: Lab,
    *,
    efficiency: Efficiency,
    loads: Sequence[float] = (),
    model: str | None = None,
    link_bytes_per_s: float | None = None,
    peak_tflop_s: float | None = None,
    memory_gb_s: float | None = None,
) -> Assumed:
    """The speeds of a lab by a roofline, from its file and the model's config.

    Args:
        loads: shares of what the replicas can bear that will be asked for; they are checked.
        model: a folder, ``config.json`` or shipped name, in place of the lab's.
        link_bytes_per_s, peak_tflop_s, memory_gb_s: in place of what the lab file says.

    Raises:
        ConfigError: if a figure is missing or makes no sense, or the model is not one that is computed.
    """
    _require_shares(loads, efficiency)
    node = _node(lab, peak_tflop_s, memory_gb_s)
    link = _link(lab, link_bytes_per_s)
    shown, config = config_of(lab, model)
    shape = attention.shape(config, lab.kv_dtype, shown)
    counted = roofline.weights(config, shape, shown)
    budget = stepbudget.of_lab(lab)
    cluster = Cluster(
        roofline.speeds(counted, shape, lab.model.dtype, node, efficiency, link),
        layout(shape, lab.block_size),
        lab.vllm.version,
        budget.tokens,
        len(lab.prefill),
        len(lab.decode),
        budget.sequences,
    )
    rests_on = _speed_assumptions(lab, node, efficiency, link, shape, counted, cluster)
    return Assumed(shown, config, cluster, budget, tuple(rests_on))


def _require_shares(loads: Sequence[float], efficiency: Efficiency) -> None:
    for value in loads:
        if not 0 < value < 1:
            raise _refused("load", f"{value:g} is not between 0 and 1", "write a share such as 0.5")
    for name, value in asdict(efficiency).items():
        if not 0 < value <= 1:
            raise _refused(
                f"{name} efficiency", f"{value:g} is not above 0 and at most 1", "write a share such as 0.5"
            )


def _refused(key: str, wrong: str, mend: str, file: str = "command line") -> ConfigError:
    return ConfigError([Problem(file, key, wrong, mend)])


def _node(lab: Lab, peak_tflop_s: float | None, memory_gb_s: float | None) -> SpeedSection:
    for key, value in (("peak-tflop-s", peak_tflop_s), ("memory-gb-s", memory_gb_s)):
        if value is not None and not (0 < value < math.inf):
            raise _refused(key, f"{value:g} is not a positive number", "correct it")
    peak = peak_tflop_s or (lab.speed.peak_tflop_s if lab.speed else None)
    memory = memory_gb_s or (lab.speed.memory_gb_s if lab.speed else None)
    if peak is None or memory is None:
        mend = "add peak_tflop_s and memory_gb_s, or give --peak-tflop-s and --memory-gb-s"
        raise _refused("[speed]", "missing, so there are no speeds to predict from", mend, lab.where("speed"))
    return SpeedSection(peak_tflop_s=peak, memory_gb_s=memory)


def _link(lab: Lab, link_bytes_per_s: float | None) -> float:
    if link_bytes_per_s is None and lab.transport.link_gbit_s is None:
        wrong = "missing, so the time of a transfer is not known"
        raise _refused(
            "transport.link_gbit_s", wrong, "add it, or give --link 100Gbps", lab.where("transport")
        )
    return link_bytes_per_s or (lab.transport.link_gbit_s or 0.0) * 1e9 / BITS


def config_of(lab: Lab, model: str | None = None) -> tuple[str, dict[str, Any]]:
    """A name to show and the config of a lab's model, or of the ``model`` that is named in its place.

    Raises:
        ConfigError: if it is not at hand.
    """
    if model is not None:
        return modelconfig.find(model)
    if lab.model.id in modelconfig.shipped():
        return lab.model.id, modelconfig.shipped_config(lab.model.id)
    for folder in (Path(lab.model.id).expanduser(), Path(lab.file).parent / lab.model.id):
        if folder.is_dir():
            return lab.model.id, modelconfig.read(folder)
    mend = f"give --model with a model folder, a config.json or one of: {', '.join(modelconfig.shipped())}"
    raise _refused("model.id", f"no config.json of {lab.model.id} is at hand", mend, lab.where("model.id"))


def _speed_assumptions(
    lab: Lab,
    node: SpeedSection,
    efficiency: Efficiency,
    link_bytes_per_s: float,
    shape: KvShape,
    counted: roofline.Weights,
    cluster: Cluster,
) -> list[str]:
    """What the speeds rest on, with the figures."""
    speeds, step = cluster.speeds, cluster.speeds.step
    per_token = speeds.prefill.per_token_s * 1e3
    return [
        f"nothing was measured; a node has nominally {node.peak_tflop_s:g} TFLOP/s and"
        f" {node.memory_gb_s:g} GB/s",
        f"prefill reaches {efficiency.prefill:g} of the arithmetic: {per_token:.4g} ms a token of a short"
        f" prompt, and with one read of the weights {speeds.prefill.time_s(2048):.4g} s for 2,048 tokens",
        f"decode reaches {efficiency.decode:g} of the memory bandwidth: a step takes"
        f" {step.base_s * 1e3:.4g} ms for {counted.layers + counted.head:,} weights in {lab.model.dtype}, and"
        f" for each sequence {step.per_sequence_s * 1e3:.4g} ms and {step.per_context_token_s * 1e6:.4g} us a"
        f" token of context ({shape.bytes_per_token:,} B of KV cache)",
        f"the link carries {link_bytes_per_s * BITS / 1e9:g} Gbit/s, all of it, without latency; whole blocks"
        f" of {lab.block_size} tokens move, as vLLM {lab.vllm.version} does:"
        f" {cluster.transfer_s(2048) * 1e3:.4g} ms for 2,048 tokens",
        "router, HTTP and the hand-over of a request cost nothing",
    ]


def _assumptions(
    budget: StepBudget, outcomes: Mapping[float, Mapping[tuple[int, int], Outcome]]
) -> list[str]:
    """What the map rests on beside speeds, with the figures."""
    batches = [
        side.batch
        for cells in outcomes.values()
        for found in cells.values()
        for side in (found.replicated, found.disaggregated)
        if side.stable
    ]
    return [
        "requests arrive as a Poisson process, all with the same lengths, share no prefix, and are dealt in"
        " turn",
        "prompts go before decode, and those that wait are computed in one step, up to the chunk budget of"
        f" each server: {budget.said}",
        "a prompt longer than the budget takes as many steps as it fills by itself; between them sequences"
        " that decode get a token; means do not show that it makes the longest gap between tokens shorter",
        "no batch is limited by KV memory or by max-num-seqs; the largest here is"
        f" {max(batches, default=0):,.0f} sequences on a node",
        "times are means in equilibrium",
    ]


def _shown(found: Outcome | None, most_sequences: int) -> str:
    if found is None:
        return "-"
    ratio = found.ratio()
    if math.isnan(ratio):
        return NEITHER
    if math.isinf(ratio):
        return OVER
    mark = "*" if max(found.replicated.batch, found.disaggregated.batch) > most_sequences else ""
    return f"{ratio:.2f}{mark} {LETTERS[found.decided_by]}"


def _cell_fields(found: Outcome) -> dict[str, object]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def side(one: Side) -> dict[str, object]:
        times = {key: finite(value) for key, value in asdict(one).items() if key != "use"}
        return {**times, "use": dict(one.use)}

    return {
        **asdict(found.point),
        "ttft_ratio": finite(found.ratio("ttft_s")),
        "tpot_ratio": finite(found.ratio("tpot_s")),
        "e2e_ratio": finite(found.ratio()),
        "wins": found.wins,
        "decided_by": found.decided_by,
        "replicated": side(found.replicated),
        "disaggregated": side(found.disaggregated),
    }

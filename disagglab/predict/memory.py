"""What servers beside each other will take of the memory of a GPU or a host, before any of them starts.

Weights come from the model's config, KV caches from the lab file. A server that is given a share of its GPU
takes the whole share, whatever is in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from disagglab import text
from disagglab.config import way
from disagglab.config.schema import Lab, NodeSection
from disagglab.errors import ConfigError, Problem
from disagglab.kv import attention
from disagglab.kv.attention import Config
from disagglab.kv.shape import DTYPES
from disagglab.predict import roofline

GIB = 2**30
GPU_SHARE = 0.9  # what vLLM takes when nothing is said (CacheConfig.gpu_memory_utilization)
SHARE_KEY, BYTES_KEY = "gpu-memory-utilization", "kv-cache-memory-bytes"
CPU_KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # GiB
# CUDA context 0.5, activations of a chunk of 8,192 tokens 1 to 1.5, graphs 0.5 to 1 (vLLM used to warn of
# 1 to 3 there): an estimate for dense models of about 8B, not a measurement.
GPU_REST_GIB = 3.0
CPU_REST_GIB = 1.0  # two processes that have loaded PyTorch; an estimate
STEP_GIB = 0.5  # of the figures that mends name


@dataclass(frozen=True)
class Demand:
    """What one server takes of one GPU, or of its host. ``server``: its name, as its process has it.

    ``weights_gib`` and ``kv_gib``: None where they are not computed; then ``sum_gib`` is of what is.
    ``by``: the key of the lab file that decides it.
    """

    server: str
    weights_gib: float | None
    kv_gib: float | None
    rest_gib: float
    by: str

    @property
    def sum_gib(self) -> float:
        """All of it."""
        return (self.weights_gib or 0.0) + (self.kv_gib or 0.0) + self.rest_gib


def weights_gib(lab: Lab, config: Config) -> float | None:
    """The weights of the lab's model; None for one that is not a dense decoder."""
    try:
        shape = attention.shape(config, lab.kv_dtype, lab.model.id)
        counted = roofline.weights(config, shape, lab.model.id)
    except ConfigError:
        return None
    tied = bool(attention.text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings")))
    numbers = counted.layers + counted.head * (1 if tied else 2)
    return numbers * DTYPES[lab.model.dtype][0] / GIB


def of_gpu(lab: Lab, server: str, weights: float | None, total_gib: float) -> Demand:
    """What a server takes of each of its GPUs.

    Args:
        weights: of the whole model, GiB; several GPUs of one server share them.
        total_gib: the GPU's memory.
    """
    args = lab.vllm.args
    parts = way.ranks(lab) * int(args.get("pipeline-parallel-size", 1))
    own = None if weights is None else weights / parts
    if BYTES_KEY in args:
        kv = float(args[BYTES_KEY]) / GIB
        by = "memory.kv_beside_gib" if lab.memory.kv_beside_gib is not None else f"vllm.args.{BYTES_KEY}"
        return Demand(server, own, kv, GPU_REST_GIB, by)
    share_gib = float(args.get(SHARE_KEY, GPU_SHARE)) * total_gib
    by = f"vllm.args.{SHARE_KEY}"
    if own is None or own + GPU_REST_GIB > share_gib:
        return Demand(server, own, None, share_gib - (own or 0.0), by)
    return Demand(server, own, share_gib - own - GPU_REST_GIB, GPU_REST_GIB, by)


def of_host(lab: Lab, node: NodeSection, server: str, weights: float | None) -> Demand:
    """What a server takes of its host: the lab's floor, or without GPU what it holds if that is more."""
    if node.gpus:
        return Demand(server, None, None, lab.memory.floor_gib, "memory.floor_gib")
    said = node.env.get(CPU_KV_VARIABLE, lab.vllm.env.get(CPU_KV_VARIABLE))
    try:
        kv = float(said) if said is not None else None
    except ValueError:  # vLLM refuses it, and says so
        kv = None
    hosts = int(node.args.get(way.HOSTS_KEY, 1))  # of one server
    ranks = way.ranks(lab) // hosts  # each keeps a cache of that size
    weights = weights / hosts if weights is not None else None
    kv = kv * ranks if kv is not None else None
    rest = max(CPU_REST_GIB * ranks, lab.memory.floor_gib - (weights or 0.0) - (kv or 0.0))
    by = f"vllm.env.{CPU_KV_VARIABLE}" if rest == CPU_REST_GIB * ranks else "memory.floor_gib"
    return Demand(server, weights, kv, rest, by)


@dataclass(frozen=True)
class Room:
    """Memory that servers share. ``place``: as a message names it, such as ``GPU 0 of local``."""

    place: str
    total_gib: float
    free_gib: float


def too_much(lab: Lab, room: Room, demands: Sequence[Demand]) -> Iterator[Problem]:
    """That servers do not fit into what is free, with a row for each; nothing if they fit."""
    wanted = sum(demand.sum_gib for demand in demands)
    if wanted <= room.free_gib:
        return
    key = max(demands, key=lambda demand: demand.sum_gib).by
    count = f"{len(demands)} servers beside each other" if len(demands) > 1 else "a server"
    of_all = f" of {room.total_gib:.1f}" if room.total_gib > room.free_gib else ""
    has = f"{room.place} has {room.free_gib:.1f}{of_all} GiB free"
    head = f"{has}, {count} would take {wanted:.1f} GiB:"
    wrong = "\n".join([head, *(f"      {line}" for line in table(demands))])
    yield Problem(lab.where(key), key, wrong, _mend(key, demands, room))


def table(demands: Sequence[Demand]) -> list[str]:
    """A row a server, GiB."""
    rows = [["server", "weights", "KV", "graphs, rest", "sum, GiB"]]
    rows += [
        [
            one.server,
            *(f"{value:.1f}" if value is not None else "?" for value in (one.weights_gib, one.kv_gib)),
            f"{one.rest_gib:.1f}",
            f"{one.sum_gib:.1f}",
        ]
        for one in demands
    ]
    return text.table(rows, right=range(1, 5))


def _mend(key: str, demands: Sequence[Demand], room: Room) -> str:
    """Which key to set to what, so that all of them fit."""
    others = ", or start fewer beside each other (--way, --against)" if len(demands) > 1 else ""
    name = key.rpartition(".")[2]
    if name == "floor_gib":
        return f"see what else runs there: ps aux --sort -rss{others}"
    if name == SHARE_KEY:
        share = math.floor(100 * room.free_gib / room.total_gib / len(demands)) / 100
        return f"set {name} to {share:g} or less{others}"
    held = sum(demand.sum_gib - (demand.kv_gib or 0.0) for demand in demands)
    kv = math.floor((room.free_gib - held) / len(demands) / STEP_GIB) * STEP_GIB
    if kv <= 0:
        return f"take a smaller model or more memory: no KV cache fits beside the weights{others}"
    value = f"{round(kv * GIB)} ({kv:g} GiB)" if name == BYTES_KEY else f"{kv:g}"
    return f"set {name} to {value} or less{others}"

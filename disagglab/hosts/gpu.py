"""GPUs of a host, and whether network cards reach their memory by themselves.

Readers take a testinfra host and run one command each; what it printed is parsed by pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Attribute numbers of CUdevice_attribute in cuda.h: 18 INTEGRATED, 116 GPU_DIRECT_RDMA_SUPPORTED,
# 124 DMA_BUF_SUPPORTED. No context is made, so it takes no GPU memory.
GPUDIRECT_PROGRAM = """
import ctypes, json, os
found = {"modules": [m for m in ("nvidia", "nvidia_peermem") if os.path.isdir("/sys/module/" + m)]}
found.update(gpus=[], error="")
try:
    cuda, count, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    found["error"] = "CUDA error %d" % status if status else ""
    for gpu in range(count.value):
        row = {}
        for key, number in (("integrated", 18), ("rdma", 116), ("dma_buf", 124)):
            status = cuda.cuDeviceGetAttribute(ctypes.byref(value), number, gpu)
            row[key] = None if status else value.value
        found["gpus"].append(row)
except OSError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class GpuDirect:
    """Whether a network card can reach GPU memory by itself, and how that was found out."""

    state: Literal["present", "absent", "unknown"]
    how: str

    def __str__(self) -> str:
        return f"{self.state}: {self.how}"


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it. ``memory``: its own, or why it has no such number."""

    name: str
    memory: str
    driver: str
    unified: bool

    @property
    def facts(self) -> dict[str, str]:
        """What a report shows of it."""
        return {"name": self.name, "memory": self.memory, "driver": self.driver}


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Rows of ``nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader``.

    On unified memory nvidia-smi has no number; MemAvailable is asked instead, so ``memory`` says that.
    """
    found = []
    for line in text.splitlines():
        name, memory, driver = (cell.strip() for cell in line.rsplit(",", 2))
        unified = memory in ("[N/A]", "N/A", "[Not Supported]")
        found.append(Gpu(name, "unified, see MemAvailable" if unified else memory, driver, unified))
    return tuple(found)


def read_gpus(host: Any) -> tuple[Gpu, ...]:
    """Every GPU of the host; empty without nvidia-smi. One command."""
    query = host.run("nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader")
    return parse_gpus(query.stdout) if query.rc == 0 else ()


@dataclass(frozen=True)
class GpuMemory:
    """Memory of a GPU and what of it nobody holds now, GiB."""

    total_gib: float
    free_gib: float


def parse_memory(text: str) -> tuple[GpuMemory | None, ...]:
    """Rows of ``nvidia-smi --query-gpu=memory.total,memory.free --format=csv,noheader,nounits``, in MiB.

    None stands for a GPU without memory of its own: it takes the host's.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return tuple(
        GpuMemory(float(row[0]) / 1024, float(row[1]) / 1024) if all(map(str.isdigit, row)) else None
        for row in rows
    )


def read_memory(host: Any) -> tuple[GpuMemory | None, ...]:
    """The memory of every GPU of the host; empty without nvidia-smi. One command."""
    query = host.run("nvidia-smi --query-gpu=memory.total,memory.free --format=csv,noheader,nounits")
    return parse_memory(query.stdout) if query.rc == 0 else ()


def judge_gpudirect(found: Mapping[str, Any]) -> GpuDirect:
    """Whether network cards reach GPU memory, from what :data:`GPUDIRECT_PROGRAM` printed.

    The CUDA driver has the last word: a module can be loaded on a machine whose GPU cannot do it.
    """
    modules, gpus = set(found["modules"]), list(found["gpus"])
    if "nvidia" not in modules:
        return GpuDirect("absent", "no NVIDIA driver is loaded (/sys/module/nvidia)")
    if not gpus or any(gpu["rdma"] is None for gpu in gpus):
        return GpuDirect("unknown", f"the CUDA driver did not say ({found['error'] or 'no GPU listed'})")
    if not all(gpu["rdma"] for gpu in gpus):
        shared = (
            ", INTEGRATED 1: the GPU has no memory of its own" if any(g["integrated"] for g in gpus) else ""
        )
        return GpuDirect("absent", f"CUDA attribute GPU_DIRECT_RDMA_SUPPORTED is 0{shared}")
    ways = ["dma-buf (DMA_BUF_SUPPORTED is 1)"] if all(gpu["dma_buf"] for gpu in gpus) else []
    ways += ["the module nvidia_peermem"] if "nvidia_peermem" in modules else []
    if not ways:
        return GpuDirect("absent", "the GPU supports it, but neither dma-buf nor nvidia_peermem is there")
    return GpuDirect("present", f"GPU_DIRECT_RDMA_SUPPORTED is 1, by {' and '.join(ways)}")


def read_gpudirect(host: Any, python: str) -> GpuDirect:
    """Whether the host's network cards reach GPU memory. ``python``: any Python 3 there. One command."""
    answer = host.run("%s -c %s", python, GPUDIRECT_PROGRAM)
    if answer.rc != 0:
        return GpuDirect("unknown", f"{python} could not ask the CUDA driver: {answer.stderr.strip()[-200:]}")
    return judge_gpudirect(json.loads(answer.stdout))

"""What a host says of its GPUs: recorded text of real drivers, and the readers on any machine."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import testinfra

from disagglab.hosts import gpu


@pytest.mark.parametrize(
    ("found", "state", "how"),
    [
        # An H100 as the program saw it, without the module (CUDA driver 580.159.04).
        (
            {"modules": ["nvidia"], "gpus": [{"integrated": 0, "rdma": 1, "dma_buf": 1}], "error": ""},
            "present",
            "dma-buf",
        ),
        # GB10 as several owners published its attributes.
        (
            {"modules": ["nvidia"], "gpus": [{"integrated": 1, "rdma": 0, "dma_buf": 0}], "error": ""},
            "absent",
            "no memory of its own",
        ),
        # A module that is loaded changes nothing for a GPU that cannot.
        (
            {"modules": ["nvidia", "nvidia_peermem"], "gpus": [{"integrated": 1, "rdma": 0, "dma_buf": 1}]},
            "absent",
            "GPU_DIRECT_RDMA_SUPPORTED is 0",
        ),
        (
            {"modules": ["nvidia", "nvidia_peermem"], "gpus": [{"integrated": 0, "rdma": 1, "dma_buf": 0}]},
            "present",
            "nvidia_peermem",
        ),
        ({"modules": ["nvidia"], "gpus": [{"integrated": 0, "rdma": 1, "dma_buf": 0}]}, "absent", "neither"),
        ({"modules": [], "gpus": [], "error": "libcuda.so.1: cannot open"}, "absent", "no NVIDIA driver"),
        ({"modules": ["nvidia"], "gpus": [], "error": "CUDA error 999"}, "unknown", "CUDA error 999"),
        (
            {"modules": ["nvidia"], "gpus": [{"integrated": 0, "rdma": None}], "error": ""},
            "unknown",
            "did not",
        ),
    ],
)
def test_gpudirect_is_what_the_cuda_driver_says(found: dict[str, Any], state: str, how: str) -> None:
    """Present, absent or unknown, with how it was found out."""
    judged = gpu.judge_gpudirect({"error": "", **found})
    assert judged.state == state
    assert how in judged.how


def test_gpudirect_is_asked_by_the_nodes_python() -> None:
    """The program runs on a machine with or without a GPU and always has an answer."""
    judged = gpu.read_gpudirect(testinfra.get_host("local://"), sys.executable)
    assert judged.state in ("present", "absent", "unknown")
    assert judged.how
    missing = gpu.read_gpudirect(testinfra.get_host("local://"), "/no/such/python")
    assert missing.state == "unknown"


def test_a_gpu_on_unified_memory_has_no_memory_of_its_own() -> None:
    """First row as several owners of a DGX Spark published it, second as an H100 gave it."""
    text = "NVIDIA GB10, [N/A], 580.126.09\nNVIDIA H100 80GB HBM3, 81559 MiB, 580.159.04\n"
    assert gpu.parse_gpus(text) == (
        gpu.Gpu("NVIDIA GB10", "unified, see MemAvailable", "580.126.09", unified=True),
        gpu.Gpu("NVIDIA H100 80GB HBM3", "81559 MiB", "580.159.04", unified=False),
    )

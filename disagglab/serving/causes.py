"""What the log of a server that ended or does not come up means, and what mends it."""

from __future__ import annotations

import re

CHILD_ENDED = "disagg-lab: a process of this server ended: "  # what the plugin logs, then pid and status

# What a dead server's log means, most specific first.
CAUSES = (
    (
        re.compile(r"disagg-lab: ended by its supervisor: MemAvailable"),
        "the host ran short of memory, and the server was killed before the host stalled",
        "give it less: gpu-memory-utilization or max_model_len; or see what else runs there",
    ),
    (
        re.compile(r"out of memory|Cannot allocate memory|MemoryError|std::bad_alloc|Killed", re.I),
        "out of memory",
        "give it less: VLLM_CPU_KVCACHE_SPACE, gpu-memory-utilization or max_model_len in the lab file",
    ),
    (
        re.compile(r"Address already in use|EADDRINUSE|Errno 98"),
        "a port is taken",
        "see who listens: ss -tlnp",
    ),
    (
        re.compile(
            r"NIXL is not available|No module named 'nixl|NIXL_ERR_BACKEND|nixl.*not (found|installed)", re.I
        ),
        "NIXL is missing or cannot start",
        "python -c 'import nixl_cu13._api'; and look at UCX_TLS in [transport]",
    ),
    (
        re.compile(
            r"is not a valid (local folder|model identifier)|does not appear to have a file|Can't load"
        ),
        "the model is missing or incomplete",
        "check [model] id in the lab file",
    ),
    (
        re.compile(r"unrecognized arguments|error: argument"),
        "vllm serve does not know an option",
        "check [vllm.args] in the lab file: vllm serve --help=all",
    ),
    (
        re.compile(r"illegal instruction|SIGILL", re.I),
        "an instruction this CPU lacks",
        "unset ONEDNN_MAX_CPU_ISA",
    ),
)


def cause_of(log: str) -> tuple[str, str]:
    """Likely cause and mend, from the end of a log."""
    return next(
        ((cause, mend) for pattern, cause, mend in CAUSES if pattern.search(log)),
        ("not recognised", "read the log"),
    )

"""What the log of a server that ended or does not come up means, and what mends it."""

from __future__ import annotations

import re
from collections.abc import Sequence

GIVE_LESS = "give it less: VLLM_CPU_KVCACHE_SPACE, gpu-memory-utilization or max_model_len in the lab file"
CHILD_ENDED = "disagg-lab: a process of this server ended: "  # what the plugin logs, then pid and status

# Lines that a server wrote and lived on after: what vLLM, uvicorn, torch and NIXL log below ERROR (vLLM puts
# the level on every line of a traceback); and failed transfers, which the connector answers itself.
HANDLED = re.compile(
    r"^(\(\S+ pid=\d+\) )?(DEBUG|INFO|WARNING)\b"
    r"|^(\(\S+ pid=\d+\) )?ERROR \S+ \S+ \[(base|pull|push)_worker\.py:\d+\]"
    r"|^\[?[IW]\d{4} "
    r"|NIXL (DEBUG|INFO|WARN)"
)
# One request failed, or an object was cleaned up: the traceback up to the next record is not the server's.
ONE_REQUEST = re.compile(r"Exception in ASGI application|Exception ignored in")
RECORD = re.compile(r"^(\(\S+ pid=\d+\) |(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b|\[?[EFIW]\d{4} |disagg-lab: )")

# What a dead server's log means, most specific first; looked for in the lines that are not HANDLED.
CAUSES = (
    (
        re.compile(r"disagg-lab: ended by its supervisor: MemAvailable"),
        "the host ran short of memory, and the server was killed before the host stalled",
        "give it less: gpu-memory-utilization or max_model_len; or see what else runs there",
    ),
    (
        re.compile(
            r"out of memory|Cannot allocate memory|\bMemoryError\b|std::bad_alloc|^Killed$"
            r"|No available memory for the cache blocks|larger than the available KV cache memory"
            r"|less than desired GPU memory utilization|not enough GPU memory",
            re.I,
        ),
        "out of memory",
        GIVE_LESS,
    ),
    (
        re.compile(r"Address already in use|EADDRINUSE|Errno 98\b"),
        "a port is taken",
        "see who listens: ss -tlnp",
    ),
    (
        re.compile(
            r"NIXL is not available|No module named 'nixl(_cu\d+)?(\.\w+)?'|NIXL_ERR_BACKEND"
            r"|No NIXL CUDA backend found|nixl-cu\d+ is not installed"
        ),
        "NIXL is missing or cannot start",
        "python -c 'import nixl_cu13._api'; and look at UCX_TLS in [transport]",
    ),
    (
        re.compile(
            r"is not a valid (local folder|model identifier)|does not appear to have a file named"
            r"|Can't load (the|tokenizer)|Invalid repository ID or local directory|HFValidationError: Repo id"
            r"|Cannot find any model weights"
        ),
        "the model is missing or incomplete",
        "check [model] id in the lab file",
    ),
    (
        re.compile(r"error: unrecognized arguments|error: argument"),
        "vllm serve does not know an option",
        "check [vllm.args] in the lab file: vllm serve --help=all",
    ),
    (
        re.compile(r"illegal instruction|\bSIGILL\b", re.I),
        "an instruction this CPU lacks",
        "unset ONEDNN_MAX_CPU_ISA",
    ),
)


def last_words(lines: Sequence[str]) -> list[str]:
    """The lines of a log that may tell what ended its server: without those that it lived on after."""
    found, of_one_request = [], False
    for line in lines:
        if RECORD.search(line):
            of_one_request = False
        of_one_request = of_one_request or ONE_REQUEST.search(line) is not None
        if not of_one_request and not HANDLED.search(line):
            found.append(line)
    return found


def causes_of(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Every cause and mend of CAUSES that the log of a dead server shows, most specific first."""
    words = last_words(lines)
    return [(cause, mend) for pattern, cause, mend in CAUSES if any(map(pattern.search, words))]


def cause_of(lines: Sequence[str]) -> tuple[str, str]:
    """Likely cause and mend, from the end of a log."""
    return next(iter(causes_of(lines)), ("not recognised", "read the log"))

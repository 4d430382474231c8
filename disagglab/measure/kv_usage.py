"""KV cache blocks that a server holds while a request runs, as it reports them itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from disagglab.errors import InvalidRun
from disagglab.measure import ledger
from disagglab.results.records import Snapshot
from disagglab.serving import openai
from disagglab.serving.vllm import VllmServer

USAGE = "vllm:kv_cache_usage_perc"  # a share, 0 to 1, of all blocks but the one that vLLM keeps back


def peak_blocks(server: VllmServer, url: str, request: Mapping[str, Any]) -> int:
    """Send one request to ``url`` and scrape ``server`` until it is answered; the most blocks seen in use.

    Raises:
        InvalidRun: if the request fails, or the server exposes no usage.
    """
    total = int(ledger.cache_config(server.metrics())["num_gpu_blocks"])
    seen: list[Snapshot] = []
    answer: list[openai.Completion] = []
    sender = threading.Thread(target=lambda: answer.append(openai.complete(url, request)))
    sender.start()
    while sender.is_alive():
        seen.append(server.metrics())
    sender.join()
    if not answer or not seen:
        raise InvalidRun(f"{server.name}: the request failed while its KV blocks were being watched")
    return max(round(snapshot.value(USAGE) * (total - 1)) for snapshot in seen)

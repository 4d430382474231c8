"""Prometheus metrics of a server, read before and after, and their differences. A missing metric is an error,
not 0.
"""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from disagglab.errors import InvalidRun
from disagglab.results.records import Snapshot
from disagglab.serving import http

SCRAPE_TIMEOUT_S = 30.0
PROCESS_START = "process_start_time_seconds"


def parse(server: str, url: str, text: str) -> Snapshot:
    """Build a :class:`Snapshot` from the Prometheus text format."""
    samples = tuple(
        (sample.name, frozenset(sample.labels.items()), float(sample.value))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )
    return Snapshot(server, url, samples)


def scrape(server: str, base_url: str) -> Snapshot:
    """Read ``/metrics`` of a server.

    Raises:
        InvalidRun: if it does not answer with 200.
    """
    url = f"{base_url}/metrics"
    try:
        answer = http.get(url, SCRAPE_TIMEOUT_S)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise InvalidRun(f"{server}: no metrics: {error}; try: curl -s {url}") from error
    return parse(server, url, answer.text)


def delta(before: Snapshot, after: Snapshot, name: str, **labels: str) -> float:
    """Growth of a counter between two scrapes of the same process.

    Raises:
        InvalidRun: if the metric is missing, the counter fell, or the process is another one.
    """
    if before.value(PROCESS_START) != after.value(PROCESS_START):
        raise InvalidRun(
            f"{after.server}: the process restarted between the two scrapes; its counters began anew"
        )
    growth = after.value(name, **labels) - before.value(name, **labels)
    if growth < 0:
        raise InvalidRun(f"{after.server}: counter {name} fell by {-growth:g}; it was reset")
    return growth

"""What the connector did in a run: bytes, descriptors, seconds of posting and of transfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagglab.errors import InvalidRun
from disagglab.results.metrics import figures
from disagglab.results.records import Reading, Run
from disagglab.serving.prometheus import delta

POST_TIME = "vllm:nixl_post_time_seconds_sum"
DESCRIPTORS = "vllm:nixl_num_descriptors_sum"
MIB = 2**20
TIME, BANDWIDTH, THROUGHPUT, ITL = "transfer time", "bandwidth", "output tokens/s", "ITL p99"
UNITS = {
    TIME: "s",
    "posting": "s",
    BANDWIDTH: "GB/s",
    "transfer / TTFT": "share of TTFT",
    "TTFT p50": "s",
    THROUGHPUT: "tokens/s",
    ITL: "s",
}


@dataclass(frozen=True)
class Moved:
    """The transfers of one run, in total; ``seconds`` and ``post_s`` are sums over transfers that may
    overlap.
    """

    transfers: int
    bytes: int
    descriptors: int
    post_s: float
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Bytes over transfer time, GB/s (1e9 B/s), as one transfer sees it."""
        return self.bytes / self.seconds / 1e9

    @property
    def descriptors_per_mib(self) -> float:
        """Pieces that NIXL moved, after it had merged neighbours, for each MiB: how scattered the blocks
        are.
        """
        return self.descriptors / (self.bytes / MIB)


def of(run: Run) -> Moved:
    """The transfers of a run that was proved.

    Raises:
        InvalidRun: if the run has no readings, or no KV moved in it.
    """
    if run.readings is None or run.ledger is None or not run.ledger.transfers or not run.ledger.kv_bytes:
        raise InvalidRun(f"{run.topology}: no transfer was counted in this run of {run.workload.name}")
    before, after = run.readings
    return Moved(
        transfers=run.ledger.transfers,
        bytes=run.ledger.kv_bytes,
        descriptors=round(_grown(before, after, DESCRIPTORS)),
        post_s=_grown(before, after, POST_TIME),
        seconds=run.ledger.transfer_s,
    )


def series(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Figures of transfers, and what they did to the requests, run by run; units are in UNITS.

    Time and posting are means over the transfers of a run. ITL p99 is left out where the runs have too few
    gaps between tokens to know it.

    Raises:
        InvalidRun: if a run lacks another figure.
    """
    found: dict[str, list[float]] = {name: [] for name in UNITS}
    for run in runs:
        one, known = of(run), figures(run)
        values = {
            TIME: one.seconds / one.transfers,
            "posting": one.post_s / one.transfers,
            BANDWIDTH: one.gb_per_s if one.seconds else None,
            "transfer / TTFT": known["transfer_share_of_ttft"],
            "TTFT p50": known["ttft_p50"],
            THROUGHPUT: known["output_tokens_per_s"],
            ITL: known["itl_p99"],
        }
        for name, value in values.items():
            if value is not None:
                found[name].append(value)
            elif name != ITL:
                raise InvalidRun(f"{run.topology}: a run of {run.workload.name} has no figure {name!r}")
    if len(found[ITL]) < len(runs):
        del found[ITL]
    return found


def _grown(before: Reading, after: Reading, name: str) -> float:
    return sum(delta(before.snapshots[one], after.snapshots[one], name) for one in before.snapshots)

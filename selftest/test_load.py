"""Run-level figures from per-request lists, and the refusal of runs that are not whole."""

from __future__ import annotations

from typing import Any

import pytest

from disagglab import figures, load
from disagglab.errors import InvalidRun
from disagglab.loadworker import keep_token_ids
from disagglab.workload import Workload

WORKLOAD = Workload(name="w", prompt_tokens=10, output_tokens=3, concurrency=1, requests=2)
RESULT: dict[str, Any] = {
    "errors": ["", ""],
    "failed": 0,
    "completed": 2,
    "duration": 2.0,
    "ttfts": [0.1, 0.3],
    "latencies": [0.5, 0.9],
    "itls": [[0.2, 0.2], [0.3, 0.3]],
    "input_lens": [10, 10],
    "output_lens": [3, 3],
    "start_times": [7.0, 7.6],
}


def run_from(**changes: Any) -> load.Run:
    """The run of RESULT with values changed."""
    return load.run_from({**RESULT, **changes}, "single", WORKLOAD, 1, 0, "vllm bench serve", None)


def test_figures_follow_their_definitions() -> None:
    """TTFT and E2E medians, TPOT = (E2E - TTFT) / (tokens - 1), throughput = tokens / duration."""
    found = figures.figures(run_from())
    assert found["ttft_p50"] == pytest.approx(0.2)
    assert found["e2e_p50"] == pytest.approx(0.7)
    assert found["tpot_p50"] == pytest.approx(((0.5 - 0.1) / 2 + (0.9 - 0.3) / 2) / 2)
    assert found["output_tokens_per_s"] == pytest.approx(3.0)


def test_a_percentile_needs_its_samples() -> None:
    """p99 of four gaps is not a number; p99 of a hundred is."""
    assert figures.figures(run_from())["itl_p99"] is None
    assert figures.percentile([float(i) for i in range(100)], 99) == pytest.approx(98.01)
    assert figures.percentile([1.0] * 19, 95) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"failed": 1},
        {"completed": 1},
        {"errors": ["", "connection reset"]},
        {"output_lens": [3, 2]},
    ],
)
def test_a_run_that_is_not_whole_is_refused(changes: dict[str, Any]) -> None:
    """Failed, missing and short answers make the run invalid; nothing of it is aggregated."""
    with pytest.raises(InvalidRun):
        run_from(**changes)


class TextTrace:
    """A trace dataset that makes text of token ids, as that of vLLM 0.26."""

    def sample(self, tokenizer: Any, num_requests: int) -> list[Any]:
        """Prompts of ids that the tokenizer's vocabulary holds."""
        return [tokenizer.decode(sorted(tokenizer.get_vocab().values())) for _ in range(num_requests)]


def test_a_trace_is_sent_as_token_ids() -> None:
    """Where the load engine would decode the ids of a prompt, they stay; all else is the tokenizer's."""

    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 2}

        def decode(self, ids: list[int]) -> str:
            return " ".join("ab"[i - 1] for i in ids)

    assert TextTrace().sample(Tokenizer(), num_requests=1) == ["a b"]
    keep_token_ids(TextTrace)
    assert TextTrace().sample(tokenizer=Tokenizer(), num_requests=2) == [[1, 2], [1, 2]]


def test_e2e_is_the_sum_of_its_parts_where_it_is_not_kept() -> None:
    """The result of vLLM 0.26 has no latencies: TTFT and gaps are made of the same clock readings."""
    without = {key: value for key, value in RESULT.items() if key != "latencies"}
    run = load.run_from(without, "single", WORKLOAD, 1, 0, "vllm bench serve", None)
    assert run.e2e_s == pytest.approx(RESULT["latencies"])

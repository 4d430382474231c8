"""What a search leaves in the report: numbers of the confirmation, and two plots that can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagglab.config.setting import Candidate, Setting, options
from disagglab.experiments.halving import search
from disagglab.results import plot, search_figures
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from selftest.experiments.test_halving import SLO, WORKLOAD, measuring, ordered, searched

CHUNKS = tuple(Setting(options({"max-num-batched-tokens": tokens})) for tokens in (128, 256, 512))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run's folder."""
    return Store.create(tmp_path, "20261128-170000-abcd")


def recorder(store: Store) -> Recorder:
    return Recorder(store, "tuning", "test_search")


def test_figures_of_the_confirmation(store: Store) -> None:
    """replicated confirms twice: own setting 0.3 s a request with gaps of 30 ms, winner 0.27 s, 27 ms."""
    search_figures.record(recorder(store), searched(ordered, 4, ["replicated", "disaggregated"]), "tune")
    found = {(one.arm, one.name): one for one in store.records}
    assert {arm for arm, _name in found} == {"replicated", "replicated@winner"}
    assert found["replicated", "p99 ITL, fresh prompts"].values == pytest.approx((0.03, 0.03))
    assert found["replicated@winner", "p99 ITL, fresh prompts"].values == pytest.approx((0.027, 0.027))
    good = found["replicated@winner", "good requests, fresh prompts"]
    assert good.values == pytest.approx((6 / (6 * 2 * 0.27),) * 2)
    assert good.note == "max-num-seqs 3"
    assert good.command == "tune"


def test_plots_show_every_valid_run(store: Store) -> None:
    """Rungs of 3 and 2 settings, two confirmations of 2; the own setting has no budget of its own."""

    def speed(candidate: Candidate, _seed: int) -> float | None:
        tokens = int(dict(candidate.setting.args).get("max-num-batched-tokens", 2048))
        return None if (candidate.kind, tokens) == ("single", 512) else 0.1 * tokens / 128

    settings = {kind: (Setting(), *CHUNKS) for kind in ("single", "replicated")}
    search_figures.record(recorder(store), search(settings, measuring(speed), WORKLOAD, SLO, 1, 2))
    by_rung, by_chunk = store.plots
    assert by_rung.ticks == ("rung 0", "rung 1", "confirm 1", "confirm 2")
    assert by_rung.series["replicated"][0] == (0, 0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert by_rung.series["single"][0] == (0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert sorted(set(by_chunk.series["replicated"][0])) == [128, 256, 512]
    assert sorted(set(by_chunk.series["single"][0])) == [128, 256]
    pairs = dict(zip(*by_chunk.series["replicated"], strict=True))
    assert pairs[256] == pytest.approx(0.02)
    for one in store.plots:
        assert plot.render(one).startswith("<svg")


def test_without_a_chunk_budget_there_is_one_plot(store: Store) -> None:
    search_figures.record(recorder(store), searched(ordered, 4, ["single"]))
    assert [one.x_label for one in store.plots] == ["rung"]


def test_the_arm_of_each_pick() -> None:
    found = searched(ordered, 4)
    assert search_figures.picks(found) == {
        "single": "single@tuned",
        "replicated": "replicated@tuned",
        "disaggregated": "disaggregated",
    }

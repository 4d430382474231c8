"""Store and report: nothing recorded is lost, nothing secret is kept, the page stays small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagglab.config.arms import Arms
from disagglab.config.labs import load_lab
from disagglab.errors import LabError
from disagglab.results import plot, report
from disagglab.results.gate import GateState, State
from disagglab.results.recorder import Recorder
from disagglab.results.records import Plot, Record, VerdictRow
from disagglab.results.report import Claim, Module
from disagglab.results.run_folder import Store

ROW = VerdictRow(
    "chat", "ttft_p50", "s", "disaggregated", "single", 0.5, 0.4, "worse", 0.25, 0.2, 0.3, 3, 0.05,
    GateState(State.NOT_MET, "not worse", enforced=False), "the interval excludes no difference",
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty run folder with what every run knows."""
    made = Store.create(tmp_path, "run")
    speed = {"before": {"copy_gb_per_s": 8.0, "matrix_gflop_per_s": 100.0}}
    made.write_meta(command="pytest", model="M", commit="abc", fingerprint={"key": "k"}, speed=speed)
    return made


def test_a_record_is_on_disk_at_once(store: Store) -> None:
    """Records survive the process that made them, in order."""
    recorder = Recorder(store, "baseline", "test_x")
    recorder.numbers("TTFT", [0.1, 0.2], "s")
    recorder.numbers("TTFT", [0.3], "s")
    lines = (store.folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["values"] for line in lines] == [[0.1, 0.2], [0.3]]


def test_an_empty_measurement_is_refused(store: Store) -> None:
    """A record without values would show as a number; it is an error instead."""
    with pytest.raises(ValueError, match="no values"):
        Recorder(store, "baseline", "test_x").numbers("TTFT", [], "s")


def test_the_page_holds_verdicts_lessons_numbers_and_plots(store: Store) -> None:
    """Everything recorded shows; foreign text is escaped; nothing is loaded from elsewhere."""
    store.add(ROW)
    store.add(Record("disagg", "test_x", "bytes <moved>", "B", (11_796_480.0,)))
    xs = tuple(float(x) for x in range(20))
    store.add(Plot("disagg", "Throughput", "x", "y", {"a": (xs, xs), "b": (xs, xs)}))
    module = Module("disagg", "<h1>Lesson</h1>", [Claim("t::x", "KV <moves>", "passed", 1.0)])
    page = report.render(load_lab("embedded"), store, [module], [])
    for text in (
        "worse",
        ">not met: wants not worse (not enforced)<",
        "+25.0 %",
        "11,796,480",
        "bytes &lt;moved&gt;",
        "<h1>Lesson</h1>",
        "KV &lt;moves&gt;",
        "<svg",
    ):
        assert text in page
    assert "src=" not in page
    assert page.index("Verdicts") < page.index("The lab") < page.index("Module: disagg")
    assert len(page.encode()) < 200_000


def test_verdicts_fit_a_terminal_table(store: Store) -> None:
    """One line a verdict under one header, columns aligned."""
    store.add(ROW)
    header, line = report.verdict_lines(store)
    assert line.index("worse") == header.index("verdict")


@pytest.mark.parametrize(
    "style", ["points", "line", "points over lines", "points over spread and level", "bars"]
)
def test_a_plot_is_small_and_deterministic(style: str) -> None:
    """The same data gives the same bytes, below 60 kB, with its labels as text."""
    figure = Plot("m", "title", "tokens", "s", {"a": ((1.0, 2.0), (3.0, 4.0))}, style)
    svg = plot.render(figure)
    assert svg == plot.render(figure)
    assert svg.startswith("<svg")
    assert "tokens" in svg
    assert len(svg) < 60_000


def test_unequal_series_are_refused() -> None:
    """A series with more x than y values is an error that names it."""
    with pytest.raises(ValueError, match="series a has 2 x and 1 y"):
        plot.render(Plot("m", "t", "x", "y", {"a": ((1.0, 2.0), (3.0,))}))


def test_a_token_in_the_run_folder_is_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in any log or result fails the session; the message names the file and never the token."""
    store.require_no_secret()
    token = "hf_" + "A" * 24
    (store.logs / "x.log").write_text(f"HF_TOKEN={token}\n")
    with pytest.raises(LabError, match=r"x\.log") as caught:
        store.require_no_secret()
    assert token not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "another-secret-value")
    (store.logs / "x.log").write_text("another-secret-value")
    with pytest.raises(LabError, match=r"x\.log"):
        store.require_no_secret()


def test_latest_moves_with_every_run(tmp_path: Path) -> None:
    """``latest`` is a link that always points at a whole folder."""
    for name in ("one", "two"):
        Store.create(tmp_path, name).point_latest()
        assert (tmp_path / "latest").resolve() == tmp_path / name


def test_what_is_left_out_stands_beside_the_verdicts(store: Store) -> None:
    """A gate that lacks an arm has a row in terminal and report, neither met nor failed, and no floor."""
    lab = load_lab("embedded")
    arms = Arms(("replicated", "disaggregated"), ("single", "single-again"))
    store.write_meta(arms_left_out=list(arms.left_out), not_judged=report.not_judged(lab, arms))
    store.add(ROW)
    lines = report.verdict_lines(store)
    page = report.render(lab, store, [], [])
    (row,) = (line for line in lines if "not judged" in line and "ttft_p50" in line)
    assert "ARM-LEFT-OUT: single (not enforced)" in row
    assert "met" not in row
    assert ">ARM-LEFT-OUT: single (not enforced)<" in page
    for said in (
        "left out by --arm or --without: single, single-again",
        "gates that were not judged for lack of an arm: 1",
        "the A/A floor of this session is not known: it is single against single-again",
    ):
        assert said in lines
        assert said in page


def test_a_gate_of_a_way_that_was_not_asked_for_is_not_judged() -> None:
    """Its row names its own candidate, and what it lacks."""
    lab = load_lab("embedded")
    gate = lab.gates[0].model_copy(update={"candidate": "disaggregated@tuned", "baseline": "best"})
    (row,) = report.not_judged(lab.model_copy(update={"gates": (gate,)}), Arms())
    assert (row["candidate"], row["baseline"]) == ("disaggregated@tuned", "best")
    assert row["gate"].startswith("ARM-LEFT-OUT: disaggregated@tuned")


def test_nothing_is_said_of_arms_where_all_are_measured(store: Store) -> None:
    """The control."""
    lab = load_lab("embedded")
    store.write_meta(arms=list(Arms().kept), arms_left_out=[], not_judged=report.not_judged(lab, Arms()))
    store.add(ROW)
    assert not report.left_out_lines(store)
    assert "ARM-LEFT-OUT" not in report.render(lab, store, [], [])

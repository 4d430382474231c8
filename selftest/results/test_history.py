"""``python -m disagglab history``: which runs form a series, what is said of it, and what is left out.

Oracle: run folders written here, with figures whose level is known; exit status, both streams and the page.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.results import archive, history, historypage

OLD, NEW = "a" * 12, "b" * 12
GATES = """
[[gate]]
workload = "chat"
metric = "ttft_p50"
baseline = "single"
"""
NODES = {"node a (prefill)": {"GPU 0 of the node, name": "H200"}}
WIGGLE = (0.99, 1.0, 1.01, 1.0, 0.995, 1.005)  # run by run, around a level
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def columns_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as where the output is no terminal, whatever these tests are run in."""
    monkeypatch.setenv("COLUMNS", "100")


def figure(**changes: Any) -> dict[str, Any]:
    """A line of figures.jsonl."""
    return {
        "workload": "chat",
        "arm": "single",
        "metric": "ttft_p50",
        "unit": "s",
        "better": "lower",
        "values": [0.5, 0.5, 0.5],
        **changes,
    }


def add_run(reports: Path, day: int, *figures: dict[str, Any] | str, key: str = OLD, **meta: Any) -> Path:
    """A run folder of that day of a month; a text among the figures is a line as it stands."""
    folder = reports / f"202611{day:02d}-120000-{day:04x}"
    folder.mkdir(parents=True)
    versions = {"vllm": "0.31.0", "torch": "2.13.0" if key == OLD else "2.14.0"}
    whole = {
        "command": f"pytest -m disagg # {day}",
        "lab": "embedded",
        "lab_file": "name = 'embedded'" + GATES,
        "model": "M",
        "commit": f"commit{day:02d}",
        "fingerprint": {"cpu": "C", "cores": 2, "versions": versions, "key": key, "lab": NODES},
        "speed": {"before": {"copy_gb_per_s": 10.25, "matrix_gflop_per_s": 150.0}},
        **meta,
    }
    (folder / "run.json").write_text(json.dumps(whole))
    lines = [line if isinstance(line, str) else json.dumps(line) for line in figures]
    (folder / "figures.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def level(value: float, day: int) -> list[float]:
    """Three rounds of a day around a level; their median is the middle one."""
    median = value * WIGGLE[day % len(WIGGLE)]
    return [0.9 * median, median, 1.2 * median]


def add_runs(reports: Path, days: range, value: float, **meta: Any) -> None:
    """A run a day, all of one level."""
    for day in days:
        add_run(reports, day, figure(values=level(value, day)), **meta)


def told(capsys: Capture, reports: Path, *options: str, status: int = 0) -> tuple[list[str], str, str]:
    """What the tool prints, what it says on stderr, and its page."""
    assert main(["history", "--reports", str(reports), *options]) == status
    out, err = capsys.readouterr()
    page = reports / "history.html"
    return out.splitlines(), err, page.read_text() if page.exists() else ""


def test_a_step_is_named_by_its_first_run(capsys: Capture, tmp_path: Path) -> None:
    """The line has both levels, the ratio, what it means for this metric and p; so has the page."""
    add_runs(tmp_path, range(1, 9), 0.5)
    add_runs(tmp_path, range(9, 15), 0.6, lab_file="name = 'other'" + GATES)
    (header, lab, name, line, runs, series, path), err, page = told(capsys, tmp_path)
    assert err == ""
    assert " ".join(header.split()) == "arm runs first last last change point"
    assert lab == f"embedded, M, {OLD}, last 20261114-120000-000e"
    assert name == "  chat: ttft_p50, s"
    assert line.split()[:3] == ["single", "14", "0.5"]
    assert line.endswith("+19.9 % worse at 20261109-120000-0009")
    assert line.index("+19.9") == header.index("last change point")
    assert runs == "14 runs with figures, 0 without, passed over"
    assert series == "1 series, 1 with a change point"
    assert path == str(tmp_path / "history.html")
    for text in (
        "20261109-120000-0009: 0.5",
        " → 0.6, +19.9 % (worse), p 0.000",
        "commit08 → commit09",
        "lab file",
        "pytest -m disagg # 9",
        "10.2 GB/s",
    ):
        assert text in page


def test_a_higher_figure_that_rises_is_better(capsys: Capture, tmp_path: Path) -> None:
    """What a change means follows the metric's direction."""
    for day in range(1, 13):
        values = level(40.0 if day < 7 else 50.0, day)
        add_run(tmp_path, day, figure(metric="output_tokens_per_s", better="higher", values=values))
    assert "% better at " in told(capsys, tmp_path, "--all")[0][3]


def test_fingerprints_are_kept_apart(capsys: Capture, tmp_path: Path) -> None:
    """A step between two fingerprints is in neither series; what differs between them is listed."""
    add_runs(tmp_path, range(1, 8), 0.5)
    add_runs(tmp_path, range(8, 15), 0.6, key=NEW)
    lines, _, page = told(capsys, tmp_path)
    assert [line.split(", ")[2] for line in lines[1:7:3]] == [NEW, OLD]
    assert all(line.endswith("none") for line in lines[3:7:3])
    assert "<td>versions.torch</td><td>2.13.0</td><td>2.14.0</td>" in page
    assert "<td>versions.vllm</td><td>0.31.0</td></tr>" in page
    assert historypage.JOINED not in page


def test_fingerprints_are_joined_on_request(capsys: Capture, tmp_path: Path) -> None:
    """The joined series has the step; table, heading, chart and runs say of which fingerprints it is."""
    add_runs(tmp_path, range(1, 8), 0.5)
    add_runs(tmp_path, range(8, 15), 0.6, key=NEW)
    (head, _, lab, _, line, *_), _, page = told(capsys, tmp_path, "--across-fingerprints")
    assert head == "different fingerprints joined on request"
    assert f"{OLD}+{NEW}" in lab
    assert line.endswith("20261108-120000-0008")
    assert "20261108-120000-0008: " in page
    assert f"<h1>History: {historypage.JOINED}</h1>" in page
    assert f"fingerprint {OLD} → {NEW}" in page
    assert f">fingerprint {OLD}</text>" in page
    assert f">fingerprint {NEW}</text>" in page
    assert page.count(f"<td>{NEW}</td>") == 7


def test_models_units_and_labs_are_kept_apart(tmp_path: Path) -> None:
    """Each of them makes a series of its own, also where fingerprints are joined."""
    for day, meta in enumerate(({}, {"lab": "hybrid"}, {"model": "N"}, {"key": NEW}), 1):
        add_run(tmp_path, day, figure(), **meta)
    add_run(tmp_path, 9, figure(unit="ms"))
    runs = archive.read(tmp_path).runs
    assert len(history.collect(runs)) == 5
    joined = history.collect(runs, across_fingerprints=True)
    assert sorted(len(series.points) for series in joined) == [1, 1, 1, 2]


def test_too_few_runs_and_zeros_are_not_judged(capsys: Capture, tmp_path: Path) -> None:
    """The line says why no change point was looked for."""
    for day in range(1, 7):
        share = figure(metric="slo_attainment", better="higher", values=[0.0 if day == 2 else 1.0])
        seldom = [figure(arm="replicated")] if day < 6 else []
        add_run(tmp_path, day, figure(), share, *seldom)
    (_, _, _, single, replicated, _, share_line, *_), _, page = told(capsys, tmp_path, "--all")
    assert (single.split()[0], single.endswith("none")) == ("single", True)
    assert share_line.endswith("not judged: the median is 0 in 1 run")
    assert (replicated.split()[0], replicated.endswith("too few runs (5 of 6)")) == ("replicated", True)
    assert page.count("<svg") == 3


def test_rounds_are_carried(capsys: Capture, tmp_path: Path) -> None:
    """A short session is a point like any other; the page says how many rounds runs had."""
    add_run(tmp_path, 1, figure(values=[1.0, 2.0, 4.0]))
    add_run(tmp_path, 2, figure(values=[3.0, 5.0]))
    lines, _, page = told(capsys, tmp_path)
    assert lines[3].split()[1:4] == ["2", "2", "4"]
    assert "<td>2</td><td>2 to 3</td><td>2</td><td>4</td>" in page


def test_which_folders_are_runs(capsys: Capture, tmp_path: Path) -> None:
    """Committed runs count, once; sessions without figures are counted and passed over, others ignored."""
    first = add_run(tmp_path, 2, figure(values=[2.0]))
    add_run(tmp_path / "reference", 1, figure(values=[1.0]))
    shutil.copytree(first, tmp_path / "reference" / first.name)
    (tmp_path / "latest").symlink_to(first.name)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "20261030-120000-old0").mkdir()
    without = add_run(tmp_path, 3)
    (without / "figures.jsonl").unlink()
    (_, _, _, line, runs, _, _), err, _ = told(capsys, tmp_path)
    assert err == ""
    assert line.split()[1:4] == ["2", "1", "2"]
    assert runs == "2 runs with figures, 2 without, passed over"


def test_a_folder_of_references_is_read_by_itself(capsys: Capture, tmp_path: Path) -> None:
    """``--reports reports/reference`` finds what stands there under a name, or under a name and a run."""
    first = add_run(tmp_path / "aside", 1, figure(values=[1.0]), run="20261101-120000-0001")
    second = add_run(tmp_path / "aside", 2, figure(values=[2.0]))
    shutil.copytree(first, tmp_path / "reference" / "two-gpus")
    shutil.copytree(second, tmp_path / "reference" / "both" / second.name)
    for reports in (tmp_path, tmp_path / "reference"):
        assert told(capsys, reports)[0][3].split()[1:4] == ["2", "1", "2"]


GOOD = json.dumps(figure(metric="e2e_p50"))
BAD_LINES = {
    "torn": ('{"workload": "cha', "not JSON"),
    "a list": ("[]", "not an object"),
    "no arm": (json.dumps(figure(arm=None)), "arm"),
    "empty unit": (json.dumps(figure(unit="")), "unit"),
    "no direction": (json.dumps(figure(better="smaller")), "better"),
    "direction no text": (json.dumps(figure(better=["lower"])), "better"),
    "no values": (json.dumps({k: v for k, v in figure().items() if k != "values"}), "values"),
    "a number": (json.dumps(figure(values=5)), "values"),
    "negative": (json.dumps(figure(values=[-1])), "values"),
    "not a number": (json.dumps(figure(values=[math.nan])), "values"),
    "too large": (json.dumps(figure(values=[1])).replace("[1]", f"[{10**400}]"), "values"),
    "a boolean": (json.dumps(figure(values=[True])), "values"),
    "a text": (json.dumps(figure(values=["1"])), "values"),
    "a repeat": (GOOD, "repeats"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_left_out(tmp_path: Path, case: str) -> None:
    """The problem names file and line; the other lines of the run count."""
    bad, named = BAD_LINES[case]
    folder = add_run(tmp_path, 1, GOOD, bad, figure(arm="replicated"))
    found = archive.read(tmp_path)
    (problem,) = found.problems
    assert (problem.file, problem.key) == (str(folder / "figures.jsonl"), "line 2")
    assert named in problem.wrong
    assert [f.arm for f in found.runs[0].figures] == ["single", "replicated"]


def test_what_is_left_out_is_said(capsys: Capture, tmp_path: Path) -> None:
    """Exit status 1, a line on stderr and in the page for each problem; the table has the rest."""
    lines_file = add_run(tmp_path, 1, figure(), "{") / "figures.jsonl"
    meta = add_run(tmp_path, 2, figure()) / "run.json"
    meta.write_text("")
    (_, _, _, line, runs, _, _), err, page = told(capsys, tmp_path, status=1)
    first, second = err.splitlines()
    assert first.startswith(f"{lines_file}: line 2: not JSON")
    assert second.startswith(f"{meta}: (whole file): not JSON")
    assert f"{lines_file}: line 2: not JSON" in page
    assert f"{meta}: (whole file): not JSON" in page
    assert line.split()[1] == "1"
    assert runs.startswith("1 run with figures")


BAD_META: dict[str, tuple[str | bytes, str]] = {
    "torn": ('{"lab": ', "not JSON"),
    "not UTF-8": (b"\xff", "not JSON"),
    "a list": ("[]", "not an object"),
    "no lab": ('{"model": "M", "fingerprint": {"key": "k"}}', "lab"),
    "no key": ('{"lab": "L", "model": "M", "fingerprint": {}}', "fingerprint.key"),
    "fingerprint no object": ('{"lab": "L", "model": "M", "fingerprint": "k"}', "fingerprint.key"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_a_run_with_a_bad_run_json_is_left_out(tmp_path: Path, case: str) -> None:
    """The problem names file and key; the other runs count."""
    text, named = BAD_META[case]
    add_run(tmp_path, 1, figure())
    path = add_run(tmp_path, 2, figure()) / "run.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = archive.read(tmp_path)
    (problem,) = found.problems
    assert problem.file == str(path)
    assert named in f"{problem.key}: {problem.wrong}"
    assert [run.run_id[:8] for run in found.runs] == ["20261101"]


def test_figures_without_their_run_json(capsys: Capture, tmp_path: Path) -> None:
    """Figures that nobody can place are an error; a line without a valid round is none."""
    folder = add_run(tmp_path, 1, figure())
    (folder / "run.json").unlink()
    add_run(tmp_path, 2, figure(values=[]))
    (runs, series, _), err, _ = told(capsys, tmp_path, status=1)
    assert err.startswith(str(folder / "run.json"))
    assert runs == "1 run with figures, 0 without, passed over"
    assert series.startswith("0 series")


def test_a_lab_file_is_known_by_what_it_says(tmp_path: Path) -> None:
    """Comments and order make no other file, a value does; text that is no TOML counts as it stands."""
    texts = [
        'name = "a"\n[slo]\nttft_s = 1.0',
        '# why\nslo.ttft_s = 1.0\nname = "a"',
        'name = "a"',
        "name = ",
    ]
    for day, text in enumerate(texts, 1):
        add_runs(tmp_path, range(day, day + 1), 0.5, lab_file=text)
    first, same, other, broken = (run.lab_file for run in archive.read(tmp_path).runs)
    assert first == same
    assert len({first, other, broken}) == 3


def test_filters_keep_what_they_name(capsys: Capture, tmp_path: Path) -> None:
    """By lab, workload, arm and metric; a name that no series has is refused with those that there are."""
    for day, lab in enumerate(("embedded", "hybrid"), 1):
        add_run(tmp_path, day, *(figure(workload=w, arm=a) for w in ("x", "y") for a in ("p", "q")), lab=lab)
    lines, _, _ = told(capsys, tmp_path, "--all")
    assert len(lines) == 1 + 2 * (1 + 2 * (1 + 2)) + 3
    lines, _, _ = told(capsys, tmp_path, "--lab", "hybrid", "--workload", "y", "--arm", "p", "--arm", "q")
    assert [line.split()[0].rstrip(",:") for line in lines[1:-3]] == ["hybrid", "y", "p", "q"]
    _, err, _ = told(capsys, tmp_path, "--metric", "ttft", status=2)
    assert err == "--metric: ttft: no series has it (mend: there is: ttft_p50)\n"


def test_the_page_is_one_file(capsys: Capture, tmp_path: Path) -> None:
    """Nothing is loaded from elsewhere, foreign text is escaped, and --html says where it goes."""
    add_run(tmp_path, 1, figure(workload="<b>&"), command="pytest <i>")
    page = tmp_path / "page.html"
    told(capsys, tmp_path, "--html", str(page), "--all")
    text = page.read_text()
    assert "&lt;b&gt;&amp;" in text
    assert "pytest &lt;i&gt;" in text
    assert "<b>&" not in text
    assert not any(foreign in text for foreign in ("src=", "<link", "<script", "@import"))
    assert not (tmp_path / "history.html").exists()


def test_what_cannot_be_read_or_written_is_refused(capsys: Capture, tmp_path: Path) -> None:
    """Exit status 2 and one line, for a folder that is not there on either side."""
    absent = tmp_path / "absent"
    _, err, _ = told(capsys, absent, status=2)
    assert (err.count("\n"), err.startswith(str(absent))) == (1, True)
    _, err, _ = told(capsys, tmp_path, "--html", str(absent / "x.html"), status=2)
    assert (err.count("\n"), err.startswith(str(absent / "x.html"))) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_runs(capsys: Capture, tmp_path: Path) -> None:
    """Nothing to show is no error; the page says so."""
    (runs, _, _), err, page = told(capsys, tmp_path)
    assert (runs[:19], err) == ("0 runs with figures", "")
    assert "No run with figures." in page


def test_another_definition_of_a_workload_is_another_series(tmp_path: Path) -> None:
    """A workload whose lengths changed under its old name does not continue the old figures."""
    for day in range(1, 9):
        add_run(tmp_path, day, figure(definition="a" if day < 5 else "b", values=[float(day < 5) + 1] * 3))
    found = history.collect(archive.read(tmp_path).runs)
    assert [len(series.points) for series in found] == [4, 4]


def test_the_gated_figures_alone_are_shown(capsys: Capture, tmp_path: Path) -> None:
    """Of workload, figure and stream of a gate its two arms; how many more there are is said."""
    gates = GATES + '[[gate]]\nworkload = "long"\nmetric = "itl_p99"\nstream = "steady"\nlimit = 0.1\n'
    gated = [figure(arm="single"), figure(arm="disaggregated")]
    gated += [figure(workload="long", arm="disaggregated", metric="itl_p99 (steady)")]
    others = [
        figure(arm="replicated"),
        figure(metric="ttft_p99"),
        figure(workload="long"),
        *(figure(workload="long", arm=arm, metric="itl_p99 (steady)") for arm in ("single", "replicated")),
        figure(workload="long", arm="disaggregated", metric="itl_p99"),
    ]
    add_run(tmp_path, 1, *others, *gated, lab_file="name = 'embedded'" + gates)
    lines, _, page = told(capsys, tmp_path)
    assert [line.split()[0] for line in lines[2:-3]] == [
        "chat:",
        "single",
        "disaggregated",
        "long:",
        "disaggregated",
    ]
    assert lines[-2] == "3 series, 0 with a change point; 6 more with --all"
    assert "6 more with --all" in page
    lines, _, page = told(capsys, tmp_path, "--all")
    assert lines[-2] == "9 series, 0 with a change point"
    assert "--all" not in page


def test_a_gate_against_the_best_shows_all_other_ways(capsys: Capture, tmp_path: Path) -> None:
    """Of the session's arms those among which the best was, and the candidate, which the gate names."""
    gate = '[[gate]]\nworkload = "chat"\nmetric = "ttft_p50"\nbaseline = "best"\n'
    text = "name = 'embedded'\n" + gate + "candidate = 'disaggregated@tuned'\n"
    arms = ["single", "sharded", "disaggregated", "single-again", "disaggregated@tuned"]
    add_run(tmp_path, 1, *(figure(arm=arm) for arm in arms), lab_file=text, arms=arms)
    lines, _, _ = told(capsys, tmp_path)
    assert [line.split()[0] for line in lines[2:-3]] == ["chat:", "single", "sharded", "disaggregated@tuned"]


@pytest.mark.parametrize("text", ["name =", "gate = 1", "[gate]\nmetric = 'x'", "gate = ['x', 1]"])
def test_a_lab_file_without_gates_has_no_gated_figure(capsys: Capture, tmp_path: Path, text: str) -> None:
    """Neither one that is damaged; what there is otherwise is said, and shown to who names it."""
    add_run(tmp_path, 1, figure(), lab_file=text)
    lines, _, _ = told(capsys, tmp_path)
    assert lines[:-1] == [
        "1 run with figures, 0 without, passed over",
        "0 series, 0 with a change point; 1 more with --all",
    ]
    assert told(capsys, tmp_path, "--metric", "ttft_p50")[0][3].split()[0] == "single"


def test_the_newest_session_comes_first(capsys: Capture, tmp_path: Path) -> None:
    """Labs by their last session; in a lab figures by theirs, of one session as it wrote them."""
    add_run(tmp_path, 3, figure(workload="b"), lab="x")
    add_run(tmp_path, 2, figure(workload="a"), figure(workload="c"), lab="y")
    add_run(tmp_path, 1, figure(workload="c"), figure(workload="b"), figure(workload="d"), lab="x")
    lines, _, _ = told(capsys, tmp_path, "--all")
    assert [line.split()[0] for line in lines[1:-3] if "single" not in line] == [
        *("x,", "b:", "c:", "d:"),
        *("y,", "a:", "c:"),
    ]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(
    capsys: Capture, tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of model, workload and arm are shortened, and the end of a change; no number, key or metric."""
    monkeypatch.setenv("COLUMNS", str(columns))
    long = figure(
        workload="long-prompts-into-a-steady-decode-of-many-users",
        arm="disaggregated@smaller-blocks",
        metric="output_tokens_per_s (steady)",
    )
    for day in range(1, 15):
        long["values"] = level(10_000 if day < 9 else 15_000, day)
        add_run(tmp_path, day, long, model="an-organisation/a-model-of-a-long-name-8b-instruct")
    (head, lab, name, line, *summary, _), _, _ = told(capsys, tmp_path, "--all")
    assert max(map(len, (head, lab, name, line, *summary))) <= columns
    assert lab.startswith("embedded, an-")
    assert f"-instruct, {OLD}, last 20261114" in lab
    assert name.endswith(": output_tokens_per_s (steady), s")
    assert name.startswith("  long-")
    assert line.split()[1:4] == ["14", "10,000", "15,150"]
    assert "  +49.8 % worse a" in line
    assert line.endswith(" at 20261109-120000-0009") == (columns == 100)


def test_an_incomplete_fingerprint_is_a_series_by_itself(capsys: Capture, tmp_path: Path) -> None:
    """Of two sessions with one old key nobody knows whether their GPUs were the same; both are labelled."""
    old = {"cpu": "C", "cores": 2, "versions": {}, "key": OLD}
    for day in (1, 2):
        add_run(tmp_path, day, figure(), fingerprint=old)
    add_run(tmp_path, 3, figure())
    add_run(tmp_path, 4, figure())
    lines, _, page = told(capsys, tmp_path)
    assert [line.partition(", M, ")[2] for line in lines[1:10:3]] == [
        f"{OLD}, last 20261104-120000-0004",
        f"{OLD} (incomplete), last 20261102-120000-0002",
        f"{OLD} (incomplete), last 20261101-120000-0001",
    ]
    assert [line.split()[1] for line in lines[3:12:3]] == ["2", "1", "1"]
    assert f"fingerprint {OLD} (incomplete)</h2>" in page
    assert f"<th>{OLD}</th>" in page
    joined, _, _ = told(capsys, tmp_path, "--across-fingerprints")
    assert joined[2].startswith(f"embedded, M, {OLD} (incomplete)+{OLD}, last")
    assert joined[4].split()[1] == "4"

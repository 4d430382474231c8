"""pytest-benchmark's table and storage hold times alone, and tell two releases apart.

Oracle: pytest-benchmark itself. Two sessions store made-up figures through the suite's own recorder, and its
command line compares them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from disagglab.paths import ROOT
from disagglab.results.recorder import saved_name
from disagglab.stats.metric import METRICS, TIME_PER_TOKEN

LIMIT_S = 60
RUN_ID = "20261128-084500-8a8a"
SESSION = """
import pytest
from disagglab.results.recorder import VIRTUAL_CLOCK, timing_into
from disagglab.stats.metric import METRICS

VALUES = {values!r}

@pytest.mark.benchmark(timer=VIRTUAL_CLOCK, group="disagg")
@pytest.mark.parametrize("metric", VALUES)
def test_gated_figure(benchmark, metric):
    times = METRICS[metric].as_times(VALUES[metric])
    if times is not None:
        name, values_s = times
        timing_into(benchmark)(values_s, renamed=(metric, name), no_times=VALUES["slo_attainment"])
"""


def test_only_times_are_times() -> None:
    """Every metric in seconds is one, throughput becomes one with a name that says so, the rest is none."""
    named = {name: metric.as_times([0.5]) for name, metric in METRICS.items()}
    for name, metric in METRICS.items():
        if metric.unit == "s":
            assert named[name] == (name, [0.5])
    assert named["output_tokens_per_s"] == (TIME_PER_TOKEN, [2.0])
    assert {name for name, times in named.items() if times is None} == {
        "slo_attainment",
        "goodput_per_s",
        "transfer_share_of_ttft",
    }


def session(folder: Path, release: str, values: dict[str, list[float]]) -> dict[str, object]:
    """Store one session's figures, one folder a release as their fingerprints make it; what was stored."""
    test = folder / "test_made.py"
    test.write_text(SESSION.format(values=values))
    storage = folder / f"made-{release}"
    quiet = "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"  # as in pytest.ini: a share has no row
    argv = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "-W", quiet),
        *(f"--rootdir={folder}", f"--benchmark-storage=file://{storage}"),
        *(f"--benchmark-save={saved_name(release, RUN_ID)}", str(test)),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "slo_attainment" not in done.stdout, "a share is no row of the table"
    (stored,) = storage.rglob("*.json")
    found: dict[str, object] = json.loads(stored.read_text())
    return found


def test_two_releases_are_told_apart(tmp_path: Path) -> None:
    """A release that is slower by a tenth is slower by a tenth in pytest-benchmark's comparison."""
    old = {
        "ttft_p50": [0.5, 0.52, 0.48],
        "output_tokens_per_s": [40.0] * 3,
        "slo_attainment": [1.0, 0.9, 0.8],
    }
    new = {"ttft_p50": [0.55] * 3, "output_tokens_per_s": [50.0] * 3, "slo_attainment": [0.5] * 3}
    stored = {release: session(tmp_path, release, values) for release, values in (("1.0", old), ("2.0", new))}
    rows = stored["1.0"]["benchmarks"]
    assert isinstance(rows, list)
    assert {row["name"] for row in rows} == {
        "test_gated_figure[ttft_p50]",
        "test_gated_figure[time_per_output_token]",
    }
    assert all(row["extra_info"]["no_times"] == old["slo_attainment"] for row in rows)
    done = subprocess.run(
        [Path(sys.executable).with_name("pytest-benchmark"), "compare", "--group-by=name", "--columns=median",
         *map(str, sorted(tmp_path.glob("made-*/*/*.json")))],
        cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time in ms" in done.stdout
    row = re.compile(r"^test_gated_figure\[(\w+)\] \(\S+/0001_(\d\.\d)-\S*\) +([\d.]+)", re.M)
    found = {(name, release): float(ms) for name, release, ms in row.findall(done.stdout)}
    assert found == {
        ("ttft_p50", "1.0"): 500,
        ("ttft_p50", "2.0"): 550,
        (TIME_PER_TOKEN, "1.0"): 25,
        (TIME_PER_TOKEN, "2.0"): 20,
    }, done.stdout

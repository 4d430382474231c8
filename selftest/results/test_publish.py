"""Finished sessions as files to commit: what is written, what of a host is replaced, what is refused.

Oracle: a run folder made here, whose paths, names and failures are known.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagglab.cli.main import main
from disagglab.errors import ConfigError
from disagglab.paths import ROOT
from disagglab.results import archive, publish
from disagglab.results.gate import GateState
from disagglab.results.publish import check, left, make, places, replaced
from disagglab.results.records import FigureRow, Plot, Record, VerdictRow
from disagglab.results.run_folder import Store

RUN_ID = "20261122-053423-a773"
REPOSITORY, VENV, HOST = "/scratch/u17/lab", "/scratch/u17/envs/venv", "blade07"
MODEL = f"{REPOSITORY}/labs/models/llama"
ROUTER = f"{VENV}/bin/vllm-router --port 21004"
SERVER = f"HOME=/home/u17 {VENV}/bin/python -m vllm.entrypoints.cli.main serve {MODEL}"
LAB_FILE = 'name = "two-gpus"\nlabel = "two cards"\n[[host]]\nname = "alpha"\n'
VERDICT = VerdictRow(
    "chat", "ttft_p50", "s", "disaggregated", "single", 0.5, 0.4, "worse", 0.25, 0.2, 0.3, 3, 0.05,
    GateState.parse("not met: wants not worse"), "why", noise_floor=0.04,
)  # fmt: skip

Made = Callable[..., Path]


@pytest.fixture
def session(tmp_path: Path) -> Made:
    """Makes the folder of a session that ended; arguments: run id, lines of its page, its ``run.json``."""

    def made(run_id: str = RUN_ID, page: str = "", **meta: Any) -> Path:
        store = Store.create(tmp_path / "reports", run_id)
        store.facts.update({"host local": {"host name": HOST}, "host alpha": {"host name": "alpha"}})
        store.commands.update({"server a": SERVER, "router single": ROUTER})
        trace = f"--dataset-path {REPOSITORY}/reports/{run_id}/traces/chat.1.4.jsonl"
        store.add(Record("disagg", "test_x", "bytes", "B", (3.0, 1.0, 2.0), command=f"bench {trace}"))
        store.add(FigureRow("chat", "single", "ttft_p50", "s", "lower", (0.25, 0.75, 0.5)))
        store.add(Plot("disagg", "TTFT, chat", "round", "s", {"single": ((1.0, 2.0), (0.25, 0.75))}))
        store.add(VERDICT)
        claim = {"node": "tests/disagg/test_x.py::test_y", "claim": "Y holds", "outcome": "failed"}
        about = {
            "command": f"pytest --lab={REPOSITORY}/labs/two-gpus.toml --basetemp=/tmp/here",
            "lab": "two-gpus",
            "lab_file": LAB_FILE,
            "vllm": "0.31.0",
            "model": "llama",
            "commit": "abc",
            "fingerprint": {
                "key": "f00d",
                "cpu": "Xeon",
                "versions": {"torch": "2.13.0"},
                "lab": {"node a (prefill)": {"CPU": "Xeon", "GPU 0 of the node, name": "H100"}},
            },
            "exitstatus": 0,
            "modules": {"disagg": [claim]} if meta.get("exitstatus") else {},
        }
        store.write_meta(**{**about, **meta})
        (store.folder / "report.html").write_text(
            f"<table><tr><td>host name</td><td>{HOST}</td></tr></table>\n<pre>{SERVER}</pre>\n"
            f'<i data-blob="{{&#34;log&#34;: &#34;next:\\n{REPOSITORY}/tests/disagg/test_x.py:3&#34;}}">'
            f"</i> file://{REPOSITORY}/labs /dev/shm /usr/bin/python3 tests/root/work ./tmp\n{page}\n"
        )
        return store.folder

    return made


def refusal(*args: Any, **kwargs: Any) -> ConfigError:
    """Why a reference is not made."""
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    return caught.value


def test_a_reference_holds_what_the_session_showed(session: Made, tmp_path: Path) -> None:
    """Page, lists, plots as SVG, and a README with verdicts and every figure; no log, run or trace."""
    made = make([session()], "two-gpus", into=tmp_path / "reference")
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    assert names == [
        "README.md", "figures.jsonl", "plots/01-disagg-ttft-chat.svg", "records.jsonl", "report.html",
        "run.json", "verdicts.jsonl",
    ]  # fmt: skip
    assert (made / "plots/01-disagg-ttft-chat.svg").read_text().startswith("<svg")
    readme = (made / "README.md").read_text()
    for text in (
        "- Lab `two-gpus` (two cards)",
        "- Date: 2026-11-22 05:34:23 UTC",
        "- vLLM 0.31.0; model llama; code abc",
        "- Fingerprint `f00d`: cpu Xeon\n- Versions: torch 2.13.0\n"
        "- node a (prefill): CPU Xeon, GPU 0 of the node, name H100\n",
        "$VENV/bin/vllm-router --port 21004",
        "| chat | ttft_p50 | disaggregated 0.5 s | single 0.4 s | worse | +25.0 % [+20.0 %, +30.0 %] | 3 |"
        " ±4.0 % | not met: wants not worse |",
        "| chat | single | ttft_p50 | s | 3 | 0.5 | 0.25 to 0.75 |",
        "| test_x | bytes |  | B | 3 | 2 | 1 to 3 |",
        "[TTFT, chat](plots/01-disagg-ttft-chat.svg)",
    ):
        assert text in readme, text
    assert "failed" not in readme


def test_nothing_of_the_host_is_left(session: Made, tmp_path: Path) -> None:
    """Repository, environment, home, temporary files and host name are replaced; system paths stay."""
    made = make([session()], "two-gpus", into=tmp_path / "reference")
    whole = "\n".join(path.read_text() for path in made.rglob("*") if path.is_file())
    for gone in ("/scratch", "/home", "/tmp/here", HOST):
        assert gone not in whole, gone
    page = (made / "report.html").read_text()
    for kept in ("&#34;next:\\n./tests/disagg/test_x.py:3", "file://./labs", "/dev/shm", "/usr/bin/python3"):
        assert kept in page, kept
    meta = json.loads((made / "run.json").read_text())
    assert meta["command"] == "pytest --lab=./labs/two-gpus.toml --basetemp=$TMP/here"
    serve = "HOME=~ $VENV/bin/python -m vllm.entrypoints.cli.main serve ./labs/models/llama"
    assert meta["commands"]["server a"] == serve
    assert meta["facts"] == {"host local": {"host name": "$HOST"}, "host alpha": {"host name": "alpha"}}
    assert meta["run"] == RUN_ID


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("<pre>serve /mnt/models/llama --port 1</pre>", "/mnt/models/llama"),
        ("<i title=&#x27;/data/x.json&#x27;></i>", "/data/x.json"),
        (r'{"text": "a\n/workspace/a.py"}', "/workspace/a.py"),
        (f"ssh {HOST} uptime", HOST),
        ("token hf_" + "a" * 30, "a token"),
    ],
)
def test_what_is_left_of_a_host_is_refused(session: Made, tmp_path: Path, line: str, what: str) -> None:
    """An unknown path, the host's name or a token is refused with file and line, and nothing is written."""
    problems = refusal([session(page=line)], "two-gpus", into=tmp_path / "reference").problems
    assert [(problem.file, problem.key) for problem in problems] == [("report.html", "line 4")]
    assert problems[0].wrong.startswith(what)
    assert list((tmp_path / "reference").iterdir()) == []


def test_the_name_of_this_machine_is_looked_for(
    session: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that did not record its host's name is searched for that of the machine it lies on."""
    monkeypatch.setattr(socket, "gethostname", lambda: "bigbox12")
    (problem,) = refusal([session(page="on bigbox12 now")], "two-gpus", into=tmp_path / "reference").problems
    assert (problem.key, problem.wrong.split()[0]) == ("line 4", "bigbox12")


def test_a_further_path_can_be_replaced(session: Made, tmp_path: Path) -> None:
    """What the refusal names can be given a name."""
    folder = session(page="serve /mnt/models/llama")
    made = make([folder], "two-gpus", replace={"/mnt/models": "$MODELS"}, into=tmp_path / "reference")
    assert "serve $MODELS/llama" in (made / "report.html").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "/dev/shm/x",
        "see tests/root/x",
        "./tmp/x",
        "~/work",
        "a/home",
        "/v1/completions",
        "/tmpfs",
        "/workers",
    ],
)
def test_what_is_no_path_of_a_host_is_left_alone(text: str) -> None:
    """System paths, relative paths and addresses of an API are neither found nor replaced."""
    assert list(left(text, {"blade07"})) == []
    assert replaced(text, places([text])) == text


def test_circumstances_stand_in_the_readme(session: Made, tmp_path: Path) -> None:
    made = make(
        [session()], "two-gpus", into=tmp_path / "reference", notes=["Another session ran beside it."]
    )
    assert "\n\nAnother session ran beside it.\n\n## " in (made / "README.md").read_text()


def test_a_longer_folder_goes_before_its_beginning() -> None:
    """An environment within the repository is the environment; a folder that only begins alike is another."""
    server = ".venvs/vllm-0.30.0/bin/python -m vllm.entrypoints"
    text = f"/r/reports/{RUN_ID}/x /r/.venv/bin/vllm-router /r2/x /r/{server}"
    wanted = f"./reports/{RUN_ID}/x $VENV/bin/vllm-router /r2/x ./{server}"
    assert replaced(text, places([text])) == wanted


def test_a_session_that_failed_is_refused(session: Made, tmp_path: Path) -> None:
    """Failed tests are named in the refusal; where they are allowed, in the README."""
    folder, into = session(exitstatus=1), tmp_path / "reference"
    (problem,) = refusal([folder], "two-gpus", into=into).problems
    assert (problem.key, problem.wrong) == (
        "exitstatus",
        "1; failed: tests/disagg/test_x.py::test_y: Y holds",
    )
    readme = (make([folder], "two-gpus", allow_failures=True, into=into) / "README.md").read_text()
    assert "**This session failed** (exit status 1)" in readme
    assert "- tests/disagg/test_x.py::test_y: Y holds" in readme


@pytest.mark.parametrize(
    ("meta", "wrong"),
    [({"exitstatus": None}, "did not end"), ({"nothing_proved": True}, "no test by itself")],
)
def test_a_session_without_proof_is_refused(
    session: Made, tmp_path: Path, meta: dict[str, Any], wrong: str
) -> None:
    """A session that was killed, or in which every test was skipped, is no reference."""
    assert wrong in refusal([session(**meta)], "two-gpus", into=tmp_path).problems[0].wrong


def test_several_sessions_get_a_folder_each(session: Made, tmp_path: Path) -> None:
    """The README has a line and a section for every session, oldest first, and history finds them all."""
    other = "20261123-000000-beef"
    made = make([session(other), session()], "two-gpus", into=tmp_path / "all" / "reference")
    assert sorted(path.name for path in made.iterdir()) == [RUN_ID, other, "README.md"]
    lines = (made / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("## ")] == [f"## {RUN_ID}", f"## {other}"]
    assert any(line.startswith(f"| [{RUN_ID}]({RUN_ID}/report.html) | 2026-11-22") for line in lines)
    make([session("20261124-000000-cafe")], "one", into=tmp_path / "all" / "reference")
    found = archive.read(tmp_path / "all")
    assert [run.run_id for run in found.runs] == [RUN_ID, other, "20261124-000000-cafe"]
    assert found.problems == ()


@pytest.mark.parametrize("name", ["Two", "../x", "reports/latest", ""])
def test_a_name_is_a_plain_word(session: Made, tmp_path: Path, name: str) -> None:
    """A name that is a path, or none, is refused: the last argument is the name."""
    assert refusal([session()], name, into=tmp_path / "reference").problems[0].key == "NAME"


def test_a_reference_is_not_written_over(session: Made, tmp_path: Path) -> None:
    """A name that is taken is refused, and so is one session given twice."""
    folder, into = session(), tmp_path / "reference"
    assert refusal([folder, folder], "two-gpus", into=into).problems[0].wrong == "the same session twice"
    make([folder], "two-gpus", into=into)
    assert refusal([folder], "two-gpus", into=into).problems[0].wrong == "exists"


def test_a_session_is_small(session: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes than the limit are refused with both numbers."""
    monkeypatch.setattr(publish, "SESSION_LIMIT_BYTES", 1000)
    (problem,) = refusal([session()], "two-gpus", into=tmp_path / "reference").problems
    assert "more than 1,000 B" in problem.wrong


def test_damaged_files_are_named(session: Made, tmp_path: Path) -> None:
    """A missing page and a cut-off list are refused."""
    without, cut = session(), session("20261123-000000-beef")
    (without / "report.html").unlink()
    (cut / "figures.jsonl").write_text('{"workload": ')
    assert refusal([without], "a", into=tmp_path).problems[0].wrong == "missing"
    assert "damaged" in refusal([cut], "a", into=tmp_path).problems[0].wrong


def test_the_command_makes_a_reference(
    session: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m disagglab reference`` prints the folder; a mistake is one line and exit status 2."""
    monkeypatch.setattr(publish, "make", lambda *args, notes: print(*args[1:], *notes) or tmp_path)
    folder = str(session())
    assert main(["reference", folder, folder, "two-gpus", "--replace", "/mnt=$M"]) == 0
    assert capsys.readouterr().out.splitlines() == ["two-gpus False {'/mnt': '$M'}", str(tmp_path)]
    for wrong in (["/mnt"], ["=a=b"], ["=b"], ["/mnt=$M", "/mnt=$N"]):
        options = [part for text in wrong for part in ("--replace", text)]
        assert main(["reference", folder, "two-gpus", *options]) == 2, wrong
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "TEXT=BY is wanted" in err
    assert main(["reference", folder, "two-gpus", "--replace", "a=b=c", "--replace", "/d="]) == 0
    assert capsys.readouterr().out.startswith("two-gpus False {'a': 'b=c', '/d': ''}")


def test_committed_references_hold_nothing_of_a_host() -> None:
    """What lies in reports/reference of this checkout passes the same search, and git does not ignore it."""
    assert list(check(ROOT / "reports" / "reference", {HOST})) == []
    asked = [
        "git",
        "-C",
        str(ROOT),
        "check-ignore",
        "-q",
        "reports/reference/x/20261122-053423-a773/run.json",
    ]
    assert subprocess.run(asked).returncode == 1

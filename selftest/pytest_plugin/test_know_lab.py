"""The hosts' survey completes the session's fingerprint, and refuses to resume sessions of another lab.

Oracle: surveys that differ in the model of one GPU, behind the same machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagglab.config.labs import load_lab
from disagglab.errors import ConfigError
from disagglab.hosts import identity
from disagglab.hosts.facts import title_of
from disagglab.pytest_plugin.fixtures import know_lab
from disagglab.results import fingerprint, resume
from disagglab.results.run_folder import Store

LAB = load_lab("two-gpus")
MACHINE = fingerprint.of_machine(LAB.vllm.version)


def survey(card: str) -> dict[str, dict[str, str]]:
    """What the hosts tell, with this GPU in every node."""
    nodes = {title_of(node): {f"GPU {gpu} name": card for gpu in node.gpus} for node in LAB.nodes}
    return {"host local": {"memory": "503.8 GiB", "host name": "here"}, **nodes}


def session(folder: Path, card: str) -> Any:
    """A session that resumes one on nodes with such a GPU."""
    store = Store.create(folder, "run")
    store.write_meta(fingerprint=MACHINE)
    theirs = fingerprint.of_lab(MACHINE, identity.of(LAB, survey(card)))
    return SimpleNamespace(
        lab=LAB, store=store, earlier=resume.Earlier(fingerprints={"before/run.json": theirs})
    )


def test_the_fingerprint_is_completed_by_the_survey(tmp_path: Path) -> None:
    """``run.json`` has it, with the facts as they were read beside it."""
    live = session(tmp_path, "H100")
    know_lab(live, survey("H100"))
    meta = json.loads((live.store.folder / "run.json").read_text())
    assert fingerprint.complete(meta["fingerprint"])
    assert meta["fingerprint"]["key"] != MACHINE["key"]
    assert meta["facts"]["host local"]["host name"] == "here"


def test_a_session_on_other_gpus_is_not_resumed(tmp_path: Path) -> None:
    """The fixture of the hosts fails, so nothing is started on them; both values are said."""
    live = session(tmp_path, "H100")
    with pytest.raises(ConfigError) as caught:
        know_lab(live, survey("H200"))
    assert "before/run.json" in str(caught.value)
    assert "H100 there, H200 here" in str(caught.value)

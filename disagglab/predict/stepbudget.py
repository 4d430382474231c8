"""How many tokens and sequences a step of a lab's servers holds: as its file says, else as vLLM chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from disagglab.config.schema import Lab
from disagglab.errors import ConfigError, Problem
from disagglab.predict.speeds import Limits

TOKENS, SEQUENCES = "max-num-batched-tokens", "max-num-seqs"
# vLLM 0.31.0, vllm/engine/arg_utils.py, ``get_batch_defaults`` for UsageContext.OPENAI_API_SERVER. A lab file
# does not say how much memory a GPU has, so it is taken for one of 70 to 160 GiB that is not an A100 (H100,
# H200, GB10).
GPU_TOKENS, GPU_SEQUENCES = 8192, 1024
SMALL_GPU_TOKENS, SMALL_GPU_SEQUENCES, LARGE_GPU_TOKENS = 2048, 256, 16384
CPU_TOKENS, CPU_SEQUENCES = 2048, 128  # each times the ranks of a server
# vLLM reads 2k as 2,000 and 2K as 2,048 (vllm/utils/argparse_utils.py, ``human_readable_int``).
UNITS = {"": 1, "k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}

Args = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class StepBudget:
    """``tokens``: prompt tokens and decoding sequences of a step, at most; ``sequences``: under way.

    ``said``: the tokens and where their number comes from, in words.
    """

    tokens: int
    sequences: int
    said: str

    @property
    def limits(self) -> Limits:
        """As the models take it."""
        return Limits(self.tokens, self.sequences)


def of_lab(
    lab: Lab, args: Mapping[str, str | int | float | bool] | None = None, ranks: int = 1
) -> StepBudget:
    """What servers of a lab let into a step.

    Args:
        args: options over those of ``[vllm.args]``, of one way or role.
        ranks: over which a server is spread; vLLM's defaults on CPUs grow with them.

    Raises:
        ConfigError: if one of the two options is no whole number of 1 or more, or fewer tokens than sequences
            are asked for, which vLLM refuses.
    """
    given = {**lab.vllm.args, **(args or {})}
    gpus = any(node.gpus for node in lab.nodes)
    tokens = GPU_TOKENS if gpus else CPU_TOKENS * ranks
    sequences = GPU_SEQUENCES if gpus else CPU_SEQUENCES * ranks
    if TOKENS in given:
        tokens = _number(lab, TOKENS, given[TOKENS])
        said = f"{TOKENS} is {tokens:,}, as the lab file says"
    elif given.get("enable-chunked-prefill") is False:
        tokens = max(tokens, lab.model.max_model_len)
        said = f"{TOKENS} is {tokens:,}, vLLM's default without chunked prefill"
    elif gpus:
        said = (
            f"{TOKENS} is {tokens:,}, vLLM's default for a server on GPUs of 70 to 160 GiB; where it is"
            f" another ({SMALL_GPU_TOKENS:,} below and on an A100, {LARGE_GPU_TOKENS:,} above), write it into"
            " [vllm.args]"
        )
    else:
        said = f"{TOKENS} is {tokens:,}, vLLM's default for a server on CPUs"
    if SEQUENCES in given:
        sequences = _number(lab, SEQUENCES, given[SEQUENCES])
        if TOKENS in given and tokens < sequences:
            wrong = f"{tokens:,} is less than {SEQUENCES}, {sequences:,}; vLLM refuses that"
            raise _refused(lab, TOKENS, wrong, f"write {sequences} or more, or lower {SEQUENCES}")
    if TOKENS not in given:
        tokens = min(tokens, sequences * lab.model.max_model_len)
    return StepBudget(tokens, min(sequences, tokens), said)


def _number(lab: Lab, key: str, value: str | float) -> int:
    match = re.fullmatch(r"(\d+)([kmKM]?)", str(value).strip())
    scaled = match is not None and (key == TOKENS or not match[2])  # vLLM reads units for the tokens alone
    found = int(match[1]) * UNITS[match[2]] if match and scaled else 0
    if isinstance(value, bool) or found < 1:
        raise _refused(lab, key, f"{value!r} is not a whole number of 1 or more", "write one such as 512")
    return found


def _refused(lab: Lab, key: str, wrong: str, mend: str) -> ConfigError:
    return ConfigError([Problem(lab.where("vllm.args"), key, wrong, mend)])

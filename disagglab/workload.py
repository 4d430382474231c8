"""Workload files: what is asked of a topology."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disagglab.errors import ConfigError, Problem

WORKLOADS_FOLDER = Path(__file__).resolve().parent.parent / "workloads"


class Workload(BaseModel):
    """One closed-loop workload of random prompts with exact lengths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    prompt_tokens: int = Field(ge=1, description="length of every prompt, tokens")
    output_tokens: int = Field(ge=2, description="length of every answer, tokens (exact: ignore_eos)")
    concurrency: int = Field(ge=1, description="requests under way at once")
    requests: int = Field(ge=1, description="requests of one run")

    @property
    def tokens(self) -> int:
        """Prompt and output of one request, tokens."""
        return self.prompt_tokens + self.output_tokens


def load_workload(name: str) -> Workload:
    """Read ``workloads/NAME.toml``.

    Raises:
        ConfigError: with every problem of the file.
    """
    path = WORKLOADS_FOLDER / f"{name}.toml"
    try:
        return Workload.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in WORKLOADS_FOLDER.glob("*.toml")))
        raise ConfigError([Problem(str(path), "(whole file)", "missing", f"use one of {known}")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([Problem(str(path), "(whole file)", f"not TOML: {error}", "correct it")]) from error
    except ValidationError as error:
        problems = [
            Problem(str(path), ".".join(map(str, row["loc"])), row["msg"], "correct the value")
            for row in error.errors()
        ]
        raise ConfigError(problems) from error

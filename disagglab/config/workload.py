"""Workload files: what is asked of a topology, at full size; a lab scales it to what it can do."""

from __future__ import annotations

import hashlib
import tomllib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from disagglab.errors import ConfigError, Problem
from disagglab.paths import WORKLOADS
from disagglab.problems import problems_of
from disagglab.units import Seconds, Tokens, Unit

NOT_FOR_FILES: dict[str, JsonValue] = {"file": False}
CHUNK = 64  # tokens; prompts are built of such pieces, so a shared prefix is a multiple of it


class Steady(BaseModel):
    """Requests that decode while the others arrive; all are sent at the beginning of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: Tokens = Field(ge=1, description="length of every prompt")
    output_tokens: Tokens = Field(ge=2, description="length of every answer")
    requests: int = Field(ge=1, description="requests that decode all along")
    lead_s: Seconds = Field(ge=0, description="their head start over the other arrivals; not scaled")


class Workload(BaseModel):
    """One workload of random prompts with exact lengths.

    Closed loop: ``concurrency`` requests are under way at once. Open loop: requests arrive as a Poisson
    process of ``rate_per_s``, whether or not earlier ones have been answered. Exactly one of the two is set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="that of the file, without .toml")
    prompt_tokens: Tokens = Field(ge=1, description="length of every prompt")
    output_tokens: Tokens = Field(ge=2, description="length of every answer, exact (ignore_eos)")
    requests: int = Field(ge=1, description="requests of one run, without the steady ones")
    concurrency: int | None = Field(None, ge=1, description="requests under way at once (closed loop)")
    rate_per_s: Annotated[float, Unit("1/s")] | None = Field(
        None, gt=0, description="mean arrivals per second (open loop)"
    )
    rate_shares: tuple[float, ...] = Field(
        (), description="rates of a sweep, as shares of the capacity that a closed loop finds first"
    )
    shared_prefix_tokens: Tokens = Field(
        0, ge=0, multiple_of=CHUNK, description="beginning that all prompts share; less than prompt_tokens"
    )
    steady: Steady | None = Field(None, description="requests that decode while the others arrive")
    length: int | None = Field(
        None,
        ge=1,
        description="requests of a run that a plan of trials made shorter or longer; not for files",
        json_schema_extra=NOT_FOR_FILES,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ValueError("give either concurrency (closed loop) or rate_per_s (open loop)")
        if self.steady is not None and self.rate_per_s is None:
            raise ValueError("[steady] wants rate_per_s: the others arrive while the steady ones decode")
        if self.shared_prefix_tokens >= self.prompt_tokens:
            raise ValueError("shared_prefix_tokens must be less than prompt_tokens")
        if any(share <= 0 for share in self.rate_shares):
            raise ValueError("rate_shares must be positive")
        if self.length is not None and self.concurrency is None:
            raise ValueError("length is for a closed loop: another one would change what an open loop is")
        return self

    @property
    def definition(self) -> str:
        """Short hash of all that a figure of it depends on, so without the length of its runs."""
        return hashlib.sha256(self.model_dump_json(exclude={"length"}).encode()).hexdigest()[:8]

    @property
    def tokens(self) -> int:
        """Prompt and output of the longest request, tokens."""
        steady = self.steady.prompt_tokens + self.steady.output_tokens if self.steady else 0
        return max(self.prompt_tokens + self.output_tokens, steady)

    @property
    def run_requests(self) -> int:
        """Requests of one run, without the steady ones."""
        return self.length or self.requests

    @property
    def total_requests(self) -> int:
        """All requests of one run."""
        return self.run_requests + (self.steady.requests if self.steady else 0)

    @property
    def most_under_way(self) -> int:
        """The most requests that can be under way at once."""
        return self.total_requests if self.concurrency is None else min(self.concurrency, self.run_requests)

    def scaled(self, prompt: float, output: float, requests: float, rate: float, steady: float) -> Workload:
        """The workload on a lab that is smaller, or larger, than the one it was written for.

        Args:
            prompt: factor of all prompt lengths; a shared prefix stays a multiple of CHUNK.
            output: factor of the answers' lengths.
            requests: factor of requests and concurrency.
            rate: factor of the arrival rate.
            steady: factor of the lengths of steady answers, so that they last as long as the others arrive.
        """

        def times(factor: float, value: int, least: int = 1) -> int:
            return max(least, round(factor * value))

        changes: dict[str, object] = {
            "prompt_tokens": times(prompt, self.prompt_tokens),
            "output_tokens": times(output, self.output_tokens, 2),
            "requests": times(requests, self.requests),
            "shared_prefix_tokens": int(prompt * self.shared_prefix_tokens) // CHUNK * CHUNK,
        }
        if self.concurrency is not None:
            changes["concurrency"] = times(requests, self.concurrency)
        if self.rate_per_s is not None:
            changes["rate_per_s"] = rate * self.rate_per_s
        if self.steady is not None:
            changes["steady"] = self.steady.model_copy(
                update={
                    "prompt_tokens": times(prompt, self.steady.prompt_tokens),
                    "output_tokens": times(steady, self.steady.output_tokens, 2),
                    "requests": times(requests, self.steady.requests),
                }
            )
        return self.model_copy(update=changes)

    def of_length(self, requests: int) -> Workload:
        """The same closed loop, with so many requests a run."""
        return self.model_copy(update={"length": None if requests == self.requests else requests})

    def at_rate(self, rate_per_s: float) -> Workload:
        """The same requests in an open loop."""
        return self.model_copy(update={"concurrency": None, "rate_per_s": rate_per_s, "length": None})


def load_workload(name: str) -> Workload:
    """Read ``workloads/NAME.toml``, at full size.

    Raises:
        ConfigError: with every problem of the file.
    """
    path = WORKLOADS / f"{name}.toml"
    try:
        raw = tomllib.loads(path.read_text())
        found = Workload.model_validate(raw)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in WORKLOADS.glob("*.toml")))
        raise ConfigError([Problem(str(path), "(whole file)", "missing", f"use one of {known}")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([Problem(str(path), "(whole file)", f"not TOML: {error}", "correct it")]) from error
    except ValidationError as error:
        raise ConfigError(problems_of(error, str(path), Workload)) from error
    if "length" in raw:
        wrong = "chosen by the plan of trials of a session, not by a file"
        raise ConfigError([Problem(str(path), "length", wrong, "leave it out, and give requests")])
    return found

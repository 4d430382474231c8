"""The section of a lab file that describes a way to use its nodes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from disagglab.config.head import Section


class RoleSection(Section):
    """What the servers of one role have of their own in a way of kind `disaggregated`, such as
    `prefill = { nodes = ["a"], args = { max-num-batched-tokens = 8192 } }`.
    """

    nodes: list[str] = Field(
        default=[], description="names of the nodes that play the role; empty: those that have it in [[node]]"
    )
    args: dict[str, str | int | float | bool] = Field(
        default={}, description="options of this role alone; win over args of the way"
    )
    env: dict[str, str] = Field(
        default={}, description="environment of this role alone; wins over env of the way"
    )

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.nodes or self.args or self.env)


class WaySection(Section):
    """A way to use the lab's nodes that `pytest --way NAME` measures beside the lab's own settings."""

    kind: Literal["single", "replicated", "disaggregated", "sharded"] = Field(
        "disaggregated",
        description="single: the first prefill node alone; replicated: equal servers, round robin;"
        " disaggregated: prefill and decode apart; sharded: one server, tensor parallel over all nodes",
    )
    name: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9-]*)?$",
        description="it is called KIND@NAME in reports; may be absent of a sharded way alone, called sharded",
    )
    what: str = Field(min_length=1, description="what is changed, in words")
    expects: str = Field(
        min_length=1, description="what it should do, written before it was measured; reports show it"
    )
    transport: dict[str, Any] = Field(
        default={},
        description="keys of [transport] that differ; env and extra merge key by key; disaggregated only",
    )
    args: dict[str, str | int | float | bool] = Field(
        default={}, description="options that differ from [vllm.args], or are added to them"
    )
    env: dict[str, str] = Field(
        default={}, description="environment that differs from [vllm.env], or is added to it"
    )
    prefill: RoleSection = Field(
        default=RoleSection(), description="of the servers that prefill: nodes, args, env; disaggregated only"
    )
    decode: RoleSection = Field(
        default=RoleSection(), description="of the servers that decode: nodes, args, env; disaggregated only"
    )

    @property
    def arm(self) -> str:
        """What it is called in reports, `replicated@chunk-128`."""
        return f"{self.kind}@{self.name}" if self.name else self.kind

    @property
    def roles(self) -> dict[str, RoleSection]:
        """By the role's name."""
        return {"prefill": self.prefill, "decode": self.decode}

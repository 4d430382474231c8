"""What stands at the top of a lab file, and what its sections have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Head(Section):
    """What stands at the top of the file, before any section.

    With `extends = "two-h200"` a lab file says only what differs. It names another lab: one of `labs/` by its
    name, or any file by a path ending in `.toml`, which starts at the folder of the file that says it.
    Parents may extend others in turn. `name` and `label` are not inherited; of all the rest:

    - Tables are merged, key by key and at every depth: `[vllm.args] block-size = 128` changes this option
      and keeps the others.
    - Lists take the parent's place as a whole: `cpus = [0, 1]`, and all sections of one kind that are written
      with two brackets. A file with one `[[node]]` has one node, whatever its parent has.
    - `[]` empties. `gate = []` leaves no gate, and likewise a table or a value is taken away: `slo = []`
      leaves no `[slo]`, `block-size = []` in `[vllm.args]` leaves the option out. As TOML has it, `gate = []`
      and `slo = []` stand at the top of the file, before its first section.

    A folder that an inherited `model.id` or `model.tokenizer` names, starting with `.`, stays the one beside
    the file that names it. What is checked is the result; a mistake is reported with the file in which its
    key stands.
    """

    name: str = Field(
        min_length=1, description="short name, at the top of the file; names the folder of benchmark storage"
    )
    label: str = Field("", description="one line for report and terminal")
    extends: str | None = Field(
        None, min_length=1, description="a lab whose keys hold where this file has no other"
    )

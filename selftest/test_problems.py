"""What pydantic finds in an input file, as users read it: key, what is wrong, what mends it."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from disagglab.problems import problems_of
from disagglab.units import Seconds, Unit, meaning_of, unit_of


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lead_s: Seconds = Field(ge=0, description="head start")


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(ge=1, description="how many")
    rate: Annotated[float, Unit("1/s")] | None = Field(None, gt=0, description="how often")
    cores: list[int] = []
    args: dict[str, str | int | bool] = {}
    inner: Inner | None = None

    @model_validator(mode="after")
    def _together(self) -> Outer:
        if self.rate == self.count:
            raise ValueError("rate and count are the same")
        return self


@pytest.mark.parametrize(
    ("changes", "key", "wrong", "mend"),
    [
        ({"count": 0}, "[t].count", "greater than or equal to 1, got 0", "the value of count (how many)"),
        ({"count": ...}, "[t].count", "missing", "add count = … (how many)"),
        ({"rate": -1}, "[t].rate", "got -1", "correct the value of rate (how often, 1/s)"),
        ({"cuont": 1}, "[t].cuont", "unknown key", "did you mean count?"),
        ({"zzz": 1}, "[t].zzz", "unknown key", "known keys: args, cores, count, inner, rate"),
        ({"cores": [0, "x"]}, "[t].cores[1]", "got 'x'", "correct the value of cores"),
        ({"args": {"a": [1]}}, "[t].args.a", "neither text, number nor true or false, got [1]", "value of a"),
        ({"inner": {}}, "[t].inner.lead_s", "missing", "add lead_s = … (head start, s)"),
        ({"inner": {"lead_s": 1, "lead": 2}}, "[t].inner.lead", "unknown key", "did you mean lead_s?"),
        ({"inner": 5}, "[t].inner", "not a table", "write a table with these keys: lead_s"),
        ({"rate": 2.0}, "[t]", "rate and count are the same", "correct the values"),
        ({"args": {"a": "x"}, "cores": "y" * 99}, "[t].cores", "y…", "correct the value of cores"),
    ],
)
def test_one_mistake_is_one_problem(changes: dict[str, Any], key: str, wrong: str, mend: str) -> None:
    """Nested keys, list positions, types that may be several: each mistake once, under its own key."""
    raw = {name: value for name, value in {"count": 2, **changes}.items() if value is not ...}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(raw)
    (problem,) = problems_of(caught.value, "my.toml", Outer, "[t]")
    assert (problem.file, problem.key) == ("my.toml", key)
    assert problem.wrong.endswith(wrong)
    assert problem.mend.endswith(mend)


def test_all_mistakes_come_at_once_and_may_share_a_mend() -> None:
    """Of a file that nobody writes by hand the caller says what mends it; without a place it is the file."""
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"count": "x", "rate": "y"})
    found = problems_of(caught.value, "run.json", mend="delete it")
    assert [(problem.key, problem.mend) for problem in found] == [
        ("count", "delete it"),
        ("rate", "delete it"),
    ]
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"count": 1, "rate": 1.0})
    assert [problem.key for problem in problems_of(caught.value, "run.json")] == ["(whole file)"]


def test_units_stand_behind_the_meaning() -> None:
    """A unit is found beside a type, and inside one that may be absent."""
    assert unit_of(Inner.model_fields["lead_s"]) == "s"
    assert unit_of(Outer.model_fields["rate"]) == "1/s"
    assert unit_of(Outer.model_fields["count"]) == ""
    assert meaning_of(Outer.model_fields["rate"]) == "how often, 1/s"
    assert meaning_of(Outer.model_fields["count"]) == "how many"

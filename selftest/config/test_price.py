"""The section [price] of a lab file: one of two prices, or none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagglab.config import inherit
from disagglab.config.labs import load_lab, parse_lab
from disagglab.config.schema import Lab
from disagglab.errors import ConfigError

EMBEDDED = load_lab("embedded")


def parsed(price: dict[str, Any]) -> Lab:
    return parse_lab(inherit.read(Path(EMBEDDED.file)).table | {"price": price}, "made.toml")


def test_a_lab_needs_no_price() -> None:
    assert EMBEDDED.price is None


def test_a_price_is_read() -> None:
    found = parsed({"per_node_hour": 1.5, "currency": "EUR"}).price
    assert found is not None
    assert (found.per_node_hour, found.per_gpu_hour, found.currency) == (1.5, None, "EUR")


@pytest.mark.parametrize(
    ("price", "said"),
    [
        ({"currency": "EUR"}, "either per_node_hour or per_gpu_hour"),
        ({"per_node_hour": 1, "per_gpu_hour": 1, "currency": "EUR"}, "either per_node_hour or per_gpu_hour"),
        ({"per_node_hour": 0, "currency": "EUR"}, "per_node_hour"),
        ({"per_node_hour": 1, "currency": "euro"}, "currency"),
        ({"per_node_hour": 1}, "currency"),
    ],
)
def test_a_mistake_is_named_with_its_key(price: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(price)
    (problem,) = refused.value.problems
    assert problem.file == "made.toml"
    assert said in f"{problem.key} {problem.wrong} {problem.mend}"
    assert "price" in problem.key

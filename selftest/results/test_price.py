"""Prices: what a way costs in an hour."""

from __future__ import annotations

import pytest

from disagglab.config.price import PriceSection
from disagglab.results.footprint import Footprint
from disagglab.results.price import Price

TWO_NODES = Footprint(2, 8, 4, 4)
CPUS = Footprint(2, 0, 0, 0)


def test_a_way_costs_all_that_it_occupies() -> None:
    assert Price(2.5, "gpu", "EUR").of(TWO_NODES) == 20.0
    assert Price(8.0, "node", "EUR").of(TWO_NODES) == 16.0
    assert Price(2.5, "gpu", "EUR").of(CPUS) is None, "no GPU is no cost of 0"


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("2.5EUR/gpu-hour", Price(2.5, "gpu", "EUR")),
        ("8 usd / node-hour", Price(8.0, "node", "USD")),
        ("8USD/NODEHOUR", Price(8.0, "node", "USD")),
    ],
)
def test_a_price_as_people_write_it(text: str, price: Price) -> None:
    assert Price.parse(text) == price


@pytest.mark.parametrize(
    "text", ["", "2.5", "2.5 EUR", "0 EUR/gpu-hour", "-1EUR/gpu-hour", "2 EUROS/gpu-hour"]
)
def test_what_is_no_price(text: str) -> None:
    assert Price.parse(text) is None


def test_the_price_of_a_lab_file() -> None:
    assert Price.of_section(PriceSection(per_gpu_hour=2, currency="EUR")) == Price(2.0, "gpu", "EUR")
    assert Price.of_section(PriceSection(per_node_hour=3, currency="EUR")) == Price(3.0, "node", "EUR")
    assert Price.of_section(None) is None
    assert str(Price(2.0, "gpu", "EUR")) == "2 EUR/gpu-hour"

"""Differences between two releases, and the refusal of one that does not show what the ledger counts."""

from __future__ import annotations

import dataclasses

import pytest

from disagglab.errors import InvalidRun
from disagglab.measure import ledger
from disagglab.serving.release_diff import Behaviour, compare, family_of, options_of, require_metrics

FAMILIES = {family_of(name): "counter" for name in ledger.METRICS}
OLD = Behaviour("0.30.0", FAMILIES, frozenset({"--host", "--gone"}), {"remote_host": "str", "tp_size": "int"})


def test_what_appeared_vanished_or_changed() -> None:
    """Each part tells its own differences; what is equal is not mentioned."""
    new = Behaviour(
        "0.31.0", FAMILIES, frozenset({"--host", "--new"}), {"remote_host": "str", "tp_size": "str"}
    )
    metrics, options, fields = compare(OLD, new)
    assert (metrics.appeared, metrics.vanished, metrics.altered) == ((), (), ())
    assert (options.appeared, options.vanished) == (("--new",), ("--gone",))
    assert fields.altered == ("tp_size",)


def test_a_release_with_every_metric_is_accepted() -> None:
    """What the ledger needs is there: no error, whatever else there is."""
    require_metrics(dataclasses.replace(OLD, metrics={**FAMILIES, "vllm:other": "gauge"}), ledger.METRICS)


@pytest.mark.parametrize("name", ledger.METRICS)
def test_a_renamed_metric_is_an_error(name: str) -> None:
    """The message names what is missing and what it may be called now."""
    renamed = {
        family if family != family_of(name) else f"{family}_v2": kind for family, kind in FAMILIES.items()
    }
    with pytest.raises(InvalidRun, match=rf"0\.30\.0 exposes no .*{name} \(there is {family_of(name)}_v2\)"):
        require_metrics(dataclasses.replace(OLD, metrics=renamed), ledger.METRICS)


def test_options_are_read_from_the_help() -> None:
    """Names alone: not values, not words with dashes in running text."""
    text = "  --host HOST, --no-enable-x\n  --port PORT  see non--option\n  -O.level"
    assert options_of(text) == {"--host", "--no-enable-x", "--port"}

"""Each way is tuned: the same options, equally many trials, the same objective; winners run again.

The oracle for equal effort is the record of the search (``tuning.json``): every trial with its seed, figures
and, where it is out, why. The oracle for a winner is a run on prompts that nothing was chosen by.
"""

from __future__ import annotations

import pytest

from disagglab.config import way
from disagglab.config.labs import load_lab
from disagglab.config.schema import Lab
from disagglab.config.search_space import TuningSection
from disagglab.results import search_figures, search_record, tuned_lab
from disagglab.results.recorder import Recorder
from disagglab.results.run_folder import Store
from disagglab.results.search_record import Search

pytestmark = pytest.mark.lab_has("tuning", "slo")


def test_every_way_is_tuned_with_equal_effort(
    searched: Search, tuning: TuningSection, store: Store, record: Recorder
) -> None:
    """Settings, runs and starts asked for are equal for every kind of way, by the record of the search.

    The settings of all kinds have the same engine options, drawn once. Where a server did not come up or a
    run was invalid, the record says so; it takes nothing from the others.
    """
    searched.require_equal_effort()
    assert set(searched.settings) == set(tuning.kinds)
    assert {len(each) for each in searched.settings.values()} == {tuning.settings}
    assert search_record.read(store.folder) == searched
    search_figures.record(record, searched, str(store.meta["command"]))


def test_winners_are_confirmed_on_fresh_prompts(searched: Search, record: Recorder) -> None:
    """No confirmation has a seed of the search, and no winner that is behind the lab's own setting there is
    picked. What the search promised beyond what is confirmed was its luck.
    """
    chosen_by = {trial.seed for trial in searched.trials if not trial.confirms}
    fresh = {trial.seed for trial in searched.trials if trial.confirms}
    assert not chosen_by & fresh
    for one in searched.outcomes:
        assert one.pick is not None, f"{one.kind}: {one.why}"
        if one.confirmed is None or one.found is None:
            assert one.pick == searched.settings[one.kind][0] or "nothing confirms" in one.why, one.why
            continue
        behind = one.confirmed.behind(searched.open_loop)
        assert (one.pick == one.winner) != behind, f"{one.kind}: {one.why}"
        for what, gain in (("found", one.found), ("confirmed", one.confirmed)):
            for name, value in (("good requests/s", gain.good_per_s), ("p99 ITL", gain.itl_p99)):
                if value is not None:
                    record.numbers(
                        f"winner / own setting, {name}, {what}", [value], "ratio", arm=one.kind, note=one.why
                    )


def test_tuned_lab_can_be_served(searched: Search, lab: Lab, store: Store) -> None:
    """``tuned.toml`` loads as a lab; its ways are the picks, and its gates ask for the best of the others."""
    found = load_lab(str(store.folder / tuned_lab.FILE))
    picks = {one.kind: one.pick for one in searched.outcomes if one.pick is not None}
    for section in found.ways:
        assert section.name == tuned_lab.NAME
        assert dict(picks[section.kind].args).items() <= section.args.items()
        way.changed(found, section)
    changed = {kind for kind, pick in picks.items() if not pick.own or kind == way.SHARDED}
    assert {section.kind for section in found.ways} == changed
    against = [gate for gate in found.gates if gate.baseline is not None]
    assert {gate.baseline for gate in against} <= {tuned_lab.BEST}
    assert len(found.gates) <= len(lab.gates)

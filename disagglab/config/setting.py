"""A setting that a way tries, and a candidate: a way with its setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from disagglab.config.search_space import Value
from disagglab.config.way import DISAGGREGATED, SHARDED
from disagglab.config.way_section import WaySection

Options = tuple[tuple[str, Value], ...]
OWN_WORDS = "the lab's own"


@dataclass(frozen=True)
class Setting:
    """What a way has in place of the lab's own settings; empty: nothing.

    Options are pairs in the order of their names (:func:`options`), so that equal settings are equal. The
    keys of ``transport`` are dotted, as ``extra.num_threads``. ``prefill_nodes``, ``decode_nodes``: names;
    empty: the lab's roles. All but ``args`` is for disaggregated serving.
    """

    args: Options = ()
    prefill_args: Options = ()
    decode_args: Options = ()
    transport: Options = ()
    prefill_nodes: tuple[str, ...] = ()
    decode_nodes: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it changes nothing."""
        return self == Setting()

    @property
    def common(self) -> Setting:
        """What of it every kind of way can have."""
        return Setting(self.args)

    @property
    def beside(self) -> Setting:
        """The rest of it, which disaggregated serving alone can have."""
        return dataclasses.replace(self, args=())

    @property
    def words(self) -> str:
        """For tables: ``block-size 64, max-num-seqs 32; prefill: max-num-batched-tokens 2048``."""
        parts = [_listed(self.args)] if self.args else []
        for name, pairs in (
            ("prefill", self.prefill_args),
            ("decode", self.decode_args),
            ("transport", self.transport),
        ):
            if pairs:
                parts.append(f"{name}: {_listed(pairs)}")
        if self.prefill_nodes:
            parts.append(f"{len(self.prefill_nodes)}P{len(self.decode_nodes)}D")
        return "; ".join(parts) or OWN_WORDS

    def table(self, kind: str, name: str, what: str, expects: str) -> dict[str, Any]:
        """The ``[[way]]`` of a lab file that is this setting."""
        found: dict[str, Any] = {"kind": kind, "name": name, "what": what, "expects": expects}
        if self.args:
            found["args"] = dict(self.args)
        if self.transport:
            found["transport"] = nested(dict(self.transport))
        for role, pairs, nodes in (
            ("prefill", self.prefill_args, self.prefill_nodes),
            ("decode", self.decode_args, self.decode_nodes),
        ):
            own: dict[str, Any] = {"nodes": list(nodes)} if nodes else {}
            if pairs:
                own["args"] = dict(pairs)
            if own:
                found[role] = own
        return found

    def way(self, kind: str, name: str, what: str, expects: str) -> WaySection:
        """The same as a section.

        Raises:
            ValidationError: if kind or name is none that a way may have.
        """
        return WaySection.model_validate(self.table(kind, name, what, expects))


@dataclass(frozen=True)
class Candidate:
    """A kind of way with a setting.

    Raises:
        ValueError: if the setting has what only disaggregated serving can have, and the kind is another.
    """

    kind: str
    setting: Setting

    def __post_init__(self) -> None:
        if self.kind != DISAGGREGATED and self.setting != self.setting.common:
            raise ValueError(f"{self.kind} with a setting of {DISAGGREGATED}: {self.setting.words}")

    @property
    def words(self) -> str:
        """For messages."""
        return f"{self.kind}: {self.setting.words}"


StartKey = tuple[str, Setting]


def start_key(candidate: Candidate) -> StartKey:
    """Equal for candidates that the same servers can play.

    A sharded way has a server of its own. The others have one server a node, with a KV connector whether or
    not it is used, so that ``single`` and ``replicated`` can be played by the servers of a disaggregated way
    that has no options of a role, no transport and no roles of its own.
    """
    return (SHARDED if candidate.kind == SHARDED else "a server a node", candidate.setting)


def options(table: Mapping[str, Value]) -> Options:
    """A table as pairs in the order of their names."""
    return tuple(sorted(table.items()))


def without(table: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """The options that differ from those below them."""
    return {key: value for key, value in table.items() if key not in own or own[key] != value}


def nested(dotted: Mapping[str, Value]) -> dict[str, Any]:
    """Keys such as ``extra.num_threads`` as tables in a table."""
    found: dict[str, Any] = {}
    for key, value in dotted.items():
        head, _dot, rest = key.partition(".")
        if rest:
            found.setdefault(head, {})[rest] = value
        else:
            found[head] = value
    return found


def _listed(pairs: Options) -> str:
    return ", ".join(
        f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in pairs
    )

"""Pages of docs/reference that say what the code says: made from the schema, the parsers and the Makefile.

    python docs/generate.py            writes them
    python docs/generate.py --check    exit status 1 if one is not what would be written

A page comes from the template beside it, ``PAGE.in``: a line ``<!-- NAME -->`` stands for a generated part.
The text depends on neither the terminal's width nor the version of Python: argparse is asked for its options,
not for its help.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from disagglab.cli import main as command_line
from disagglab.config import inherit, labs
from disagglab.config.head import Head
from disagglab.config.schema import ScaleSection
from disagglab.config.workload import NOT_FOR_FILES, Workload, load_workload
from disagglab.paths import LABS, ROOT, WORKLOADS
from disagglab.pytest_plugin import options
from disagglab.units import unit_of

FOLDER = ROOT / "docs" / "reference"
PAGES = ("lab-file.md", "commands.md")
COMMAND = "python docs/generate.py"
COLUMNS = 120
GROUPED = 100_000  # from here on digits stand in groups; ports are no such numbers
MARKER = re.compile(r"<!-- ([a-z :_]+) -->")
# What is code in a description that also stands in messages, and so has no marks of its own.
CODE = re.compile(
    r"\[\[\w+\]\]|\[[a-z][\w.]*\]|(?<![\w-])--[\w-]+(?:=[A-Z]+)?|~/[\w./*-]+|package:NAME|\b\w+@NAME\b"
    r"|\b[a-z]\w*_[\w*]+|\b[A-Z]{2,}_[A-Z_]*\*?"
)
PATTERNS = {r"^\d+\.\d+\.\d+$": "X.Y.Z"}
PLAIN = {str: "text", int: "integer", float: "number", bool: "boolean"}
PLURAL = {str: "texts", int: "integers", float: "numbers"}


class Stale(Exception):
    """A template and the code do not fit."""


# Keys of lab and workload files


def sections() -> dict[str, tuple[type[BaseModel], str, str]]:
    """Model, heading and a word on how often it may stand in a file, by marker."""
    found: dict[str, tuple[type[BaseModel], str, str]] = {
        "head": (Head, "### Top of the file", ""),
        "workload": (Workload, "", ""),
    }
    for key, (model, required) in labs.SECTIONS.items():
        found[key] = (model, f"### `[{key}]`", "Required." if required else "")
    for key, model in labs.OPTIONAL.items():
        found[key] = (model, f"### `[{key}]`", "")
    for key, (model, required) in labs.LISTS.items():
        found[key] = (
            model,
            f"### `[[{key}]]`",
            "One section each, at least one." if required else "Any number.",
        )
    return found


def keys(model: type[BaseModel], heading: str, often: str) -> Iterator[str]:
    """A section of a page: heading, what it is, its keys, the rest of the model's docstring."""
    first, *rest = inspect.cleandoc(model.__doc__ or "").split("\n\n")
    if heading:
        yield from (heading, "", *wrapped(f"{first} {often}"), "")
    rows = list(_rows(model))
    with_units = any(unit for *_, unit, _ in rows)
    head = ["key", "type", "default", *(["unit"] if with_units else []), "meaning"]
    yield from table(
        head,
        [
            [key, kind, default, *([unit] if with_units else []), meaning]
            for key, kind, default, unit, meaning in rows
        ],
    )
    if heading:
        for paragraph in rest:
            yield from ("", *(paragraph.split("\n") if paragraph.startswith("-") else wrapped(paragraph)))


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    for name, field in model.model_fields.items():
        if field.json_schema_extra == NOT_FOR_FILES:
            continue
        if not field.description:
            raise Stale(f"{model.__name__}.{name} has no description")
        inner = next((one for one in _options(field.annotation) if _is_model(one)), None)
        kind = "table" if inner else _kind(field)
        yield f"`{prefix}{name}`", kind, _default(field), unit_of(field), marked(field.description)
        if inner:
            yield from _rows(inner, f"{prefix}{name}.")


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _options(annotation: Any) -> list[Any]:
    """The types that a value may have, without None and annotations."""
    if hasattr(annotation, "__metadata__"):
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for one in typing.get_args(annotation) for part in _options(one)]
        return [part for part in parts if part is not type(None)]
    return [annotation]


def _kind(field: FieldInfo) -> str:
    """A type in words, with the values that it may have."""
    (kind, *others) = _options(field.annotation)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if others:
        raise Stale(f"no words for {field.annotation}")
    if origin is Literal:
        return ", ".join(f"`{value}`" if value else '`""`' for value in inner)
    if origin in (list, tuple):
        return f"list of {PLURAL[_options(inner[0])[0]]}"
    if origin is dict:
        return f"table of {PLURAL[inner[1]]}" if inner[1] in PLURAL else "table"
    return _bounded(PLAIN[kind], field)


def _bounded(name: str, field: FieldInfo) -> str:
    bounds: dict[str, Any] = {}
    for one in field.metadata:
        for bound in ("ge", "gt", "le", "lt", "multiple_of", "pattern"):
            if (value := getattr(one, bound, None)) is not None:
                bounds[bound] = value
    if pattern := bounds.get("pattern"):
        return f"`{PATTERNS.get(pattern, pattern.strip('^$'))}`"
    if "ge" in bounds and "le" in bounds:
        return f"{name} {_number(bounds['ge'])} … {_number(bounds['le'])}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "a multiple of"}
    limits = [f"{sign} {_number(bounds[bound])}" for bound, sign in signs.items() if bound in bounds]
    return f"{name} {', '.join(limits)}" if limits else name


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= GROUPED else f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "req"
    value = field.get_default(call_default_factory=True)
    match value:
        case None:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case int() | float():
            return _number(value)
        case str():
            return f"`{value}`" if value else '`""`'
        case dict():
            return "`{}`"
        case _:
            return f"`{list(value)}`"


def workloads() -> Iterator[str]:
    """Every workload, as it is written and as the embedded lab has it."""
    scale = ScaleSection(**inherit.read(LABS / "embedded.toml").table["scale"]).model_dump()
    rows = []
    for stem in sorted(path.stem for path in WORKLOADS.glob("*.toml")):
        full = load_workload(stem)
        for name, lab, one in ((f"`{full.name}`", "full size", full), ("", "embedded", full.scaled(**scale))):
            lengths = f"{one.prompt_tokens:,}, {one.output_tokens:,}"
            loop = f"closed, {one.concurrency} at once"
            if one.rate_per_s is not None:
                loop = f"open, {one.rate_per_s:g}/s ({one.requests / one.rate_per_s:.0f} s)"
            rows.append([name, lab, lengths, str(one.requests), loop, "; ".join(_further(one))])
    yield from table(["workload", "lab", "prompt, answer, tokens", "requests", "loop", "further"], rows)


def _further(one: Workload) -> Iterator[str]:
    if one.steady:
        yield f"steady: {one.steady.requests} of {one.steady.prompt_tokens:,}, {one.steady.output_tokens:,}"
    if one.rate_shares:
        yield f"then open, {', '.join(f'{share:g}' for share in one.rate_shares)} of capacity"
    if one.shared_prefix_tokens:
        yield f"{one.shared_prefix_tokens:,} tokens shared"


# Commands


def commands(found: argparse.ArgumentParser, name: str = "disagglab") -> Iterator[str]:
    """Every command: how it is called, what it does, its options, examples."""
    for action in found._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
        shown = {key: one for key, one in action.choices.items() if key in summaries}
        for key, one in shown.items():
            full = f"{name} {key}"
            yield from (f"### {full}", "", f"    {full}{_usage(one)}", "")
            yield from (*wrapped(marked(one.description or summaries[key])), "")
            rows = [_option(one_action, full) for one_action in one._actions if not _is_help(one_action)]
            if rows:
                yield from (*table(["argument", "meaning"], rows), "")
            lines = inspect.cleandoc(one.epilog or "").split("\n")
            if lines != [""]:
                yield from (
                    "```",
                    *(line for line in map(str.strip, lines) if line != "examples:"),
                    "```",
                    "",
                )
            yield from commands(one, full)


def _is_help(action: argparse.Action) -> bool:
    return isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS


def _usage(one: argparse.ArgumentParser) -> str:
    """What follows a command's name: required options, the other options, what has no name."""
    actions = [action for action in one._actions if not _is_help(action)]
    required = [_called(action) for action in actions if action.option_strings and action.required]
    others = ["[OPTIONS]"] if any(a.option_strings and not a.required for a in actions) else []
    bare = [_values(action) for action in actions if not action.option_strings]
    return "".join(f" {part}" for part in [*required, *others, *bare])


def _called(action: argparse.Action) -> str:
    values = _values(action)
    return f"{action.option_strings[-1]} {values}" if values else action.option_strings[-1]


def _values(action: argparse.Action) -> str:
    """What an argument takes, as argparse would show it."""
    if action.nargs == 0:
        return ""
    name = action.metavar if isinstance(action.metavar, str) else action.dest.replace("-", "_").upper()
    forms = {"+": f"{name} [{name} …]", "*": f"[{name} …]", "?": f"[{name}]"}
    return forms.get(str(action.nargs), name)


def _option(action: argparse.Action, prog: str) -> list[str]:
    default = _shown(action.default)
    text = str(action.help or "") % {**vars(action), "default": default, "prog": prog}
    told = action.default in (None, False, "", 0, []) or re.search(
        rf"(?<!\w){re.escape(default)}(?!\w)", text
    )
    if action.choices is not None:
        text += f"; one of {', '.join(str(choice) for choice in action.choices)}"
    if not told:
        text += f" (default: {default})"
    names = [*action.option_strings[:-1], _called(action)] if action.option_strings else [_values(action)]
    required = " (required)" if action.option_strings and action.required else ""
    return [", ".join(f"`{name}`" for name in names), marked(text) + required]


def _shown(default: Any) -> str:
    """A default without the path of this checkout."""
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        return str(default.relative_to(ROOT))
    return str(default)


class Recorder:
    """Stands in for pytest's parser, and keeps the options that a plugin adds."""

    def __init__(self) -> None:
        self.found = argparse.ArgumentParser(add_help=False)

    def getgroup(self, *_: Any) -> Recorder:
        return self

    def addoption(self, *names: str, **settings: Any) -> None:
        self.found.add_argument(*names, **settings)


def pytest_options() -> Iterator[str]:
    """The options that the plugin adds to pytest."""
    recorder = Recorder()
    add: Callable[[Any], None] = options.pytest_addoption
    add(recorder)
    yield from table(["option", "meaning"], [_option(action, "pytest") for action in recorder.found._actions])


def make_targets(makefile: Path = ROOT / "Makefile") -> Iterator[str]:
    """The targets that `make help` lists."""
    found = re.findall(r"^([a-z-]+):.*## (.*)", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    yield from table(["target", "what it does"], [[f"`make {name}`", what] for name, what in found])


# Pages


def marked(text: str) -> str:
    """Text with its code marked as such, where it is not yet."""
    parts = re.split(r"(`[^`]*`)", text.replace("``", "`"))
    return "".join(part if part.startswith("`") else CODE.sub(lambda m: f"`{m[0]}`", part) for part in parts)


def wrapped(text: str) -> list[str]:
    """A paragraph in lines of a page's width."""
    return textwrap.wrap(" ".join(text.split()), COLUMNS, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [re.sub(" +", " ", f"| {' | '.join(line)} |") for line in lines]


def parts() -> dict[str, Callable[[], Iterator[str]]]:
    """What each marker of the templates stands for."""
    found: dict[str, Callable[[], Iterator[str]]] = {
        f"keys: {name}": functools.partial(keys, *section) for name, section in sections().items()
    }
    return found | {
        "workloads": workloads,
        "commands": lambda: commands(command_line.parser()),
        "pytest options": pytest_options,
        "make targets": make_targets,
    }


def pages(folder: Path = FOLDER) -> dict[Path, str]:
    """Every page with its text.

    Raises:
        Stale: if a template names a part that there is not, or a part stands in no template or in two.
    """
    known = parts()
    made: dict[Path, str] = {}
    used: list[str] = []
    for name in PAGES:
        template = folder / f"{name}.in"

        def part(match: re.Match[str], template: Path = template) -> str:
            if match[1] not in known:
                raise Stale(f"{template}: {match[0]} stands for nothing; known: {', '.join(known)}")
            used.append(match[1])
            return "\n".join(known[match[1]]()).strip("\n")

        note = f"<!-- Made by {COMMAND} from {name}.in and the code; edit those. -->\n\n"
        made[folder / name] = note + MARKER.sub(part, template.read_text(encoding="utf-8"))
    wrong = [name for name in known if used.count(name) != 1]
    if wrong:
        raise Stale(f"each has to stand in a template of {folder} once: {', '.join(wrong)}")
    return made


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Write the pages, or check that they are what would be written."""
    asked = argparse.ArgumentParser(prog=COMMAND, description="Generated pages of docs/reference.")
    asked.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    check = asked.parse_args(argv).check
    try:
        made = pages(folder)
    except Stale as error:
        print(error, file=sys.stderr)
        return 1
    stale = [
        path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if check:
            print(f"{path}: not what the code and {path.name}.in say\n    mend: {COMMAND}", file=sys.stderr)
        else:
            path.write_text(made[path], encoding="utf-8")
            print(path)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Flags of the command line: one for every field of a dataclass of settings, and --config.

    --name VALUE     a text as it is, other values as in YAML: --data '[a.jsonl, b.jsonl]'
    --name           of a bool: true
    --lora.r 8       a field of settings within settings
    --config FILE    a YAML file of settings; later flags and files win
    FILE             words without a flag: of the field with metadata=in_place("FILE")

Values are checked against the annotations when the words have been read; bounds, and values that
do not go together, are the settings' own affair.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from una_fast.checks import described, field_types, mismatch
from una_fast.printable import printable, shown

CONFIG = "YAML file with any of the settings below; may be given several times."


_BOOLEAN = "{true,false}"


class UsageError(Exception):
    """The words of the command line are wrong.

    prog: the command, as the user calls it
    """

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(message)
        self.prog = prog


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated flags, and raises UsageError for wrong words."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # --lr is not --lr_schedule

    def error(self, message: str) -> None:
        """Refuse the words."""
        raise UsageError(self.prog, message)


class _Keep(argparse.Action):
    """Keeps the words of a flag, in their order, for `given_settings`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        text = values if isinstance(values, str) else "--"  # what argparse makes of --name=--
        namespace.words = [*getattr(namespace, "words", []), (self.dest, text)]


def in_place(shown_as: str) -> dict[str, str]:
    """Return the metadata of a field whose values are words of the command line without a flag.

    shown_as: name of a word in the help, such as FILE

    The field is a text, or a list of texts; without a default it has to be given. A command has at
    most one such field.
    """
    return {"in_place": shown_as}


def field_in_place(kind: type) -> Field | None:
    """Return the field of the words without a flag; None if a dataclass has none."""
    return next((field for field in fields(kind) if "in_place" in field.metadata), None)


def _takes_many(kind: type) -> bool:
    """Return whether the words without a flag are a list."""
    name = field_in_place(kind).name
    return mismatch(name, [], field_types(kind)[name]) is None


def add_settings(parser: Parser, groups: Sequence[type]) -> None:
    """Add --config, and a titled group of flags for every dataclass in `groups`."""
    places = "".join(f" {_place_in_usage(group)}" for group in groups if field_in_place(group))
    parser.usage = f"{parser.prog} [-v]{places} [--config FILE] [--SETTING VALUE ...]"
    _add(parser, "config", "FILE", CONFIG)
    for group in groups:
        title = inspect.getdoc(group).split("\n")[0].rstrip(".")
        section = parser.add_argument_group(title)
        own = inspect.get_annotations(group)
        for field, hint, text in _documented(group):
            if field.name not in own:
                continue
            if "in_place" in field.metadata:
                # Words may stand anywhere among the flags: argparse shows them, but takes none.
                section.add_argument(
                    field.name,
                    nargs=argparse.SUPPRESS,
                    default=argparse.SUPPRESS,
                    metavar=field.metadata["in_place"],
                    help=text.replace("%", "%%"),
                )
                continue
            _add(section, field.name, _metavar(field.name, hint), _help(text, field, hint))
            for inner in filter(is_dataclass, get_args(hint)):
                for part, part_hint, part_text in _documented(inner):
                    name = f"{field.name}.{part.name}"
                    shown_name = _metavar(part.name, part_hint)
                    _add(section, name, shown_name, _help(part_text, part, part_hint))


def given_settings(
    kind: type, words: Sequence[tuple[str, str]], places: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings that flags and files give, by name.

    kind: dataclass of the settings
    words: (name, text) of every flag, in order; of --config the path
    places: words without a flag

    ValueError, by the name, for an unknown setting or a value of another type, and for words
    without a flag that are missing or too many.
    """
    hints = field_types(kind)
    given: dict[str, Any] = {}
    for name, text in words:
        if name == "config":
            try:
                given |= _from_file(text, hints)
            except ValueError as error:
                raise ValueError(f"--config {printable(text)}: {error}") from None
            continue
        outer, _, inner = name.partition(".")
        if hints[outer] is bool and field_in_place(kind) and text.lower() not in ("true", "false"):
            # A switch before a word without a flag: --compare RUN
            places = [text, *places]
            text = "true"
        if not inner:
            given[outer] = _from_text(name, text, hints[outer])
            continue
        (settings,) = filter(is_dataclass, get_args(hints[outer]))
        value = _from_text(name, text, field_types(settings)[inner])
        given[outer] = {**(given.get(outer) or {}), inner: value}
    return given | _from_places(kind, places, given)


def _from_places(kind: type, places: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the setting of the words without a flag; see `given_settings`."""
    field = field_in_place(kind)
    if field is None:
        return {}
    shown_as = field.metadata["in_place"]
    if not places:
        if default_of(field) is MISSING and field.name not in given:
            raise ValueError(f"{shown_as} is missing")
        return {}
    if _takes_many(kind):
        return {field.name: list(places)}
    if len(places) > 1:
        raise ValueError(f"one {shown_as} is wanted, not {' '.join(map(printable, places))}")
    return {field.name: places[0]}


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a mistyped name, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _from_file(path: str, hints: dict[str, Any]) -> dict[str, Any]:
    from una_fast.settings_file import read_settings  # needs the extra `train`

    settings = read_settings(path)
    for name, value in settings.items():
        if name not in hints:
            hint = suggestion(name, hints) if isinstance(name, str) else ""
            raise ValueError(f"{shown(name)} is not a setting of this command{hint}")
        problem = mismatch(name, value, hints[name])
        if problem:
            raise ValueError(problem)
    return settings


def _from_text(name: str, text: str, hint: Any) -> Any:
    """Return the value of a flag: a text as it is, or what it means in YAML where that fits."""
    if hint == str | None and text in ("null", "~"):
        return None
    problem = None
    value: Any = text
    if text.strip() and hint not in (str, str | None):
        from una_fast.settings_file import parse_value  # needs the extra `train`

        try:
            value = parse_value(text)
        except ValueError as error:
            problem = f"{name}={shown(text)}: {error}"
    if mismatch(name, value, hint) is None:
        return value
    if mismatch(name, text, hint) is None:
        return text
    raise ValueError(problem or mismatch(name, value, hint))


def _add(parser: Any, name: str, metavar: str, text: str) -> None:
    help_text = text.replace("%", "%%")
    switch: dict[str, Any] = {}
    if metavar == _BOOLEAN:
        switch = {"nargs": "?", "const": "true"}  # --name alone is --name true
    parser.add_argument(
        f"--{name}",
        action=_Keep,
        default=argparse.SUPPRESS,
        metavar=metavar,
        help=help_text,
        **switch,
    )


def _place_in_usage(kind: type) -> str:
    """Return how the words without a flag stand in the line of usage."""
    field = field_in_place(kind)
    shown_as = field.metadata["in_place"]
    if _takes_many(kind):
        shown_as = f"{shown_as} [{shown_as} ...]"
    return shown_as if default_of(field) is MISSING else f"[{shown_as}]"


def _metavar(name: str, hint: Any) -> str:
    if hint is bool:
        return _BOOLEAN
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    return name.upper()


def _help(text: str, field: Field, hint: Any) -> str:
    default = default_of(field)
    words = [] if hint is bool or get_origin(hint) is Literal else [described(hint)]
    if default not in ("", []):
        plain = default if isinstance(default, str) else json.dumps(default)
        words.append(f"default: {plain}")
    return f"{text} ({'; '.join(words)})" if words else text


def default_of(field: Field) -> Any:
    """Return the default of a field of a dataclass."""
    return field.default if field.default_factory is MISSING else field.default_factory()


@functools.cache
def _documented(kind: type) -> list[tuple[Field, Any, str]]:
    """Return (field, annotation, docstring below the field) of every field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    texts = {}
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and is_text:
            texts[node.target.id] = following.value.value
    hints = field_types(kind)
    return [(f, hints[f.name], texts.get(f.name, "")) for f in fields(kind)]

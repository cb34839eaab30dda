"""Settings from YAML: a file of settings, or the text of one flag, as plain values.

The reader takes the plain part of YAML alone: null, true and false, numbers, texts, lists and
mappings. Tags, two equal keys, and aliases that grow without bound are refused, by the line.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from una_fast.printable import printable, shown

LONGEST = 2**18  # bytes of a file, characters of a flag
MOST_VALUES = 10**5  # every alias counted as often as it is used
DEEPEST = 20  # levels of lists and mappings

NULL = frozenset(("", "~", "null", "Null", "NULL"))

# Decimal, hexadecimal and octal; no sexagesimal 1:30, and no octal 010, as YAML 1.1 has them.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)", re.ASCII)
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
    r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?)",
    re.ASCII,
)
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)

_YAML = "tag:yaml.org,2002:"
_BOOLEANS = yaml.SafeLoader.bool_values  # yes, no, on, off, true, false
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file of settings; an empty file is an empty mapping.

    ValueError, by the line, for everything else; FIFOs and devices are not opened.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a regular file; give a YAML file of settings")
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(content) > LONGEST:
        raise ValueError(f"larger than {LONGEST} bytes; is it a file of settings?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no text in UTF-8") from None
    value = parse_value(text)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"holds {shown(value)}, not a mapping of settings, `name: value`")
    return value


def parse_value(text: str) -> Any:
    """Return the value that a YAML text stands for.

    ValueError, by the line, for a text that is not plain YAML.
    """
    if len(text) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    try:
        return _Builder(text).document()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}no YAML: {printable(error.problem)}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"no YAML: {printable(' '.join(str(error).split()))}") from None


class _Builder:
    """Builds the value of a text from the events of the YAML parser, which needs no recursion."""

    def __init__(self, text: str) -> None:
        self.events = yaml.parse(text, Loader=_Loader)
        self.anchors: dict[str, tuple[Any, int]] = {}  # the value, and how many values it holds
        self.count = 0

    def document(self) -> Any:
        """Return the value of the only document; None if there is none."""
        next(self.events)  # the start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self.events), 0)
        next(self.events)  # the end of the document
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise ValueError(f"{_line(after)}: a second document; give one")
        return value

    def _value(self, event: yaml.Event, depth: int) -> Any:
        """Return the value that begins with an event, `depth` levels below the document."""
        if depth > DEEPEST:
            raise ValueError(
                f"{_line(event)}: lists and mappings are nested more than {DEEPEST} deep"
            )
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self.count
        self._add(1, event)
        if event.tag is not None and event.tag != "!":
            tag = printable(event.tag.replace(_YAML, "!!"))
            raise ValueError(f"{_line(event)}: the tag {tag} is not read; give plain values")
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(depth)
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.count - before)
        return value

    def _alias(self, event: yaml.AliasEvent) -> Any:
        if event.anchor not in self.anchors:  # or within its own value
            raise ValueError(f"{_line(event)}: no value is anchored as &{printable(event.anchor)}")
        value, size = self.anchors[event.anchor]
        self._add(size, event)
        return value

    def _add(self, values: int, event: yaml.Event) -> None:
        self.count += values
        if self.count > MOST_VALUES:
            raise ValueError(f"{_line(event)}: more than {MOST_VALUES} values, aliases counted")

    def _list(self, depth: int) -> list[Any]:
        values = []
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] | None = None
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._value(event, depth + 1)
            plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
            if key == "<<" and plain:  # in quotes it is a key as any other
                if merged is not None:
                    raise ValueError(f"{_line(event)}: << is given twice; give it a list")
                merged = self._merged(next(self.events), depth + 1)
                continue
            if isinstance(key, (list, dict)):
                raise ValueError(f"{_line(event)}: a list or a mapping cannot be a key")
            if key in values:
                raise ValueError(f"{_line(event)}: {shown(key)} is given twice; remove one")
            values[key] = self._value(next(self.events), depth + 1)
        return {**merged, **values} if merged else values

    def _merged(self, event: yaml.Event, depth: int) -> dict[Any, Any]:
        """Return the keys of the mapping after `<<`, or of the list of them; earlier ones win."""
        value = self._value(event, depth)
        found: dict[Any, Any] = {}
        for mapping in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(mapping, dict):
                raise ValueError(f"{_line(event)}: << takes a mapping or a list of mappings")
            found |= mapping
        return found


def _scalar(event: yaml.ScalarEvent) -> Any:
    """Return the value of a scalar: a quoted one is a text, a plain one may be more."""
    text = event.value
    quoted = not event.implicit[0]
    if quoted:
        return text
    if text in NULL:
        return None
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    try:
        if _INTEGER.fullmatch(text):
            return int(text, 10 if text.lstrip("+-")[:2] not in ("0x", "0o") else 0)
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
    except ValueError:  # thousands of digits, or an underscore too many
        raise ValueError(f"{_line(event)}: {shown(text)} is no usable number") from None
    found = _NOT_FINITE.fullmatch(text)
    if found:
        return float("nan") if found[3] else float(f"{found[1]}inf")
    return text


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}"

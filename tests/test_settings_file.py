"""Settings from YAML: plain values, or one line that says what is wrong."""

from __future__ import annotations

import math
import os

import pytest

from una_fast import settings_file
from una_fast.settings_file import parse_value, read_settings

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n"
for before, after in zip("abcdefg", "bcdefgh", strict=True):
    BOMB += f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("~", None),
        ("yes", True),
        ("1e-3", 0.001),  # a text in YAML 1.1
        ("1.", 1.0),
        ("-.5e2", -50.0),
        ("1_000", 1000),
        ("0x1f", 31),
        (".inf", math.inf),
        ("010", "010"),  # eight in YAML 1.1, and nobody's learning rate
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("１２", "１２"),
        ("'3'", "3"),
        ('"true"', "true"),
        ("2024-01-01", "2024-01-01"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("|\n a\n b", "a\nb"),
        ("a: &x {b: 1, c: 2}\nd: {c: 3, <<: *x}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("<<: [{a: 1}, {a: 2, b: 2}]", {"a": 1, "b": 2}),
        ("'<<': 1", {"<<": 1}),
    ],
)
def test_plain_values(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice"),
        ("!!python/object/apply:os.system [x]", "line 1: the tag !!python/object/apply:os.system"),
        ("a: !!int '3'", "the tag !!int is not read"),
        ("&a [*a]", "line 1: no value is anchored as &a"),
        ("? [a]\n: b", "a list or a mapping cannot be a key"),
        (BOMB, "values, aliases counted"),
        ("[" * 100_000, "nested more than 20 deep"),  # libyaml's own tree ends the process here
        ("[1, 2", "line 2: no YAML"),
        ("a: b: c", "line 1: no YAML"),
        ("a\0b", "no YAML"),
        ("\ud800", "no YAML"),
        ("9" * 5000, "is no usable number"),
        ("a\n---\nb", "line 2: a second document"),
        ("<<: [{a: 1}, 2]", "line 1: << takes a mapping or a list of mappings"),
        ("<<: {a: 1}\n<<: {b: 1}", "line 2: << is given twice"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x", "{}"), "aliases counted"),
        ("x" * (settings_file.LONGEST + 1), "longer than"),
    ],
    ids=lambda text: text[:12].encode("ascii", "backslashreplace").decode(),
)
def test_what_is_no_plain_value_is_refused_by_the_line(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse_value(text)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


def test_a_file_is_a_mapping(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes("\ufeffbeta: 0.5\n".encode())
    assert read_settings(path) == {"beta": 0.5}
    path.write_bytes(b"")
    assert read_settings(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "not a mapping of settings"),
        (b"model: \xff", "byte 7 is no text in UTF-8"),
        (b"a: 1\n" * 2**18, "larger than"),
        (None, "not a regular file"),
        ("directory", "not a regular file"),
        ("missing", "cannot be read: No such file"),
    ],
)
def test_what_is_no_file_of_settings_is_refused(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    if content is None:
        os.mkfifo(path)  # nobody writes to it, and opening it would wait for ever
    elif content == "directory":
        path.mkdir()
    elif content != "missing":
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_settings(path)

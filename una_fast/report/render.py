"""Pages from templates: a single HTML file without a script, a font or a link.

Every text of a run is foreign: `visible` writes control characters as escapes, and the template
escapes the rest. Markup enters by `Markup` alone, from this package.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from una_fast.printable import printable, without_secrets

LONGEST_TEXT = 2000  # characters of a prompt or a sample


def render(template: str, context: dict[str, Any]) -> str:
    """Return a page as HTML.

    template: file in the folder of templates
    context: values of the template by name
    """
    page = _environment().get_template(template)
    version = importlib.metadata.version("una-fast")
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return page.render(context, version=version, written=written) + "\n"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_final,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _final(value: Any) -> Any:
    """Return a value of a template, a foreign text without control characters."""
    is_foreign = isinstance(value, str) and not isinstance(value, Markup)
    return visible(value) if is_foreign else value


def visible(text: str) -> str:
    """Return a text for a page, of several lines, without control characters and secrets."""
    cut = text[:LONGEST_TEXT]
    lines = [printable(line, LONGEST_TEXT) for line in without_secrets(cut).split("\n")]
    if len(text) > len(cut):
        lines[-1] += f"… ({len(text) - len(cut)} more characters)"
    return "\n".join(lines)


def breakable(metric: str) -> Markup:
    """Return the name of a metric, with line breaks allowed after / and _."""
    name = escape(visible(metric))
    return name.replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>"))

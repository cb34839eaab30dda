"""The page of a planned run: memory by part, savings of switches, the longest row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from una_fast.files import write_text
from una_fast.report.details import bars_of, plan_in_words
from una_fast.report.plain import mapping_of, size_in_words, text_of
from una_fast.report.render import render


def write_plan(plan: dict[str, Any], out: Path) -> None:
    """Write the page of a plan.

    plan: plain values of a RunPlan, sizes in bytes
    out: file to write
    """
    facts = {"Model": text_of(plan.get("model")), "Batch": text_of(plan.get("batch"))}
    for name in ("longest", "work"):
        if plan.get(name):
            facts[name.capitalize()] = text_of(plan[name])
    for name in ("host", "measured"):
        if plan.get(name):
            facts[name.capitalize()] = size_in_words(plan[name])
    context = {
        "title": "Planned memory",
        "lead": plan_in_words(plan),
        "facts": [(name, [value]) for name, value in facts.items()],
        "parts": bars_of(mapping_of(plan.get("parts"))),
        "switches": bars_of(mapping_of(plan.get("switches"))),
        "decisions": [(name, [words]) for name, words in plan.get("decisions", [])],
    }
    write_text(out, render("plan.html.j2", context))

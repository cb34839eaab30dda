"""The page of a run, or of several, from the files of the runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from una_fast.files import write_text
from una_fast.printable import told
from una_fast.report.chart_table import Chart, charts_of
from una_fast.report.details import (
    bars_of,
    changed_settings,
    comparison_of,
    decisions_of,
    differing_settings,
    plan_in_words,
    samples_of,
    sources_of,
)
from una_fast.report.plain import flat, mapping_of
from una_fast.report.render import render
from una_fast.report.run_files import RunFiles, read_runs
from una_fast.report.settings import ReportConfig
from una_fast.report.summary import across, changes_of, facts_of, tiles_of

logger = logging.getLogger(__name__)

NAME = "report.html"


def write_report(settings: ReportConfig) -> Path:
    """Write the page of runs; return the path.

    ValueError for a directory without a run.
    """
    directories = [Path(run) for run in settings.runs]
    out = Path(NAME)
    if settings.out is not None:
        out = Path(settings.out)
    elif len(directories) == 1:
        out = directories[0] / NAME
    write_text(out, page_of(read_runs(directories)))
    return out


def write_own_report(output_dir: Path) -> None:
    """Write the page of a run into the run's directory; a failure is told, and ends no run."""
    try:
        write_report(ReportConfig([str(output_dir)]))
    except Exception as error:
        logger.warning("the report of the run is not written: %s", told(error))


def page_of(runs: Sequence[RunFiles]) -> str:
    """Return the page of runs as HTML."""
    is_single = len(runs) == 1
    context = {
        "title": " · ".join(run.name for run in runs),
        "lead": _lead(runs),
        "notes": _notes(runs),
        "names": [run.name for run in runs],
        "facts": across([facts_of(run) for run in runs]),
        "tiles": tiles_of(runs[0]) if is_single else [],
        "changes": [] if is_single else changes_of(runs),
        "sections": _sections(charts_of(runs)),
        "differing": differing_settings(runs),
        "runs": [_own(run) for run in runs],
    }
    return render("run.html.j2", context)


def _lead(runs: Sequence[RunFiles]) -> str:
    """Return a sentence on a run, or on several."""
    if len(runs) > 1:
        return f"{len(runs)} runs, side by side: a colour each in every chart."
    model = runs[0].config.get("model")
    if not isinstance(model, str):
        return "A run of una-fast."
    return f"A run of una-fast that aligned {Path(model).name or model}."


def _notes(runs: Sequence[RunFiles]) -> list[str]:
    """Return remarks to read before the numbers."""
    notes = []
    for run in runs:
        own = list(run.notes)
        if not run.series:
            own.append("No metric is written yet.")
        notes += own if len(runs) == 1 else [f"{run.name}: {note}" for note in own]
    return notes


def _sections(charts: Sequence[Chart]) -> dict[str, list[Chart]]:
    """Return the charts by section."""
    sections: dict[str, list[Chart]] = {}
    for chart in charts:
        sections.setdefault(chart.section, []).append(chart)
    return sections


def _own(run: RunFiles) -> dict[str, Any]:
    """Return the parts of the page on a single run."""
    plan = None
    if run.plan:
        parts = bars_of(mapping_of(run.plan.get("parts")))
        plan = {"words": plan_in_words(run.plan), "parts": parts}
    return {
        "name": run.name,
        "comparison": comparison_of(run.comparison) if run.comparison else None,
        "samples": samples_of(run),
        "plan": plan,
        "sources": sources_of(run),
        "decisions": decisions_of(run),
        "changed": changed_settings(run),
        "settings": [(name, [value]) for name, value in flat(run.config).items()],
    }

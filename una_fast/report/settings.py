"""The settings of `una-fast report`."""

from __future__ import annotations

from dataclasses import dataclass, field

from una_fast.checks import check_types
from una_fast.flags import in_place


@dataclass
class ReportConfig:
    """The runs to show, and the page."""

    runs: list[str] = field(metadata=in_place("RUN"))
    """Output directories of runs: finished, stopped, or still running."""
    out: str | None = None
    """HTML file to write; null: report.html, in the directory of a single run."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.runs:
            raise ValueError("no run is given; name output directories of una-fast train")

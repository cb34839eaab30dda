"""The settings of `una-fast report`."""

from __future__ import annotations

from dataclasses import dataclass, field

from una_fast.checks import check_types
from una_fast.flags import in_place

MOST_RUNS = 8  # of a page: colours that are told apart


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
        if len(self.runs) > MOST_RUNS:
            raise ValueError(
                f"{len(self.runs)} runs are given, and a page shows at most {MOST_RUNS}; "
                "leave some out"
            )

"""Tables of contenders on a terminal: a heading, and a line per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NAMES = 20  # columns of a terminal, for the names of the rows
CELL = 11


class Column(NamedTuple):
    """A column of a printed table: row[key] / divisor in the format `form`."""

    key: str
    form: str
    divisor: float = 1

    def cell(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row's cell, empty without such a number."""
        return f"{row[self.key] / self.divisor:{self.form}}" if self.key in row else ""


def table_lines(
    columns: Mapping[str, Column], table: Iterable[Mapping[str, Any]], cell: int = CELL
) -> list[str]:
    """Return a heading and a line per row: the name, then the row's cells or the row's reason.

    columns: heading -> column
    table: rows with a name
    cell: columns of a terminal for a cell
    """
    lines = [f"{'':{NAMES}}" + "".join(f"{head:>{cell}}" for head in columns)]
    for row in table:
        if "reason" in row:
            lines.append(f"{row['name']:{NAMES}}  {row['reason']}")
            continue
        cells = [f"{column.cell(row):>{cell}}" for column in columns.values()]
        lines.append(f"{row['name']:{NAMES}}" + "".join(cells))
        if row.get("unfinished"):
            lines.append(f"  the search ended early: {row['unfinished']}")
    return lines

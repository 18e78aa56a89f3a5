"""Tables of text that fit a terminal of 80 columns."""

from collections.abc import Sequence

_NAME = 34
"""Columns of a name; of a longer one the end tells more."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right.

    Args:
      head: the names of the columns.
      rows: the cells.
      most: how many rows are shown.
    """
    cells = [tuple(head), *((_shortened(row[0]), *row[1:]) for row in rows[:most])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [*lines, f"and {len(rows) - most} more"] if len(rows) > most else lines


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"

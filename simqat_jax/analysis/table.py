"""Tables of text that fit a terminal of 80 columns, and numbers in them."""

import math
from collections.abc import Sequence

_BETWEEN = "  "
_COLUMNS = 80
"""Of a terminal."""
_SHORTEST = 12
"""Columns of a name, however wide the rest of its row is."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right.

    Args:
      head: the names of the columns.
      rows: the cells.
      most: how many rows are shown.
    """
    cells = [tuple(head), *map(tuple, rows[:most])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    room = _COLUMNS - sum(widths[1:]) - len(_BETWEEN) * len(widths[1:])
    widths[0] = min(widths[0], max(room, _SHORTEST))
    cells = [(_shortened(row[0], widths[0]), *row[1:]) for row in cells]
    lines = [
        _BETWEEN.join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [*lines, f"and {len(rows) - most} more"] if len(rows) > most else lines


def _shortened(name: str, width: int) -> str:
    """Cut a name that is too long; its end tells more."""
    return name if len(name) <= width else f"...{name[3 - width :]}"


def decibels(value: float, sign: str = "") -> str:
    """Write a ratio; an infinite one is that of values without an error."""
    if math.isinf(value) and value > 0:
        return "exact"
    return f"{round(value, 1) + 0.0:{sign}.1f} dB"  # no "-0.0"

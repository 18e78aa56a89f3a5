"""A table of operations as people read it: text of a terminal's width, and HTML of a notebook."""

import dataclasses
import html
import itertools
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

_NARROW = 80
_LEAST = 9
"""Characters that a column is shortened to at most."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a sheet.

    Attributes:
      title: what stands above it.
      keeps: what stays of a text that is too long; "all": it is never shortened.
    """

    title: str
    keeps: Literal["start", "end", "all"] = "all"


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a sheet: an operation.

    Attributes:
      cells: a text for each column; the first is the operation's path.
      more: what is shown on demand, in lines.
      is_float: whether it computes on real values.
    """

    cells: tuple[str, ...]
    more: tuple[str, ...] = ()
    is_float: bool = False

    @property
    def module(self) -> str:
        """The outermost module that it is in; empty: it is in none."""
        first, *inside = self.cells[0].split("/")
        return first if inside else ""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table with what is said above and below it.

    Attributes:
      head: lines above the table.
      columns: of the table.
      lines: of the table.
      foot: paragraphs below it.
    """

    head: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: tuple[str, ...]

    def text(self, width: int | None = None) -> str:
        """Return a line for each operation, none wider than `width` (None: the terminal)."""
        width = terminal_width() if width is None else width
        rows = [tuple(c.title for c in self.columns), *(line.cells for line in self.lines)]
        return "\n".join(
            [*_wrapped(self.head, width), *self._rows(rows, width), *_wrapped(self.foot, width)]
        )

    def details(self, lines: Iterable[Line], width: int | None = None) -> str:
        """Return all that is known of some of the lines, a block each."""
        width = terminal_width() if width is None else width
        blocks = ([line.cells[0], *_wrapped(line.more, width, "  ")] for line in lines)
        return "\n".join(itertools.chain.from_iterable(blocks))

    def whole(self, width: int | None = None) -> str:
        """Return all that is known of all lines, with what is said above and below them."""
        width = terminal_width() if width is None else width
        above, below = (list(_wrapped(said, width)) for said in (self.head, self.foot))
        return "\n".join([*above, self.details(self.lines, width), *below])

    def html(self) -> str:
        """Return a table for notebooks: by module, details folded, float operations in colour."""
        groups = itertools.groupby(self.lines, lambda line: line.module)
        parts = [_paragraphs(self.head)]
        parts += [self._group(module, list(lines)) for module, lines in groups]
        return f'<div style="max-width: 70em">{"".join(parts)}{_paragraphs(self.foot)}</div>'

    def _rows(self, rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yielding = [i for i, column in enumerate(self.columns) if column.keeps != "all"]
        gaps = 2 * (len(widths) - 1)
        while sum(widths) + gaps > width:
            widest = max(yielding, key=lambda i: widths[i])
            if widths[widest] <= _LEAST:
                break
            widths[widest] -= 1
        for row in rows:
            cells = zip(row, self.columns, widths, strict=True)
            yield "  ".join(_shortened(text, c, w).ljust(w) for text, c, w in cells).rstrip()

    def _group(self, module: str, lines: Sequence[Line]) -> str:
        titles = "".join(
            f'<th style="text-align: left">{_escaped(c.title)}</th>' for c in self.columns
        )
        body = "".join(map(_html_row, lines))
        table = f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        if not module:
            return table
        floats = sum(line.is_float for line in lines)
        counted = f"{len(lines)} operation{'s' if len(lines) > 1 else ''}"
        counted += f", {floats} float" if floats else ""
        summary = f"<summary><b>{_escaped(module)}</b> ({counted})</summary>"
        return f"<details open>{summary}{table}</details>"


def terminal_width() -> int:
    """Return how many characters a line may have: 80, or more where the terminal is wider."""
    return max(_NARROW, shutil.get_terminal_size((_NARROW, 24)).columns)


def number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}"


def some(names: Sequence[str], most: int = 8) -> str:
    """List names, the first of them where there are many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _wrapped(paragraphs: Iterable[str], width: int, indent: str = "") -> Iterator[str]:
    for text in paragraphs:
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]


def _shortened(text: str, column: Column, width: int) -> str:
    if len(text) <= width or column.keeps == "all":
        return text
    return f"…{text[-width + 1 :]}" if column.keeps == "end" else f"{text[: width - 1]}…"


def _escaped(text: str) -> str:
    return html.escape(text)


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{_escaped(line)}</p>" for line in lines if line)


def _html_row(line: Line) -> str:
    first, *others = (_escaped(cell) for cell in line.cells)
    if line.more:
        more = "<br>".join(map(_escaped, line.more))
        first = f"<details><summary>{first}</summary>{more}</details>"
    # Half transparent: readable on light and on dark pages.
    colour = ' style="background: rgba(255, 160, 0, 0.3)"' if line.is_float else ""
    cells = "".join(f'<td style="text-align: left">{cell}</td>' for cell in (first, *others))
    return f"<tr{colour}>{cells}</tr>"

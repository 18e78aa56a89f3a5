"""A table of operations as people read it: text of a terminal's width, and HTML of a notebook."""

import dataclasses
import html
import itertools
from collections.abc import Iterable, Sequence

from simqat_jax.ir.table import Column, table, terminal_width, wrapped


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
        """Return a row for each operation, no line wider than `width` (None: the terminal)."""
        width = terminal_width() if width is None else width
        rows = table(self.columns, (line.cells for line in self.lines), width)
        return "\n".join([*wrapped(self.head, width), *rows, *wrapped(self.foot, width)])

    def details(self, lines: Iterable[Line], width: int | None = None) -> str:
        """Return all that is known of some of the lines, a block each."""
        width = terminal_width() if width is None else width
        blocks = (
            [*wrapped(line.cells[:1], width), *wrapped(line.more, width, "  ")] for line in lines
        )
        return "\n".join(itertools.chain.from_iterable(blocks))

    def whole(self, width: int | None = None) -> str:
        """Return all that is known of all lines, with what is said above and below them."""
        width = terminal_width() if width is None else width
        above, below = (list(wrapped(said, width)) for said in (self.head, self.foot))
        return "\n".join([*above, self.details(self.lines, width), *below])

    def html(self) -> str:
        """Return a table for notebooks: by module, details folded, float operations in colour."""
        groups = itertools.groupby(self.lines, lambda line: line.module)
        parts = [_paragraphs(self.head)]
        parts += [self._group(module, list(lines)) for module, lines in groups]
        return f'<div style="max-width: 70em">{"".join(parts)}{_paragraphs(self.foot)}</div>'

    def _group(self, module: str, lines: Sequence[Line]) -> str:
        titles = "".join(
            f'<th style="text-align: left">{_escaped(c.title)}</th>' for c in self.columns
        )
        body = "".join(map(_html_row, lines))
        shown = f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        if not module:
            return shown
        floats = sum(line.is_float for line in lines)
        counted = f"{len(lines)} operation{'s' if len(lines) > 1 else ''}"
        counted += f", {floats} float" if floats else ""
        summary = f"<summary><b>{_escaped(module)}</b> ({counted})</summary>"
        return f"<details open>{summary}{shown}</details>"


def number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}"


def some(names: Sequence[str], most: int = 8) -> str:
    """List names, the first of them where there are many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


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

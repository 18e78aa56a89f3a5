"""Tables of text that fit a width and lose nothing but the middle of long paths."""

import dataclasses
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

_NARROW = 80
_LEAST = 12
"""Characters of a column that gives up some, at least."""
_PART = 6
"""Characters of a part of a path, at least."""
_BETWEEN = "  "
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: what stands above it.
      breaks: what becomes of a text that is too long. "path": the middle of its parts is left out;
        "words": it goes on below; "never": it stays as it is.
      right: whether it stands to the right, as numbers do.
    """

    title: str
    breaks: Literal["path", "words", "never"] = "never"
    right: bool = False


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None = None
) -> list[str]:
    """Return the lines of a table, titles first, none wider than `width` (None: the terminal)."""
    cells = [tuple(c.title for c in columns), *map(tuple, rows)]
    widths = _widths(columns, cells, terminal_width() if width is None else width)
    lines: list[str] = []
    for row in cells:
        texts = [_broken(*part) for part in zip(row, columns, widths, strict=True)]
        for line in itertools.zip_longest(*texts, fillvalue=""):
            aligned = (
                text.rjust(w) if column.right else text.ljust(w)
                for text, column, w in zip(line, columns, widths, strict=True)
            )
            lines.append(_BETWEEN.join(aligned).rstrip())
    return lines


def shortened(path: str, width: int) -> str:
    """Leave out the middle of the longest parts of a path: "Block_0/Mul…n_0/query".

    The first and the last part stay whole where they can; a path of too many parts keeps its end.
    """
    if len(path) <= width:
        return path
    parts = path.split("/")
    for whole in ({0, len(parts) - 1}, set[int]()):
        for most in range(max(map(len, parts)), _PART - 1, -1):
            kept = (
                part if place in whole else _without_middle(part, most)
                for place, part in enumerate(parts)
            )
            if len(text := "/".join(kept)) <= width:
                return text
    return f"…{path[1 - width :]}"


def wrapped(paragraphs: Iterable[str], width: int, indent: str = "") -> Iterator[str]:
    """Yield the lines of paragraphs; the second of each and those below are indented more."""
    for text in paragraphs:
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_on_hyphens=False,
        ) or [""]


def terminal_width() -> int:
    """Return how many characters a line may have: 80, or more where the terminal is wider."""
    return max(_NARROW, shutil.get_terminal_size((_NARROW, 24)).columns)


def _widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int
) -> tuple[int, ...]:
    """Return the width of each column.

    Where there is too little room, paths give up some as long as they can be told apart, then words
    go on below, then both have as little as it takes.
    """
    whole = [max(map(len, texts)) for texts in zip(*cells, strict=True)]
    widths, room = list(whole), width - len(_BETWEEN) * (len(columns) - 1)

    def narrow(least: Callable[[Sequence[str]], int], *kinds: str) -> None:
        yielding = [i for i, column in enumerate(columns) if column.breaks in kinds]
        floors = {i: least([row[i] for row in cells]) for i in yielding}
        while sum(widths) > room:
            spare = [i for i in yielding if widths[i] > floors[i]]
            if not spare:
                return
            widths[max(spare, key=widths.__getitem__)] -= 1

    if sum(widths) > room:
        narrow(_told_apart, "path")
        narrow(_longest_word, "words")
        narrow(lambda _: _LEAST, "path", "words")
    return tuple(widths)


def _told_apart(paths: Sequence[str]) -> int:
    """Return a small width at which no two paths look alike."""
    different = set(paths)
    return next(
        width
        for width in itertools.count(_LEAST, 4)
        if len({shortened(path, width) for path in different}) == len(different)
    )


def _longest_word(texts: Sequence[str]) -> int:
    return max((len(word) for text in texts for word in _bound(text).split(" ")), default=0)


def _broken(text: str, column: Column, width: int) -> list[str]:
    """Return the lines of a cell."""
    if len(text) <= width or column.breaks == "never":
        return [text]
    if column.breaks == "path":
        return [shortened(text, width)]
    lines = textwrap.wrap(_bound(text), width, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _bound(text: str) -> str:
    """Keep a range in one line: "[-1, 1]"."""
    return re.sub(r"\[.*?\]", lambda found: found[0].replace(" ", _NO_BREAK), text)


def _without_middle(part: str, most: int) -> str:
    end = most // 2
    return part if len(part) <= most else f"{part[: most - 1 - end]}…{part[-end:]}"

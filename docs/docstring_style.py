"""Griffe extension: read this project's docstrings, which put a section's text behind its name.

`Raises: ValueError: why.` and `Source: a paper.` become what a Google-style parser reads.
"""

import inspect
import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Source|Invariant|Gradient):(.*)$")
_ERROR = re.compile(r"(?:^|(?<=[.;] ))(\w+Error): ")


def _sections(text: str) -> list[tuple[str, list[str]]]:
    """Split a docstring at the names of its sections; the text before them has the name ''."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        match = _SECTION.match(line)
        if match:
            sections.append((match[1], [match[2].strip()] if match[2].strip() else []))
        elif sections[-1][0] and line and not line.startswith(" "):
            sections.append(("", [line]))
        else:
            sections[-1][1].append(line)
    return sections


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line if line else "" for line in lines]


def _google(name: str, lines: list[str]) -> list[str]:
    if not name:
        return lines
    if name in ("Invariant", "Gradient", "Source"):
        return ["", f"**{name}:** " + " ".join(line.strip() for line in lines)]
    if name == "Raises":
        words = " ".join(line.strip() for line in lines)
        parts = _ERROR.split(words)[1:]
        errors = zip(parts[::2], parts[1::2], strict=True)
        return ["", "Raises:", *_indented([f"{error}: {text.strip()}" for error, text in errors])]
    if name == "Returns":
        lines = [" ".join(line.strip() for line in lines)]
    name = "Examples" if name == "Example" else name
    return ["", f"{name}:", *_indented(inspect.cleandoc("\n".join(["", *lines])).splitlines())]


class DocstringStyle(griffe.Extension):
    """Rewrites each docstring once, when it is collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            sections = _sections(inspect.cleandoc(obj.docstring.value))
            lines = [line for section in sections for line in _google(*section)]
            obj.docstring.value = "\n".join(lines).strip()

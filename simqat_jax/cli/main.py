"""Read the arguments of `simqat`, and turn errors into a line and a status."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from simqat_jax.files import import_extra

if TYPE_CHECKING:  # it imports tyro
    from simqat_jax.cli.commands import Command

_ABOUT = "Look into, verify and measure files of quantized models, and report on them."
_RULE = re.compile("\u2500{9,}")
"""What separates a reason from what else tyro prints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `simqat inspect`, `verify`, `bench` or `report`.

    Returns:
      0; 1 where `verify` found codes that differ; 2 where something could not be done: then one
      line on stderr says why.
    """
    try:
        command = _parsed(sys.argv[1:] if arguments is None else arguments)
        status = 0 if command is None else command.run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `simqat inspect FILE | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # runtimes raise errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"simqat: {reason}", file=sys.stderr)
        return 2


def _parsed(arguments: Sequence[str]) -> "Command | None":
    """Return the command; None where help was asked for.

    Raises:
      ImportError: the extra `cli` is missing.
      ValueError: arguments that are none of a command's.
    """
    tyro: Any = import_extra("tyro", "cli")
    from simqat_jax.cli.commands import COMMANDS

    choices: Any = None
    for name, kind in COMMANDS.items():
        choice: Any = Annotated[kind, tyro.conf.subcommand(name)]
        choices = choice if choices is None else choices | choice
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(choices, prog="simqat", description=_ABOUT, args=list(arguments))
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(_reason(printed.getvalue())) from None


def _reason(box: str) -> str:
    """Return what is said in a box of tyro, without its frame and without what follows a rule."""
    lines: list[str] = []
    for line in (line.strip("\u2502 ") for line in box.splitlines()[1:]):
        if _RULE.search(line):
            break
        lines.append(line)
    return f"{' '.join(' '.join(lines).split()).rstrip('.')}. See simqat --help."

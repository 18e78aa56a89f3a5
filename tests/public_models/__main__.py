"""Print the table of public kinds of model, in Markdown.

Example:
  cd tests && ../.venv/bin/python -m public_models
  cd tests && ../.venv/bin/python -m public_models ViT DLRM
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

import simqat_jax as sq
from public_models import MODELS
from public_models.measures import Measured


def parameters(measured: Measured) -> str:
    """Count them."""
    return f"{sum(leaf.size for leaf in jax.tree.leaves(measured.first['params'])):,}"


def compared(found: sq.Verification) -> str:
    """Tell how many codes of a file differ, and how many of its operations are float."""
    floats = f", {len(found.float_parts)} in float" if found.float_parts else ""
    return f"{found.differing} of {found.codes:,}{floats}"


COLUMNS: dict[str, Callable[[Measured], str]] = {
    "parameters": parameters,
    "multiply-adds on integers": lambda m: f"{m.share():.1%}",
    "of those with a kernel": lambda m: f"{1 - m.kernels_left():.1%}",
    "error to float": lambda m: f"{m.error():.3f}",
    "kernels without gradient": lambda m: str(len(m.without_gradient())),
    "error of state": lambda m: f"{m.state_error():.3f}",
    "codes that differ": lambda m: str(m.differing_codes()),
    "TFLite file": lambda m: compared(m.file("tflite")),
    "ONNX file": lambda m: compared(m.file("onnx")),
    "refused": lambda m: "yes" if m.refusal() else "no",
}


def row(name: str) -> list[str]:
    """Return the cells of a model; of what raises, the error."""
    measured = Measured(MODELS[name])
    return [name, *(_cell(column, measured) for column in COLUMNS.values())]


def _cell(column: Callable[[Measured], str], measured: Any) -> str:
    try:
        return column(measured)
    except ValueError as error:
        return f"{type(error).__name__}: {str(error)[:60]} ..."


def main(names: Sequence[str]) -> None:
    """Print a line for each model, by default all."""
    jax.config.update("jax_disable_most_optimizations", True)  # where codes are compared, all
    print(f"| model | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---|' * len(COLUMNS)}")
    for name in names or MODELS:
        print(f"| {' | '.join(row(name))} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1:])

"""The printed module: the quantizers of each layer, nested as the modules are."""

import itertools
import textwrap
from collections.abc import Iterator

from simqat_jax.config import SimQATConfig
from simqat_jax.ir.table import terminal_width
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.training.plan_table import Plan, Row


def network(name: str, config: SimQATConfig, plan: Plan | None) -> str:
    """Return a line for each module and layer, and one for each of its quantizers.

    Args:
      name: of the float module.
      config: what it is quantized with.
      plan: of a call; None: there was none, so that the layers are not known.
    """
    lines = [f"{name}, quantized: bn_fold={config.bn_fold!r}, rounding as in {config.backend}"]
    if plan is None:
        lines += [
            f"  weights: {_words(config.weight)}",
            f"  outputs: {_words(config.activation)}",
            *(f"  {rule}" for rule in config.decisions),
            "  Its layers are known after init, or another call.",
        ]
    else:
        lines += [f"  {name}: {plan.quantizers[name]}" for name, _ in plan.inputs]
        lines += _layers(plan)
    return "\n".join(part for line in lines for part in _wrapped(line))


def short(config: SimQATConfig) -> str:
    """Say in a few words what a module is quantized with."""
    text = f"{config.weight.num_bits}-bit weights, {config.activation.num_bits}-bit activations"
    counts = {"rules": len(config.rules), "exclusions": len(config.exclude)}
    return ", ".join([text, *(f"{count} {name}" for name, count in counts.items() if count)])


def _words(spec: QuantSpec) -> str:
    words = [f"{spec.num_bits} bits", "symmetric" if spec.symmetric else "asymmetric"]
    words += ["narrow"] if spec.narrow_range else []
    words += ["per channel" if spec.per_channel else "per tensor", spec.observer]
    return ", ".join(words)


def _layers(plan: Plan) -> Iterator[str]:
    above: list[str] = []
    for row in plan.rows:
        if row.weight is None and row.output is None and not row.is_float:
            continue  # what only moves values has no quantizer
        *modules, layer = row.path.split("/")
        pairs = zip(above, modules, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        for depth in range(shared, len(modules)):
            yield f"{_indent(depth)}{modules[depth]}"
        above = modules
        yield from _quantizers(row, layer, _indent(len(modules)))


def _quantizers(row: Row, layer: str, indent: str) -> Iterator[str]:
    yield f"{indent}{layer}: {row.brief}" if row.brief != layer else f"{indent}{layer}"
    if row.weight is not None:
        yield f"{indent}  weight: {row.weight}"
    if row.output is not None:
        yield f"{indent}  output: {row.output}"
    elif row.is_float:
        yield f"{indent}  {row.note}"


def _indent(depth: int) -> str:
    return "  " * (depth + 1)


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line,
        terminal_width(),
        subsequent_indent=f"{indent}    ",
        break_on_hyphens=False,
    )

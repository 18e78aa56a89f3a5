"""What the rules of a configuration decide, and whether each has an effect."""

import dataclasses
import difflib
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from simqat_jax.config import SimQATConfig
from simqat_jax.ir.compound import CountedMean, Selected
from simqat_jax.ir.graph import Add, Clamp, Concat, Elementwise, Extremum, Mean, Move, Mul, Node
from simqat_jax.ir.plan import Placement, Step
from simqat_jax.numerics.folding import BatchNormFold
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.rules import Rule, around, deciding


class Decision(NamedTuple):
    """How an operation is quantized.

    Attributes:
      path: of the operation, as rules match it.
      rule: the place of the rule that decides it; None: the config does.
      quantize: False: it stays float.
      weight: of its kernel.
      activation: of its result.
      bn_fold: of the BatchNorm behind it.
    """

    path: str
    rule: int | None
    quantize: bool
    weight: QuantSpec
    activation: QuantSpec
    bn_fold: BatchNormFold

    def finished(self, step: Step, weights: Container[Node], refused: Mapping[str, str]) -> Step:
        """Add to a step its path, how its BatchNorm is folded, and why it stays float.

        Args:
          step: what is decided about.
          weights: the products whose kernels are quantized.
          refused: the reason, by path, of what cannot be quantized.
        """
        # Of what else stands in the module of a product out of reach, nothing is said.
        functional = Add | Mul | Extremum | Move | Mean | Elementwise | Clamp | Concat
        functional |= CountedMean | Selected
        blamed = not isinstance(step.node, functional)
        reason = refused.get("/".join(step.node.path), "") if blamed else ""
        reason = reason or ("" if self.quantize else "excluded")
        fold = self.bn_fold if step.norm is not None and step.node in weights else "none"
        return dataclasses.replace(step, fold=fold, reason=reason, rule=self.rule, path=self.path)


class Decisions:
    """What a configuration says of each operation."""

    def __init__(self, config: SimQATConfig):
        self.config = config
        self.rules = config.decisions

    def about(self, path: Sequence[str], kind: str) -> Decision:
        """Return what is decided about an operation, or an input of the model."""
        return self.of(deciding(self.rules, path, kind), path)

    def of(self, place: int | None, path: Sequence[str]) -> Decision:
        """Return what the rule in a place decides of a path; None: what the config does."""
        rule, config = Rule() if place is None else self.rules[place], self.config
        return Decision(
            "/".join(path),
            place,
            rule.quantize,
            rule.weight or config.weight,
            rule.activation or config.activation,
            rule.bn_fold or config.bn_fold,
        )


def check_rules(placement: Placement, config: SimQATConfig) -> None:
    """Check that every rule, and every part of it, has an effect on a planned model.

    Raises:
      ValueError: one has none; names what comes nearest to its pattern, or what it is about.
    """
    for number, rule in enumerate(config.rules):
        place = len(config.exclude) + number
        own = f"SimQATConfig.rules[{number}] (path={rule.path!r}"
        own += f", op={rule.op!r})" if rule.op else ")"
        about = [step for step in placement.steps if step.rule == place]
        quantizers = (placement.at[v] for v in placement.graph.inputs if v in placement.at)
        inputs = [q.name for q in quantizers if q.rule == place]
        if not about and not inputs:
            raise ValueError(f"{own} decides nothing. {_why(placement, rule)}")
        for part in rule.parts:
            if not _has_effect(placement, place, part):
                names = dict.fromkeys([*(step.path for step in about), *inputs])
                raise ValueError(
                    f"{own}: {part} has no effect on what it decides: "
                    f"{', '.join(list(names)[:8])}{', ...' if len(names) > 8 else ''}. "
                    f"{_NEEDED[part]} Leave {part} out of the rule, or correct its path."
                )


_NEEDED = {
    "weight": "Only convolutions and matrix products with a kernel have a weight.",
    "activation": "What only moves values, or shares its grid with a concatenation, keeps a grid.",
    "bn_fold": "Only a BatchNorm right behind a convolution or matrix product is folded.",
}


def _has_effect(placement: Placement, place: int, part: str) -> bool:
    if part == "bn_fold":
        steps = (step for step in placement.steps if step.rule == place)
        return any(step.norm is not None and step.node in placement.weights for step in steps)
    kernels = placement.weights.values()
    others = (*placement.at.values(), *placement.constants.values())
    return any(q.rule == place for q in (kernels if part == "weight" else others))


def _why(placement: Placement, rule: Rule) -> str:
    matching = [step for step in placement.steps if rule.matches(step.path.split("/"))]
    taken = next(
        (s for s in matching if s.rule is not None and rule.op in (None, s.node.kind)), None
    )
    if taken is not None:
        return f"What it matches, {taken.path}, an earlier rule decides: put it in front."
    if matching:
        kinds = ", ".join(sorted({step.node.kind for step in matching}))
        return f"What its path matches are operations of other kinds: {kinds}."
    paths = (step.path.split("/") for step in placement.steps)
    known = list(dict.fromkeys(name for path in paths for name in around(path)))
    near = difflib.get_close_matches(rule.path, known, n=5, cutoff=0.4) or known[:10]
    return f"No module or operation has such a path; near it are {', '.join(map(repr, near))}."

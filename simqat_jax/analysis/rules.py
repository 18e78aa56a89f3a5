"""Widths as rules of a configuration."""

import dataclasses
import glob
from collections.abc import Collection, Mapping

from simqat_jax.analysis.study import Kernel
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.plan import Placement, Step
from simqat_jax.rules import Rule


def with_widths(
    config: SimQATConfig, placement: Placement, widths: Mapping[Kernel, int]
) -> SimQATConfig:
    """Return a model's configuration with other widths of its kernels.

    A kernel of another width gets a rule of its own, in front of those that there are; so does one
    inside of such a layer. What the others decide of other layers stays; a rule, or a part of one,
    for which nothing is left is gone.

    Args:
      config: the model's.
      placement: its plan.
      widths: bits of each kernel.
    """
    steps = {kernel: placement.steps[kernel.steps[0]] for kernel in widths}
    changed = [_path(s) for k, s in steps.items() if widths[k] != k.quantizer.spec.num_bits]
    named = [k for k, s in steps.items() if any(_path(s)[: len(p)] == p for p in changed)]
    # A rule about a module is about all that is inside of it: what is inside comes first.
    named.sort(key=lambda kernel: -len(_path(steps[kernel])))
    own = [_rule(config, placement, steps[k], k, widths[k]) for k in named]
    taken = {placement.steps[number] for kernel in named for number in kernel.steps}
    first = len(config.exclude)
    left = [_left(placement, rule, first + n, taken) for n, rule in enumerate(config.rules)]
    return dataclasses.replace(config, rules=(*own, *(rule for rule in left if rule is not None)))


def _path(step: Step) -> tuple[str, ...]:
    return step.node.layer.path if step.node.layer is not None else step.node.path


def _rule(
    config: SimQATConfig, placement: Placement, step: Step, kernel: Kernel, num_bits: int
) -> Rule:
    """Return a kernel's rule, which keeps what another one says of its layer."""
    place = step.rule
    old = Rule() if place is None else config.decisions[place]
    kept = {} if place is None else _effective(placement, old, place, {step})
    path = glob.escape("/".join(_path(step))) or "*"  # the only layer of a model has no path
    spec = dataclasses.replace(kernel.quantizer.spec, num_bits=num_bits)
    return Rule(**{**kept, "path": path, "op": step.node.kind, "weight": spec})


def _left(placement: Placement, rule: Rule, place: int, taken: Collection[Step]) -> Rule | None:
    """Return what a rule still decides if some steps are no longer its own; None: nothing."""
    steps = {step for step in placement.steps if step.rule == place} - set(taken)
    inputs = [placement.at[v] for v in placement.graph.inputs if v in placement.at]
    if not steps and not any(quantizer.rule == place for quantizer in inputs):
        return None
    parts = dict.fromkeys(rule.parts) | _effective(placement, rule, place, steps)
    return dataclasses.replace(rule, **parts)


def _effective(
    placement: Placement, rule: Rule, place: int, steps: Collection[Step]
) -> dict[str, object]:
    """Return the parts of a rule that have an effect on some of its steps, or on inputs."""
    made = {v for step in steps for node in step.nodes for v in node.outputs}
    made |= set(placement.graph.inputs)
    activations = [q for v, q in placement.at.items() if v in made]
    activations += [q for slot, q in placement.constants.items() if slot.step in steps]
    effects = {
        "weight": any(step.node in placement.weights for step in steps),
        "activation": any(quantizer.rule == place for quantizer in activations),
        "bn_fold": any(s.norm is not None and s.node in placement.weights for s in steps),
    }
    return {name: getattr(rule, name) for name in rule.parts if effects[name]}

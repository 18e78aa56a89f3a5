"""What the widths of a plan stand in the way of: training with few bits, files with many."""

import warnings

from simqat_jax.config import SimQATConfig
from simqat_jax.ir.plan import Placement, Quantizer

MOST_BITS_IN_FILES = 8
"""Runtimes compute wider codes in float, or round them in ways of their own."""
_NAMED = 8
"""How many quantizers a message names."""


def too_wide(placement: Placement) -> list[Quantizer]:
    """Return the quantizers whose codes no ONNX and no TFLite file holds."""
    everything = placement.quantizers.values()
    return [q for q in everything if q.spec.num_bits > MOST_BITS_IN_FILES]


def check_targets(placement: Placement, config: SimQATConfig) -> None:
    """Check that the files that a model is for can hold its codes.

    Raises:
      ValueError: they cannot; names tensors, widths, and what decides them.
    """
    wide = too_wide(placement)
    if wide and config.targets:
        named = "\n".join(
            f"  {q.name}: {q.spec.num_bits} bits, by {_decided_by(q, config)}"
            for q in wide[:_NAMED]
        )
        more = f"\n  and {len(wide) - _NAMED} more" if len(wide) > _NAMED else ""
        raise ValueError(
            f"SimQATConfig.targets are {', '.join(config.targets)}, and their files hold at most "
            f"{MOST_BITS_IN_FILES} bits. More have\n{named}{more}\n"
            f"Give them QuantSpec(num_bits={MOST_BITS_IN_FILES}, ...) or fewer bits, or set "
            "targets=(): integer models (IntegerModel.save) compute with up to 16 bits."
        )


def _decided_by(quantizer: Quantizer, config: SimQATConfig) -> str:
    part = "weight" if quantizer.role == "weight" else "activation"
    rule = None if quantizer.rule is None else config.decisions[quantizer.rule]
    if rule is None or getattr(rule, part) is None:
        return f"SimQATConfig.{part}"
    return f"{part} of SimQATConfig.rules[{config.rules.index(rule)}] (path={rule.path!r})"


def warn_of_zeros(placement: Placement) -> None:
    """Warn of kernels of 2 bits that training is going to round to zero, nearly all of them.

    Above 0 they have one code. Where the largest of many thousand weights gets it, all below its
    half are zero, and what it learns widens the range further: of LeNet5's dense kernels 99.7 %
    were zero after 500 steps, and then it stopped to learn.
    """
    kernels = {q.name: q for q in placement.weights.values()}.values()
    dying = [
        q.name
        for q in kernels
        if q.spec.qmax == 1 and q.num_channels is None and not q.observer.fits_grid
    ]
    if dying:
        more = f" and {len(dying) - _NAMED} more" if len(dying) > _NAMED else ""
        warnings.warn(
            f"{', '.join(dying[:_NAMED])}{more}: 2 bits with one range per tensor, and its "
            "observer follows the largest weights. All below half of the largest one become 0, "
            "and training may drive nearly all of them there. Use observer='learned' or 'mse' in "
            "the weight's QuantSpec, or per_channel=True.",
            stacklevel=2,
        )

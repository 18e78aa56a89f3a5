"""What a model may cost, or must be as good as."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import SupportsFloat

import jax
import numpy as np

from simqat_jax.analysis.study import Kernel, Study
from simqat_jax.numerics.arguments import check_whole, shown

_REMEDY = (
    "Look at analysis.layers for what to leave float or give wider activations, or allow wider "
    "widths=."
)
_ROUNDING = 1e-9
"""Of differences of shares: 1 - 0.99 is above 0.01."""

Goodness = Callable[[Mapping[Kernel, int]], float]
"""Measures a model with kernels of these widths: the more the better."""


@dataclasses.dataclass(frozen=True)
class MaxBytes:
    """As many bytes for all kernels together, as integer models and ONNX files pack them.

    Codes of 2 bits take a quarter of a byte, those of 3 and 4 half of one. Biases and multipliers,
    12 bytes a channel, come on top. TFLite files pack 4 bits, and only where XNNPACK computes them.
    """

    nbytes: int

    def __post_init__(self) -> None:
        check_whole("MaxBytes", self.nbytes, 1)


@dataclasses.dataclass(frozen=True)
class MinSqnr:
    """As much signal to quantization noise at the model's outputs, in dB.

    20 dB is an error of a tenth of the outputs' size, 40 dB of a hundredth.
    """

    decibels: float

    def __post_init__(self) -> None:
        if isinstance(self.decibels, bool) or not isinstance(self.decibels, int | float):
            raise TypeError(f"MinSqnr takes a number of dB, got {shown(self.decibels)}.")

    @property
    def least(self) -> float:
        """The goodness that suffices."""
        return self.decibels

    def goodness(self, study: Study) -> Goodness:
        """Return what measures a model."""
        return lambda widths: study.error(widths).sqnr

    def unmet(self, best: float, bits: int) -> str:
        """Say that the widest kernels do not meet it."""
        return (
            f"budget: with kernels of {bits} bits the outputs have {best:.1f} dB, and MinSqnr is "
            f"{self.decibels:g}. {_REMEDY}"
        )


@dataclasses.dataclass(frozen=True)
class MaxDrop:
    """As little accuracy lost against the float model, on the examples of the analysis.

    Attributes:
      drop: a share: half a point is 0.005.
      score: accuracy, from the model's output for all examples, in their order; of labels `y`
        `lambda logits: (logits.argmax(-1) == y).mean()`. By default the share of examples with the
        float model's class, the highest along the last axis: whatever the labels are, accuracy
        falls by no more than the share of the others.

    Raises:
      TypeError: a `drop` that is no number, a `score` that cannot be called.
      ValueError: a `drop` below 0, or NaN.
    """

    drop: float
    score: Callable[[np.ndarray], SupportsFloat] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.drop, bool) or not isinstance(self.drop, int | float):
            raise TypeError(f"MaxDrop takes a share, half a point is 0.005, got {self.drop!r}.")
        if not self.drop >= 0:
            raise ValueError(
                f"MaxDrop must be 0 or more, got {self.drop}: accuracy may fall by it."
            )
        if self.score is not None and not callable(self.score):
            raise TypeError(
                f"MaxDrop.score must be a function of the outputs, got {shown(self.score)}. Write "
                "lambda logits: (logits.argmax(-1) == y).mean()."
            )

    @property
    def least(self) -> float:
        """The goodness that suffices."""
        return -self.drop - _ROUNDING

    def goodness(self, study: Study) -> Goodness:
        """Return what measures a model: how much its score is above that of the float model.

        Raises:
          ValueError: a model of several outputs, or of one without classes; a score that is not
            finite.
        """
        aims = _output(study.outputs(None))
        score = self.score or _same_classes(aims)

        def scored(outputs: np.ndarray) -> float:
            found = float(score(outputs))
            if not math.isfinite(found):
                raise ValueError(f"MaxDrop.score must return a finite number, got {found}.")
            return found

        top = scored(aims)
        return lambda widths: scored(_output(study.outputs(widths))) - top

    def unmet(self, best: float, bits: int) -> str:
        """Say that the widest kernels do not meet it."""
        return (
            f"budget: with kernels of {bits} bits the score falls by {-best:.4g}, and MaxDrop is "
            f"{self.drop:g}. {_REMEDY}"
        )


Budget = MaxBytes | MinSqnr | MaxDrop
"""What a model may cost, or must be as good as."""


def _same_classes(aims: np.ndarray) -> Callable[[np.ndarray], SupportsFloat]:
    """Return the share of examples whose class is that of the outputs `aims`."""
    if aims.ndim < 2 or aims.shape[-1] < 2:
        raise ValueError(
            f"MaxDrop compares classes, and outputs of shape {aims.shape} have none along their "
            "last axis. Pass score=, as lambda logits: ((logits[:, 0] > 0) == y).mean()."
        )
    classes = aims.argmax(-1)
    return lambda outputs: (outputs.argmax(-1) == classes).mean()


def _output(outputs: Iterable[list[jax.Array]]) -> np.ndarray:
    """Return the only output, for all examples."""
    batches = list(outputs)
    count = len(batches[0])
    if count > 1:
        raise ValueError(
            f"MaxDrop judges one output, and this call returns {count}. Analyze with method= one "
            "that returns the logits alone, or use MinSqnr."
        )
    return np.concatenate([outputs[0] for outputs in batches])

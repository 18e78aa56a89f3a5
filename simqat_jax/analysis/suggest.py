"""Suggest a width for each kernel, so that a model meets a budget."""

import dataclasses
from collections.abc import Mapping, Sequence

from simqat_jax.analysis.frontier import Frontier, Option
from simqat_jax.analysis.progress import Counter
from simqat_jax.analysis.result import Analysis
from simqat_jax.analysis.rules import with_widths
from simqat_jax.analysis.study import Kernel, Study
from simqat_jax.config import SimQATConfig
from simqat_jax.numerics.arguments import check_flag, check_kind, check_whole, shown


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


Budget = MaxBytes | MinSqnr
"""What a model may cost, or must be as good as."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Widths that meet a budget.

    Attributes:
      config: the model's, with a rule for each kernel of another width: `SimQAT(config)`.
      widths: bits of each kernel, by the name of its quantizer.
      nbytes: of all kernels.
      sqnr: of the outputs against the float model's, dB, as measured on the analysis' data with
        these widths, after nothing but calibration.
    """

    config: SimQATConfig
    widths: Mapping[str, int]
    nbytes: int
    sqnr: float

    def __str__(self) -> str:
        head = f"kernels of {self.nbytes:,} bytes, {self.sqnr:.1f} dB SQNR of the outputs"
        return "\n".join([head, *(f"{bits:>2} bits  {name}" for name, bits in self.widths.items())])


def suggest(
    analysis: Analysis,
    budget: Budget,
    *,
    widths: Sequence[int] = (2, 4, 8),
    progress: bool = True,
) -> Suggestion:
    """Choose a width for each kernel, by what it does to the outputs on the analysis' data.

    Each kernel is quantized alone with each width, in the analysis' compiled program; noise of
    several is taken for their sum. For `MaxBytes` the widths of least noise are those that fit; for
    `MinSqnr` the smallest that are good enough when they are measured together. Activations stay
    as they are.

    Args:
      analysis: what `analyze` returned, no copy of it.
      budget: `MaxBytes` of the kernels, or `MinSqnr` of the outputs.
      widths: bits to choose from.
      progress: write to stderr how far it is.

    Raises:
      TypeError: no Analysis, no budget, no widths.
      ValueError: a copy of an analysis, which has no data; a width that is none; a budget that
        nothing meets.

    Examples:
      >>> qmodel, x = SimQAT().apply(nn.Dense(2)), jnp.linspace(-1, 2, 12).reshape(4, 3)
      >>> variables = calibrate(qmodel, nn.Dense(2).init(jax.random.key(0), x), [x], progress=False)
      >>> analysis = analyze(qmodel, variables, [x], progress=False)
      >>> smaller = suggest(analysis, MaxBytes(3), progress=False)
      >>> smaller.widths, smaller.nbytes
      ({'kernel': 4}, 3)
      >>> smaller.config.rules[0].weight.num_bits
      4
    """
    check_flag("progress", progress)
    check_kind("analysis", analysis, Analysis, "analyze(...) returns one.")
    if not isinstance(budget, MaxBytes | MinSqnr):
        raise TypeError(
            f"budget must be MaxBytes(...) or MinSqnr(...), got {shown(budget)}. Say what the "
            "number is: bytes of all kernels, or dB of the outputs."
        )
    if analysis.study is None:
        raise ValueError(
            "this analysis is a copy, without its data. Pass what analyze returned in this process."
        )
    if not widths:
        raise ValueError("widths is empty: there is nothing to choose from. Pass (2, 4, 8).")
    for bits in widths:
        check_whole("widths", bits, 2)
    choices = _Choices(analysis.study, sorted(set(widths)), progress)
    study = analysis.study
    chosen = choices.within(budget) if isinstance(budget, MaxBytes) else choices.at_least(budget)
    named = {kernel.quantizer.name: bits for kernel, bits in chosen.items()}
    return Suggestion(
        config=with_widths(study.config, study.stages.placement, chosen),
        widths=named,
        nbytes=sum(study.kernel_bytes(kernel, bits) for kernel, bits in chosen.items()),
        sqnr=study.error(chosen).sqnr,
    )


class _Choices:
    """The best widths for each size.

    Args:
      study: the model and its data.
      widths: to choose from.
      progress: show how far it is.
    """

    def __init__(self, study: Study, widths: Sequence[int], progress: bool):
        self._study = study
        self._widths = widths
        wanted = [(kernel, bits) for kernel in study.kernels for bits in widths]
        line = Counter("suggest", study.batches * len(wanted), progress)
        errors = dict(zip(wanted, study.kernel_errors(wanted, line.done), strict=True))
        line.end()
        self._frontier = Frontier(
            [
                [Option(study.kernel_bytes(k, bits), errors[k, bits].noise) for bits in widths]
                for k in study.kernels
            ]
        )

    def within(self, budget: MaxBytes) -> dict[Kernel, int]:
        """Return the widths of least noise that fit."""
        least = self._frontier.caps[0]
        if least > budget.nbytes:
            raise ValueError(
                f"budget: kernels of {min(self._widths)} bits take {least:,} bytes, and MaxBytes "
                f"is {budget.nbytes:,}. Allow more bytes, or narrower widths=."
            )
        return self._of(budget.nbytes)

    def at_least(self, budget: MinSqnr) -> dict[Kernel, int]:
        """Return the smallest that are good enough when all are measured together."""
        caps = self._frontier.caps
        bad, good = -1, len(caps) - 1
        best = self._sqnr(caps[good])
        if best < budget.decibels:
            raise ValueError(
                f"budget: with kernels of {max(self._widths)} bits the outputs have {best:.1f} dB, "
                f"and MinSqnr is {budget.decibels:g}. Look at analysis.layers for what to leave "
                "float or give wider activations, or allow wider widths=."
            )
        while good - bad > 1:
            middle = (good + bad) // 2
            if self._sqnr(caps[middle]) >= budget.decibels:
                good = middle
            else:
                bad = middle
        return self._of(caps[good])

    def _of(self, cap: int) -> dict[Kernel, int]:
        chosen = self._frontier.choice(cap)
        pairs = zip(self._study.kernels, chosen, strict=True)
        return {kernel: self._widths[number] for kernel, number in pairs}

    def _sqnr(self, cap: int) -> float:
        return self._study.error(self._of(cap)).sqnr

"""Suggest a width for each kernel, so that a model meets a budget."""

import dataclasses
from collections.abc import Mapping, Sequence

from simqat_jax.analysis.measures import Error
from simqat_jax.analysis.progress import Counter
from simqat_jax.analysis.result import Analysis
from simqat_jax.analysis.rules import with_widths
from simqat_jax.analysis.study import Kernel, Study
from simqat_jax.config import SimQATConfig
from simqat_jax.numerics.arguments import check_flag, check_kind, check_whole, shown


@dataclasses.dataclass(frozen=True)
class MaxBytes:
    """As many bytes for all kernels together, as integer models and ONNX files pack them.

    Codes of 2 and of 3 or 4 bits take a quarter and half of a byte. Biases and multipliers, 12 bytes
    for each channel, come on top. TFLite files pack kernels of 4 bits where XNNPACK computes them.
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

    Each kernel is quantized alone with each width, in the analysis' compiled program. From the
    widest kernels on, the step comes first that costs the least noise for each byte it saves. For
    `MaxBytes` it ends where the kernels fit, for `MinSqnr` with the last widths that are, measured
    together, good enough. Activations stay as they are.

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
    for bits in widths:
        check_whole("widths", bits, 2)
    path = _Path(analysis.study, sorted(set(widths), reverse=True), progress)
    study = analysis.study
    chosen = path.within(budget) if isinstance(budget, MaxBytes) else path.at_least(budget)
    named = {kernel.quantizer.name: bits for kernel, bits in chosen.items()}
    return Suggestion(
        config=with_widths(study.config, study.stages.placement, chosen),
        widths=named,
        nbytes=path.nbytes(chosen),
        sqnr=study.error(chosen).sqnr,
    )


class _Path:
    """Choices of widths, each smaller than the one before it.

    Args:
      study: the model and its data.
      widths: to choose from, the widest first.
      progress: show how far it is.
    """

    def __init__(self, study: Study, widths: Sequence[int], progress: bool):
        self._study = study
        self._widths = widths
        wanted = [(kernel, bits) for kernel in study.kernels for bits in widths]
        line = Counter("suggest", study.batches * len(wanted), progress)
        errors = study.kernel_errors(wanted, line.done)
        line.end()
        self._errors: dict[tuple[Kernel, int], Error] = dict(zip(wanted, errors, strict=True))
        self._choices = self._all()

    def nbytes(self, chosen: Mapping[Kernel, int]) -> int:
        """Return the bytes of kernels of these widths."""
        return sum(self._study.kernel_bytes(kernel, bits) for kernel, bits in chosen.items())

    def within(self, budget: MaxBytes) -> Mapping[Kernel, int]:
        """Return the first choice that fits, with what room is left given to what needs it most."""
        fitting = next((c for c in self._choices if self.nbytes(c) <= budget.nbytes), None)
        if fitting is None:
            raise ValueError(
                f"budget: kernels of {self._widths[-1]} bits take "
                f"{self.nbytes(self._choices[-1]):,} bytes, and MaxBytes is {budget.nbytes:,}. "
                "Allow more bytes, or narrower widths=."
            )
        room = dict(fitting)
        for kernel, bits in sorted(fitting.items(), key=lambda c: -self._errors[c].noise):
            for wider in (w for w in self._widths if w > bits):
                if self.nbytes({**room, kernel: wider}) <= budget.nbytes:
                    room[kernel] = wider
                    break
        return room

    def at_least(self, budget: MinSqnr) -> Mapping[Kernel, int]:
        """Return the last choice that is good enough when it is measured."""
        good, bad = -1, len(self._choices)
        best = self._study.error(self._choices[0]).sqnr
        if best < budget.decibels:
            raise ValueError(
                f"budget: with kernels of {self._widths[0]} bits the outputs have {best:.1f} dB, "
                f"and MinSqnr is {budget.decibels:g}. Look at analysis.layers for what to leave "
                "float or give wider activations, or allow wider widths=."
            )
        good = 0
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._study.error(self._choices[middle]).sqnr >= budget.decibels:
                good = middle
            else:
                bad = middle
        return self._choices[good]

    def _all(self) -> list[dict[Kernel, int]]:
        """Return all choices, from the widest kernels to the narrowest."""
        choices = [dict.fromkeys(self._study.kernels, self._widths[0])]
        while True:
            now = choices[-1]
            steps = [
                (self._cost(kernel, bits, narrower), kernel, narrower)
                for kernel, bits in now.items()
                for narrower in self._widths
                if narrower < bits
            ]
            if not steps:
                return choices
            _, kernel, narrower = min(steps, key=lambda step: step[0])
            choices.append({**now, kernel: narrower})

    def _cost(self, kernel: Kernel, bits: int, narrower: int) -> float:
        """Return the noise for each byte saved; of what saves none, infinite."""
        saved = self._study.kernel_bytes(kernel, bits) - self._study.kernel_bytes(kernel, narrower)
        noise = self._errors[kernel, narrower].noise - self._errors[kernel, bits].noise
        return noise / saved if saved else float("inf")

"""Suggest a width for each kernel, so that a model meets a budget."""

import dataclasses
from collections.abc import Mapping, Sequence

from simqat_jax.analysis.budgets import Budget, MaxBytes, MaxDrop, MinSqnr
from simqat_jax.analysis.frontier import Frontier, Option
from simqat_jax.analysis.progress import Counter
from simqat_jax.analysis.result import Analysis
from simqat_jax.analysis.rules import with_widths
from simqat_jax.analysis.study import Kernel, Study
from simqat_jax.config import SimQATConfig
from simqat_jax.numerics.arguments import check_flag, check_kind, check_whole, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Widths that meet a budget.

    Attributes:
      config: the model's, with a rule for each kernel of another width: `SimQAT(config)`.
      widths: bits of each kernel, by the name of its quantizer.
      nbytes: of all kernels.
      sqnr: of the outputs against the float model's, dB, as measured on the analysis' data with
        these widths, after nothing but calibration.
      drop: how far the score falls there, likewise measured; None: the budget is no `MaxDrop`.
    """

    config: SimQATConfig
    widths: Mapping[str, int]
    nbytes: int
    sqnr: float
    drop: float | None = None

    def __str__(self) -> str:
        head = f"kernels of {self.nbytes:,} bytes, {self.sqnr:.1f} dB SQNR of the outputs"
        if self.drop is not None:
            head += f", {100 * self.drop:.2f} points lost"
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
    `MinSqnr` and `MaxDrop` the smallest that are good enough when they are measured together.
    Activations stay as they are. Another budget for the same analysis measures no kernel again.

    Args:
      analysis: what `analyze` returned, no copy of it.
      budget: `MaxBytes` of the kernels, `MinSqnr` of the outputs, or `MaxDrop` of accuracy.
      widths: bits to choose from.
      progress: write to stderr how far it is.

    Raises:
      TypeError: no Analysis, no budget, no widths.
      ValueError: a copy of an analysis, which has no data; a width that is none; a budget that
        nothing meets; for `MaxDrop` several outputs, or a score that is not finite.

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
    study = _checked(analysis, budget, widths)
    choices = _Choices(study, sorted(set(widths)), progress)
    drop = None
    if isinstance(budget, MaxBytes):
        chosen = choices.within(budget)
    else:
        chosen, found = choices.smallest(budget)
        drop = 0.0 - found if isinstance(budget, MaxDrop) else None
    named = {kernel.quantizer.name: bits for kernel, bits in chosen.items()}
    return Suggestion(
        config=with_widths(study.config, study.stages.placement, chosen),
        widths=named,
        nbytes=sum(study.kernel_bytes(kernel, bits) for kernel, bits in chosen.items()),
        sqnr=study.error(chosen).sqnr,
        drop=drop,
    )


def _checked(analysis: Analysis, budget: Budget, widths: Sequence[int]) -> Study:
    """Return the data of an analysis; raise as `suggest` for what cannot be chosen from."""
    check_kind("analysis", analysis, Analysis, "analyze(...) returns one.")
    if not isinstance(budget, MaxBytes | MinSqnr | MaxDrop):
        raise TypeError(
            f"budget must be MaxBytes(...), MinSqnr(...) or MaxDrop(...), got {shown(budget)}. Say "
            "what the number is: bytes of all kernels, dB of the outputs, or a share of accuracy."
        )
    if analysis.study is None:
        raise ValueError(
            "this analysis is a copy, without its data. Pass what analyze returned in this process."
        )
    if not widths:
        raise ValueError("widths is empty: there is nothing to choose from. Pass (2, 4, 8).")
    for bits in widths:
        check_whole("widths", bits, 2)
    return analysis.study


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
        missing = [choice for choice in wanted if choice not in study.alone]
        if missing:
            line = Counter("suggest", study.batches * len(missing), progress)
            study.measure_alone(missing, line.done)
            line.end()
        self._frontier = Frontier(
            [
                [Option(study.kernel_bytes(k, bits), study.alone[k, bits].noise) for bits in widths]
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

    def smallest(self, budget: MinSqnr | MaxDrop) -> tuple[dict[Kernel, int], float]:
        """Return the smallest that are good enough when all are measured together, and how good."""
        caps, goodness = self._frontier.caps, budget.goodness(self._study)
        bad, good = -1, len(caps) - 1
        best = goodness(self._of(caps[good]))
        if best < budget.least:
            raise ValueError(budget.unmet(best, max(self._widths)))
        while good - bad > 1:
            middle = (good + bad) // 2
            found = goodness(self._of(caps[middle]))
            if found >= budget.least:
                good, best = middle, found
            else:
                bad = middle
        return self._of(caps[good]), best

    def _of(self, cap: int) -> dict[Kernel, int]:
        chosen = self._frontier.choice(cap)
        pairs = zip(self._study.kernels, chosen, strict=True)
        return {kernel: self._widths[number] for kernel, number in pairs}

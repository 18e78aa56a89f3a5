"""Quantized models that have observed one batch, and their integer models."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from compilation import quickly
from zoo import ALIKE, Case

import simqat_jax as sq

RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
KEY = RNGS["params"]
EXPORTS = {"onnx": sq.export_onnx, "tflite": sq.export_tflite}
ONE_BY_DAY = [pytest.param("onnx", marks=pytest.mark.nightly), "tflite"]
"""The files, for what does not tell them apart."""


class TwoLayers(nn.Module):
    """The smallest model with a tensor between layers."""

    @nn.compact
    def __call__(self, x, train=False):
        del train
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


def initialized(model: nn.Module, *args: Any, **config) -> tuple[sq.QuantizedModule, Any]:
    """Return the quantized model and its first variables, which have observed nothing."""
    qmodel = sq.SimQAT(sq.SimQATConfig(**config)).apply(model)
    return qmodel, qmodel.init(KEY, *args)


def step(qmodel: sq.QuantizedModule, variables: Any, *args: Any, **kwargs) -> tuple[Any, Any]:
    """Observe one batch, without jit; return the output and the variables after it."""
    y, updates = qmodel.apply(variables, *args, **kwargs, mutable=["quant_stats"])
    return y, {**variables, **updates}


def observed(
    model: nn.Module, *args: Any, config: sq.SimQATConfig | None = None, rngs: Any = RNGS, **kwargs
) -> tuple[sq.QuantizedModule, dict[str, Any], Any]:
    """Initialise and observe one batch; return the quantized model, its variables, the output.

    Compiled quickly: what tests compare is evaluation.
    """
    qmodel = sq.SimQAT(config).apply(model)

    @jax.jit
    def run():
        variables = qmodel.init(rngs, *args, **kwargs)
        y, updates = qmodel.apply(variables, *args, **kwargs, rngs=rngs, mutable=["quant_stats"])
        return {**variables, **updates}, y

    with quickly():
        return qmodel, *run()


def trained(
    case: Case, config: sq.SimQATConfig | None = None, rngs: Any = RNGS
) -> tuple[sq.QuantizedModule, dict[str, Any], Any]:
    """Observe one batch of a case; return the model, its variables and its evaluation, jitted."""
    qmodel, variables, _ = observed(case.model, *case.args, config=config, rngs=rngs, **case.kwargs)
    evaluate = jax.jit(lambda variables, *args: qmodel.apply(variables, *args, **case.kwargs))
    return qmodel, variables, evaluate


def converted(
    case: Case, config: sq.SimQATConfig | None = None, rngs: Any = RNGS
) -> sq.IntegerModel:
    """Observe one batch of a case; return the integer model."""
    qmodel, variables, _ = observed(case.model, *case.args, config=config, rngs=rngs, **case.kwargs)
    return sq.convert(qmodel, variables, *case.args, **case.kwargs)


def export(model: sq.IntegerModel, path: Path, **options: Any) -> None:
    """Write the file of the runtime whose rounding the model mirrors."""
    EXPORTS[model.backend](model, path, **options)


def assert_files_agree(qmodel: sq.QuantizedModule, variables: Any, folder: Path, *args: Any):
    """The integer model of each runtime and its file return the same, at two batch sizes."""
    for backend in EXPORTS:
        model = sq.convert(qmodel, variables, *args, backend=backend)
        path = folder / f"model.{backend}"
        export(model, path)
        file = sq.open_file(path, threads=1, isolated=False)
        for size in (None, -1):
            cut = [np.asarray(x[:size]) for x in args]
            np.testing.assert_array_equal(file.run(cut)[0], model(*cut))


def by_night(names: Iterable[str]) -> list[Any]:
    """Names of cases; those that are like others are left to the night."""
    return [pytest.param(n, marks=pytest.mark.nightly if n in ALIKE else ()) for n in names]


def by_half(names: Iterable[Any], turn: int = 0) -> list[Any]:
    """Every other name of those that are like no others, from `turn` on; the rest at night."""
    names = list(names)
    by_day = [n for n in names if n not in ALIKE][turn::2]
    return [pytest.param(n, marks=() if n in by_day else pytest.mark.nightly) for n in names]


def by_turns(names: Iterable[str], every: int = 1) -> list[Any]:
    """Each name with one of the backends, the next with the other; the other pairs at night.

    Args:
      names: of cases.
      every: of so many names one is tested by day.
    """

    def marks(n: int, turn: int) -> Any:
        by_day = n % every == 0 and (n // every + turn) % 2 == 0
        return () if by_day else pytest.mark.nightly

    return [
        pytest.param(name, backend, marks=marks(n, turn))
        for n, name in enumerate(names)
        for turn, backend in enumerate(EXPORTS)
    ]


def assert_same(got: Any, want: Any) -> None:
    """Every element of every array is equal; the float types may differ."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))

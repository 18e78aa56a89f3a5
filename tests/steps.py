"""One step of a planned model alone: its codes from codes, without training or a program."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from models import KEY
from zoo import Model

import simqat_jax as sq
from simqat_jax.ir.graph import Constant, Node
from simqat_jax.ir.plan import Placement
from simqat_jax.numerics.grid import Codes, real_values
from simqat_jax.numerics.rounding import ROUNDINGS
from simqat_jax.ops.operation import Everywhere, ExactStep
from simqat_jax.ops.registry import operation_of
from simqat_jax.training.module import trace
from simqat_jax.training.planner import place_quantizers


def placed(body: Any, *shapes: tuple[int, ...]) -> Placement:
    """The plan of a model with a layer behind; nothing is computed."""
    return planned(lambda *args: nn.Dense(2)(body(*args)), *shapes)


def planned(body: Any, *shapes: tuple[int, ...]) -> Placement:
    """The plan of a model; nothing is computed."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    qmodel = sq.SimQAT().apply(Model(body))
    variables = jax.eval_shape(qmodel.init, KEY, *args)
    captured = trace(qmodel, variables, tuple(args), {}, None, rngs={"params": KEY}, dry=True)
    return place_quantizers(captured.graph, qmodel.config)


@functools.cache
def step_of(kind: type[Node], body: Any, *shapes: tuple[int, ...]) -> Any:
    """The first step of a kind, quantized if one is."""
    found = [s for s in placed(body, *shapes).steps if isinstance(s.node, kind)]
    return next((s for s in found if s.quantized), found[0])


def grid(scale: float, zero: int, bits: int = 8) -> sq.Grid:
    """An asymmetric grid."""
    return sq.Grid(float(np.float32(scale)), zero, 0, 2**bits - 1)


def codes_of(
    step: Any,
    inputs: Sequence[Codes | None],
    y: sq.Grid,
    others: Sequence[Any] = (),
    backend: str = "tflite",
    **given: Any,
) -> Any:
    """The codes of a step, centered; `others` are its next inputs, unless they are constants."""
    constants = [v.value if isinstance(v, Constant) else None for v in step.node.inputs]
    known = [*(v and real_values(v) for v in inputs), *others]
    reals = [*known, *constants[len(known) :]]
    codes = [*inputs, *[None] * (len(reals) - len(inputs))]
    fields = {"layers": (), "quantize_kernel": lambda kernel: kernel} | given
    at = ExactStep(step, codes, reals, grid=y, rounding=ROUNDINGS[backend], **fields)
    codes = operation_of(step.node).codes(at)
    return codes.codes if isinstance(codes, Everywhere) else codes


def random(shape: Sequence[int], on: sq.Grid, seed: int = 0) -> Codes:
    """Any codes of a grid."""
    codes = np.random.default_rng(seed).integers(on.qmin, on.qmax + 1, shape)
    return Codes(jnp.asarray(codes - int(on.zero_point), jnp.float32), on)

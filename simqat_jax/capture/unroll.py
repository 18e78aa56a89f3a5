"""Loops of known length, step by step: what a step reads, where it stands, what zeros do to it."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from simqat_jax.ir.graph import CONTRACTIONS, Constant, Operand, shape_of

MAX_STEPS = 64
"""How many steps of a loop, those of loops inside of it counted, are unrolled at most.

What compiles grows faster than the loop: XLA fuses the gradient of a carry anew for each step. The
training step of an LSTM compiles in 3 times the seconds when its sequence is twice as long.
"""

_ZERO_STAYS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy split concatenate "
    "convert_element_type stop_gradient add sub neg mul".split()
)
"""What makes zeros of zeros."""


class Iteration(NamedTuple):
    """A step of a loop that is unrolled.

    Attributes:
      path: of the module that is repeated.
      number: which step, from 0 on, in the order in which they run.
      layered: each step has kernels of its own; else all steps are one layer, called again.
    """

    path: tuple[str, ...]
    number: int
    layered: bool


def common_path(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the path of the innermost module that all paths are inside of."""
    levels = zip(*paths, strict=False)
    same = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return tuple(names[0] for names in same)


def numbered(path: tuple[str, ...], loops: Sequence[Iteration]) -> tuple[str, ...]:
    """Put the number of each layer of a loop into a path, behind the module that is repeated.

    Args:
      path: of a module or parameter.
      loops: the steps that it stands in, outermost first.
    """
    for loop in reversed(loops):
        if loop.layered:
            depth = len(common_path((path, loop.path)))
            path = (*path[:depth], str(loop.number), *path[depth:])
    return path


class Loop:
    """A `scan`, taken apart.

    Attributes:
      closed: what each step runs: (constants, carries, slices) to (carries, results).
      constants: how many operands all steps read as they are.
      carries: how many operands each step replaces for the next one.
      length: how many steps there are.
      order: the place of each step in what it reads and returns, as they run.
    """

    def __init__(self, eqn: core.JaxprEqn):
        params = eqn.params
        self.closed: core.ClosedJaxpr = params["jaxpr"]
        self.constants: int = params["num_consts"]
        self.carries: int = params["num_carry"]
        self.length: int = params["length"]
        self.order = range(self.length)[:: -1 if params["reverse"] else 1]

    @property
    def read_whole(self) -> int:
        """How many operands are read whole; the others are sliced."""
        return self.constants + self.carries


def steps_of(eqn: core.JaxprEqn) -> int:
    """Return how many times the innermost products of a `scan` would stand in the graph."""
    return eqn.params["length"] * max(1, _steps_inside(eqn))


def _steps_inside(eqn: core.JaxprEqn) -> int:
    inner = [e for sub in core.jaxprs_in_params(eqn.params) for e in sub.eqns]
    scans = sum(steps_of(e) for e in inner if e.primitive.name == "scan" and multiplies(e))
    return scans + sum(_steps_inside(e) for e in inner if e.primitive.name != "scan")


def multiplies(eqn: core.JaxprEqn) -> bool:
    """Whether an equation holds convolutions or matrix products, at any depth."""
    inner = (e for sub in core.jaxprs_in_params(eqn.params) for e in sub.eqns)
    return any(e.primitive.name in CONTRACTIONS or multiplies(e) for e in inner)


# What steps read and return ----------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def at_index(shape: tuple[int, ...], dtype: np.dtype, index: int) -> core.ClosedJaxpr:
    """Return the function that takes one slice along the first axis."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    return jax.make_jaxpr(lambda x: lax.index_in_dim(x, index, keepdims=False))(array)


def stacked(aval: jax.ShapeDtypeStruct, count: int) -> core.ClosedJaxpr:
    """Return the function that stacks as many arrays."""
    return jax.make_jaxpr(lambda *xs: jnp.stack(xs))(*[aval] * count)


# Zeros -------------------------------------------------------------------------------------------


def keeps_zeros(eqn: core.JaxprEqn) -> bool:
    """Whether an operation on zeros returns zeros."""
    return eqn.primitive.name in _ZERO_STAYS


def is_zero(value: object) -> bool:
    """Whether a constant is known to be zero everywhere."""
    return isinstance(value, bool | int | float | np.ndarray | np.generic) and not np.any(value)


def vanishes(eqn: core.JaxprEqn, zero: Sequence[bool]) -> bool:
    """Whether an operation returns zeros because some of its operands are.

    Args:
      eqn: the equation.
      zero: of each operand, whether it is zero everywhere.
    """
    return any(zero) and eqn.primitive.name in ("mul", *CONTRACTIONS)


def passed(eqn: core.JaxprEqn, zero: Sequence[bool]) -> int | None:
    """Return which operand an operation returns, broadcast maybe, because the other is zero.

    Args:
      eqn: the equation.
      zero: of each operand, whether it is zero everywhere.
    """
    match eqn.primitive.name, list(zero):
        case "add" | "add_any" | "sub", [False, True]:
            return 0
        case "add" | "add_any", [True, False]:
            return 1
    return None


def broadcast(aval: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> core.ClosedJaxpr:
    """Return the function that broadcasts an array of as many axes."""
    return jax.make_jaxpr(lambda x: lax.broadcast_in_dim(x, shape, range(len(shape))))(aval)


def zeros(aval: jax.ShapeDtypeStruct) -> core.ClosedJaxpr:
    """Return the function that makes zeros."""
    return jax.make_jaxpr(lambda: lax.full(aval.shape, 0, aval.dtype))()


def wrapped(key: jax.Array) -> tuple[np.ndarray, core.ClosedJaxpr]:
    """Return the numbers of a random key, and the function that makes it of them."""
    with jax.ensure_compile_time_eval():
        numbers = np.asarray(jax.random.key_data(key))
    impl = jax.random.key_impl(key)
    return numbers, jax.make_jaxpr(lambda x: jax.random.wrap_key_data(x, impl=impl))(numbers)


def known_integer(eqn: core.JaxprEqn, inputs: Sequence[Operand]) -> Constant | None:
    """Return the result of an operation on integers that are known: of a counter, for instance."""
    values = [np.asarray(v.value) for v in inputs if isinstance(v, Constant)]
    whole = all(v.ndim == 0 and v.dtype.kind in "biu" for v in values)
    if len(values) < len(inputs) or not whole or not values or len(eqn.outvars) != 1:
        return None
    if shape_of(eqn.outvars[0]).shape or list(core.jaxprs_in_params(eqn.params)) or eqn.effects:
        return None
    with jax.ensure_compile_time_eval():
        return Constant(np.asarray(eqn.primitive.bind(*values, **eqn.params)))

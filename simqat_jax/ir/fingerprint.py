"""Tell whether two captured calls compute the same."""

import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Mapping, Sequence, Set
from types import FunctionType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from simqat_jax.ir.graph import shape_of

_SKIPPED = ("run", "parent", "name")
"""Fields that tell nothing: a node runs what it was captured as, a module is what it holds."""
_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")
_PRIMALS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class UnknownError(Exception):
    """A value is not known yet, or not here: it has no fingerprint."""


def fingerprint(value: object) -> Hashable:
    """Return what is equal for values that mean the same.

    Captured twice, a call holds new functions and new jaxprs: they count by what they are made of.
    A custom derivative is made anew by every trace and left out, so what sets it, attributes of the
    model and arguments, has to be part of a key.

    Args:
      value: graphs, modules and other dataclasses, containers, arrays, jaxprs, functions.

    Raises:
      UnknownError: a tracer is part of it, or an array on other hosts.
    """
    kind = type(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _of_array(value)
    if isinstance(value, float | complex):
        return kind, repr(value)  # 0.0 and -0.0 are two, NaN is one
    if isinstance(value, core.ClosedJaxpr):
        return _of_jaxpr(value.jaxpr), fingerprint(value.consts)
    if isinstance(value, core.Jaxpr):
        return _of_jaxpr(value)
    if isinstance(value, core.JaxprEqn):
        return _of_equation(value, [shape_of(v) for v in value.invars])
    if isinstance(value, FunctionType):
        return value.__qualname__, value.__code__
    if isinstance(value, functools.partial):
        return kind, fingerprint((value.func, value.args, value.keywords))
    return _of_container(value)


def _of_container(value: object) -> Hashable:
    kind = type(value)
    if isinstance(value, Mapping):
        return kind, tuple((fingerprint(k), fingerprint(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return kind, tuple(map(fingerprint, value))
    if isinstance(value, Set):
        return kind, frozenset(map(fingerprint, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.name not in _SKIPPED]
        return kind, tuple(fingerprint(getattr(value, name, None)) for name in names)
    return (kind, value) if isinstance(value, Hashable) else kind


def _of_array(value: np.ndarray | np.generic | jax.Array) -> Hashable:
    if isinstance(value, Tracer):
        raise UnknownError
    if isinstance(value, jax.Array):
        if not value.is_fully_addressable:
            raise UnknownError
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return str(value.dtype), _of_array(jax.random.key_data(value))
    array = np.asarray(value)
    digest = hashlib.blake2b(array.tobytes(), digest_size=20).digest()
    return array.shape, str(array.dtype), digest


def _of_jaxpr(jaxpr: core.Jaxpr) -> Hashable:
    numbers: dict[core.Var, int] = {}

    def new(variables: Sequence[core.Var]) -> Hashable:
        for v in variables:
            numbers[v] = len(numbers)
        return tuple(map(shape_of, variables))

    def read(v: core.Var | core.Literal) -> Hashable:
        return (shape_of(v), fingerprint(v.val)) if isinstance(v, core.Literal) else numbers[v]

    inputs = new(jaxpr.constvars), new(jaxpr.invars)
    equations = [
        (_of_equation(eqn, [read(v) for v in eqn.invars]), new(eqn.outvars)) for eqn in jaxpr.eqns
    ]
    return inputs, tuple(equations), tuple(map(read, jaxpr.outvars))


def _of_equation(eqn: core.JaxprEqn, inputs: Sequence[Hashable]) -> Hashable:
    params = {name: value for name, value in eqn.params.items() if name != "name"}
    if eqn.primitive.name in _DERIVATIVES:
        params = {name: params[name] for name in _PRIMALS if name in params}
    outputs = tuple(map(shape_of, eqn.outvars))
    return eqn.primitive.name, tuple(inputs), fingerprint(params), outputs

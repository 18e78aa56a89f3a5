"""From a jaxpr with its nested calls to nodes: rules, tried in order on every equation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.capture.classify import (
    CONTRACTIONS,
    clamp_bounds,
    classify,
    display_name,
    function_name,
    is_float_function,
    is_named_function,
)
from simqat_jax.capture.interception import (
    LAYER_MARK,
    MakeNode,
    Recorder,
    Scope,
    excluded,
)
from simqat_jax.ir.graph import (
    Clamp,
    Constant,
    Contraction,
    Float,
    Move,
    Node,
    Operand,
    Remat,
    shape_of,
)
from simqat_jax.ir.replay import INLINED_CALLS

_REMAT = ("remat2", "remat", "checkpoint")
# Stands for the result of an operation without one, so that every node has an output.
_NO_RESULT = np.zeros((), bool)

_Run = Callable[..., Sequence[jax.Array | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Equation:
    """One equation, and where it stands.

    Attributes:
      eqn: the equation.
      inputs: its operands in the graph.
      scope: the call of a module's method that it belongs to.
      remat: the call of `nn.remat` that it is inside of.
    """

    eqn: core.JaxprEqn
    inputs: tuple[Operand, ...]
    scope: Scope
    remat: Remat | None

    @property
    def path(self) -> tuple[str, ...]:
        return self.scope.path

    @property
    def primitive(self) -> str:
        return self.eqn.primitive.name


class Flattener:
    """Turns a jaxpr with its nested calls into nodes.

    Attributes:
      recorder: what the interceptor noted down while the jaxpr was traced.
      nodes: so far, in the order of evaluation.
      avals: shape and dtype of every tensor so far.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.nodes: list[Node] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self._remats = 0

    def new(self, aval: jax.ShapeDtypeStruct) -> int:
        """Return the number of a new tensor."""
        v = len(self.avals)
        self.avals[v] = aval
        return v

    def inline(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[ArrayLike],
        inputs: Sequence[Operand],
        scope: Scope,
        remat: Remat | None = None,
    ) -> tuple[Operand, ...]:
        """Append the nodes of `jaxpr` called on `inputs`; return its outputs."""
        env: dict[core.Var, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))

        def read(v: core.Var | core.Literal) -> Operand:
            return Constant(v.val) if isinstance(v, core.Literal) else env[v]

        for eqn in jaxpr.eqns:
            where = self.recorder.scope_of(eqn, scope)
            outputs = self._apply_rules(_Equation(eqn, tuple(map(read, eqn.invars)), where, remat))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return tuple(map(read, jaxpr.outvars))

    def emit(self, at: _Equation, make: MakeNode, op: str, run: _Run) -> tuple[int, ...]:
        """Append a node for an equation; return its outputs."""
        none = jax.ShapeDtypeStruct(_NO_RESULT.shape, _NO_RESULT.dtype)
        outputs = tuple(map(self.new, map(shape_of, at.eqn.outvars))) or (self.new(none),)
        node = make(
            op=op,
            path=at.path,
            inputs=at.inputs,
            outputs=outputs,
            run=run,
            eqn=at.eqn,
            remat=at.remat,
            effects=bool(at.eqn.effects),
        )
        self.nodes.append(node)
        return outputs[: len(at.eqn.outvars)]

    def next_remat(self, eqn: core.JaxprEqn) -> Remat:
        """Return the next call of `nn.remat`."""
        self._remats += 1
        return Remat(self._remats, eqn.params["policy"], eqn.params["prevent_cse"])

    def _apply_rules(self, at: _Equation) -> Sequence[Operand]:
        results = (rule(self, at) for rule in RULES)
        return next(outputs for outputs in results if outputs is not None)


# Rules -------------------------------------------------------------------------------------------

Rule = Callable[[Flattener, _Equation], Sequence[Operand] | None]
"""Returns the outputs of an equation; None: it is the next rule's."""


def _layer(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """The boundary around a layer becomes its node; one that was transformed is float."""
    mark = _layer_mark(at.eqn)
    if mark is None:
        return None
    call = flat.recorder.calls[flat.recorder.place(mark)]
    at = dataclasses.replace(at, scope=Scope(call.layer.path, None))
    if tuple(shape_of(v).shape for v in at.eqn.invars) != call.shapes:  # vmap or grad
        return flat.emit(at, Float, call.op, bound(at.eqn))
    return flat.emit(at, call.make, call.op, _inlined(at.eqn))


def _remat(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """What `nn.remat` calls is inlined, and the nodes know the outermost call."""
    if at.primitive not in _REMAT:
        return None
    remat = flat.next_remat(at.eqn)
    return flat.inline(at.eqn.params["jaxpr"], (), at.inputs, at.scope, at.remat or remat)


def _folded_constant(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A conversion of a constant is a constant."""
    if at.primitive != "convert_element_type" or not isinstance(at.inputs[0], Constant):
        return None
    return (Constant(np.asarray(at.inputs[0].value, at.eqn.params["new_dtype"])),)


def _inlined_call(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A call is replaced by what it calls, unless that is a function known by its name."""
    if at.primitive not in INLINED_CALLS or _is_kept_whole(at):
        return None
    params = at.eqn.params
    closed = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return flat.inline(closed.jaxpr, closed.consts, at.inputs, at.scope, at.remat)


def _contraction(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A convolution or matrix product, of whatever it is."""
    if at.primitive not in CONTRACTIONS or excluded(at.path, flat.recorder.exclude):
        return None
    make = functools.partial(Contraction, module=at.scope.module)
    return flat.emit(at, make, display_name(at.eqn, None), bound(at.eqn))


def _operation(flat: Flattener, at: _Equation) -> Sequence[Operand]:
    """All else is one node, of a class of its own."""
    bounds = clamp_bounds(at.eqn, at.inputs)
    make = kind = classify(at.eqn, at.inputs)
    left_out = kind not in (Move, Clamp) and excluded(at.path, flat.recorder.exclude)
    if left_out or is_float_function(at.eqn):
        make = Float
    elif bounds:
        make = functools.partial(Clamp, bounds=bounds)
    return flat.emit(at, make, display_name(at.eqn, bounds), bound(at.eqn))


RULES: tuple[Rule, ...] = (
    _layer,
    _remat,
    _folded_constant,
    _inlined_call,
    _contraction,
    _operation,
)
"""In the order in which they are tried: each one relies on those before it."""


# Calls -------------------------------------------------------------------------------------------


def _is_kept_whole(at: _Equation) -> bool:
    if is_float_function(at.eqn):
        return not _layers_inside(at.eqn)
    return is_named_function(at.eqn, at.inputs)


def _layer_mark(eqn: core.JaxprEqn) -> str | None:
    """Return the mark of the layer whose boundary this is."""
    name = function_name(eqn)
    return name if name.startswith(LAYER_MARK) else None


def _layers_inside(eqn: core.JaxprEqn) -> bool:
    """Whether a call holds layers or products at any depth."""
    return any(
        _layer_mark(inner) is not None
        or inner.primitive.name in CONTRACTIONS
        or _layers_inside(inner)
        for sub in core.jaxprs_in_params(eqn.params)
        for inner in sub.eqns
    )


def bound(eqn: core.JaxprEqn) -> _Run:
    """Return what computes an equation's results, as a sequence."""

    def run(*values: jax.Array) -> Sequence[jax.Array | np.ndarray]:
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return (tuple(result) or (_NO_RESULT,)) if eqn.primitive.multiple_results else (result,)

    return run


def _inlined(eqn: core.JaxprEqn) -> _Run:
    closed = eqn.params["jaxpr"]
    return lambda *values: tuple(eval_jaxpr(closed.jaxpr, closed.consts, *values))

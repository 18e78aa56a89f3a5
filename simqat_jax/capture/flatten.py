"""From a jaxpr with its nested calls to nodes: rules, tried in order on every equation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.capture.classify import (
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
)
from simqat_jax.capture.unreachable import Origin, products_inside
from simqat_jax.capture.unroll import (
    MAX_STEPS,
    Iteration,
    Loop,
    at_index,
    broadcast,
    common_path,
    is_zero,
    keeps_zeros,
    known_integer,
    multiplies,
    numbered,
    passed,
    stacked,
    steps_of,
    vanishes,
    wrapped,
    zeros,
)
from simqat_jax.ir.graph import (
    CONTRACTIONS,
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
from simqat_jax.ir.replay import INLINED_CALLS, varying_as_traced
from simqat_jax.rules import left_out

_REMAT = ("remat2", "remat", "checkpoint")
# Stands for the result of an operation without one, so that every node has an output.
_NO_RESULT = np.zeros((), bool)

_Run = Callable[..., Sequence[jax.Array | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Where:
    """Where an operation stands.

    Attributes:
      scope: the call of a module's method that it belongs to.
      remat: the call of `nn.remat` that it is inside of.
      loops: the steps of unrolled loops that it is inside of, outermost first.
      position: its place in the model: that of the outermost call, of what stands in that, and so
        on. It is the same in all steps of a loop that calls one layer again and again.
    """

    scope: Scope
    remat: Remat | None = None
    loops: tuple[Iteration, ...] = ()
    position: tuple[int, ...] = ()

    def inside(self, *position: int) -> "Where":
        """Return a place inside of this one."""
        return dataclasses.replace(self, position=(*self.position, *position))

    @property
    def repeats(self) -> bool:
        """Whether other steps of a loop do the same."""
        return not all(loop.layered for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class _Equation:
    """One equation, its operands in the graph, and where it stands."""

    eqn: core.JaxprEqn
    inputs: tuple[Operand, ...]
    where: Where

    @property
    def path(self) -> tuple[str, ...]:
        return numbered(self.where.scope.path, self.where.loops)

    @property
    def primitive(self) -> str:
        return self.eqn.primitive.name


class Flattener:
    """Turns a jaxpr with its nested calls into nodes.

    Attributes:
      recorder: what the interceptor noted down while the jaxpr was traced.
      nodes: so far, in the order of evaluation.
      avals: shape and dtype of every tensor so far.
      fed: the tensors that depend on the model's arguments, so far.
      made_of: the parameters that each tensor is made of.
      parameters: the path of each parameter, and of each slice that one layer of a loop has.
      repeated: of what steps of a loop repeat, which tensor it is: the same in all of them.
      carried: what such loops start from.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.nodes: list[Node] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self.fed: set[int] = set()
        self.made_of: dict[int, frozenset[int]] = {}
        self.parameters: dict[int, tuple[str, ...]] = {}
        self.repeated: dict[int, tuple[int, ...]] = {}
        self.carried: set[int] = set()
        self._unnumbered: dict[int, tuple[str, ...]] = {}
        self._zeros: set[int] = set()
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
        where: Where,
    ) -> tuple[Operand, ...]:
        """Append the nodes of `jaxpr` called on `inputs`; return its outputs."""
        env: dict[core.Var, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        values = (self.constant(value, where) for value in consts)
        env.update(zip(jaxpr.constvars, values, strict=True))

        def read(v: core.Var | core.Literal) -> Operand:
            return Constant(v.val) if isinstance(v, core.Literal) else env[v]

        for number, eqn in enumerate(jaxpr.eqns):
            scope = self.recorder.scope_of(eqn, where.scope)
            at = dataclasses.replace(where.inside(number), scope=scope)
            outputs = self._apply_rules(_Equation(eqn, tuple(map(read, eqn.invars)), at))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return tuple(map(read, jaxpr.outvars))

    def constant(self, value: ArrayLike, where: Where) -> Operand:
        """Return a constant as an operand; a random key is made of numbers, as arrays are."""
        if not jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
            return Constant(value)
        assert isinstance(value, jax.Array)
        numbers, closed = wrapped(value)
        (key,) = self.inline(closed.jaxpr, closed.consts, (Constant(numbers),), where)
        return key

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
            remat=at.where.remat,
            effects=bool(at.eqn.effects),
        )
        self.nodes.append(node)
        self._follow(node, at)
        return outputs[: len(at.eqn.outvars)]

    def _follow(self, node: Node, at: _Equation) -> None:
        """Note down what the results of a node are made of."""
        tensors = [v for v in node.inputs if isinstance(v, int)]
        parameters = frozenset().union(*(self.made_of.get(v, ()) for v in tensors))
        if parameters:
            self.made_of.update(dict.fromkeys(node.outputs, parameters))
        if not self.fed.isdisjoint(tensors):
            self.fed.update(node.outputs)
        if keeps_zeros(at.eqn) and all(map(self.is_zero, node.inputs)):
            self._zeros.update(node.outputs)
        if at.where.repeats:
            places = (at.where.inside(n).position for n, _ in enumerate(node.outputs))
            self.repeated.update(zip(node.outputs, places, strict=True))

    def is_zero(self, v: Operand) -> bool:
        """Whether an operand is known to be zero everywhere."""
        return v in self._zeros if isinstance(v, int) else is_zero(v.value)

    def origin(self, v: Operand) -> Origin:
        """Return what an operand depends on."""
        return Origin(v in self.fed, v in self.made_of) if isinstance(v, int) else Origin()

    def parameter(self, v: int, path: tuple[str, ...], loops: Sequence[Iteration] = ()) -> None:
        """Note down that a tensor is a parameter, or the slice of one that a layer has."""
        self._unnumbered[v] = path
        self.parameters[v] = numbered(path, loops)
        self.made_of[v] = frozenset((v,))

    def slice(self, v: Operand, index: int, where: Where) -> Operand:
        """Return what a step of a loop reads of an operand."""
        if isinstance(v, Constant):
            return Constant(np.asarray(v.value)[index])
        closed = at_index(self.avals[v].shape, self.avals[v].dtype, index)
        (part,) = self.inline(closed.jaxpr, closed.consts, (v,), where)
        made_of = self.made_of.get(v, frozenset())
        if isinstance(part, int) and len(made_of) == 1 and where.loops[-1].layered:
            (whole,) = made_of
            self.parameter(part, self._unnumbered[whole], where.loops)
        return part

    def stack(self, parts: Sequence[Operand], aval: jax.ShapeDtypeStruct, where: Where) -> Operand:
        """Return what all steps of a loop returned, in one."""
        closed = stacked(aval, len(parts))
        (whole,) = self.inline(closed.jaxpr, closed.consts, parts, where)
        return whole

    def left_out_by(self, at: _Equation) -> int | None:
        """Return the rule by which an operation stays float; None: by none."""
        self.recorder.modules += [at.path] if at.where.loops else []
        return left_out(self.recorder.rules, at.path)

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
    scope = Scope(call.layer.path, None)
    at = dataclasses.replace(at, where=dataclasses.replace(at.where, scope=scope))
    if tuple(shape_of(v).shape for v in at.eqn.invars) != call.shapes:  # vmap or grad
        return flat.emit(at, Float, call.op, bound(at.eqn))
    make = functools.partial(call.make, layer=dataclasses.replace(call.layer, path=at.path))
    return flat.emit(at, make, call.op, inlined(at.eqn))


def _remat(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """What `nn.remat` calls is inlined, and the nodes know the outermost call."""
    if at.primitive not in _REMAT:
        return None
    remat = flat.next_remat(at.eqn)
    where = dataclasses.replace(at.where, remat=at.where.remat or remat)
    return flat.inline(at.eqn.params["jaxpr"], (), at.inputs, where)


def _folded_constant(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A conversion of a constant is a constant, as are counters of unrolled loops.

    So is one that `shard_map` lets vary over a mesh axis.
    """
    if at.primitive == "pvary" and isinstance(at.inputs[0], Constant):
        return at.inputs
    if at.primitive == "convert_element_type" and isinstance(at.inputs[0], Constant):
        return (Constant(np.asarray(at.inputs[0].value, at.eqn.params["new_dtype"])),)
    integer = known_integer(at.eqn, at.inputs) if at.where.loops else None
    return None if integer is None else (integer,)


def _zero(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """What the first step of a loop multiplies by zero, or adds zero to, is not computed."""
    if not at.where.loops:
        return None
    carried = zip(at.inputs, at.eqn.invars, strict=True)
    zero = [flat.is_zero(v) and not isinstance(read, core.Literal) for v, read in carried]
    if vanishes(at.eqn, zero):
        closed = zeros(shape_of(at.eqn.outvars[0]))
        return flat.inline(closed.jaxpr, closed.consts, (), at.where)
    position = passed(at.eqn, zero)
    if position is None:
        return None
    result, before, after = (
        at.inputs[position],
        *map(shape_of, (at.eqn.invars[position], at.eqn.outvars[0])),
    )
    if before.shape != after.shape:
        closed = broadcast(before, after.shape)
        return flat.inline(closed.jaxpr, closed.consts, (result,), at.where)
    if isinstance(result, int) and result in flat.repeated and at.where.loops[-1].number == 0:
        flat.repeated[result] = at.where.inside(0).position
    return (result,)


def _scan(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A loop of known length that holds products, or recurs, is unrolled, if it is not too long."""
    if at.primitive != "scan" or not 0 < steps_of(at.eqn) <= MAX_STEPS:
        return None
    origins, loop = list(map(flat.origin, at.inputs)), Loop(at.eqn)
    products = products_inside(at.eqn, origins, at.where.scope, flat.recorder)
    if not products and not _recurs(flat, at, loop):
        return None
    of_slices = [
        Origin(o.arguments, o.parameters and n >= loop.read_whole) for n, o in enumerate(origins)
    ]
    layered = bool(products_inside(at.eqn, of_slices, at.where.scope, flat.recorder))
    fixed, carry = at.inputs[: loop.constants], at.inputs[loop.constants : loop.read_whole]
    if not layered:
        flat.carried.update(v for v in carry if isinstance(v, int))
    path = common_path(p.outermost for p in products) if products else at.path
    results: dict[int, Sequence[Operand]] = {}
    for number, place in enumerate(loop.order):
        step = Iteration(path, number, layered)
        where = dataclasses.replace(at.where, loops=(*at.where.loops, step))
        where = where.inside(number if layered else 0)
        flat.recorder.modules.append(numbered(path, where.loops))
        slices = [
            flat.slice(v, place, where.inside(-1, n))
            for n, v in enumerate(at.inputs[loop.read_whole :])
        ]
        outputs = flat.inline(
            loop.closed.jaxpr, loop.closed.consts, (*fixed, *carry, *slices), where
        )
        carry, results[place] = outputs[: loop.carries], outputs[loop.carries :]
    stacks = [
        flat.stack([results[k][n] for k in range(loop.length)], aval, at.where.inside(-2, n))
        for n, aval in enumerate(map(shape_of, loop.closed.jaxpr.outvars[loop.carries :]))
    ]
    return (*carry, *stacks)


def _recurs(flat: Flattener, at: _Equation, loop: Loop) -> bool:
    """Whether steps without products carry real numbers, and read some that depend on arguments."""
    nested = any(eqn.primitive.name == "scan" for eqn in loop.closed.jaxpr.eqns)
    carried = at.eqn.invars[loop.constants : loop.read_whole]
    read = (shape_of(v) for v, x in zip(at.eqn.invars, at.inputs, strict=True) if x in flat.fed)
    real = [
        any(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)
        for avals in (map(shape_of, carried), read)
    ]
    plain = not nested and not multiplies(at.eqn)
    return plain and all(real) and flat.left_out_by(at) is None


def _inlined_call(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A call is replaced by what it calls, unless that is a function known by its name."""
    if at.primitive not in INLINED_CALLS or _is_kept_whole(at):
        return None
    params = at.eqn.params
    closed = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return flat.inline(closed.jaxpr, closed.consts, at.inputs, at.where)


def _contraction(flat: Flattener, at: _Equation) -> Sequence[Operand] | None:
    """A convolution or matrix product, of whatever it is."""
    if at.primitive not in CONTRACTIONS or flat.left_out_by(at) is not None:
        return None
    make = functools.partial(Contraction, module=at.where.scope.module)
    return flat.emit(at, make, display_name(at.eqn, None), bound(at.eqn))


def _operation(flat: Flattener, at: _Equation) -> Sequence[Operand]:
    """All else is one node, of a class of its own."""
    bounds = clamp_bounds(at.eqn, at.inputs)
    make = kind = classify(at.eqn, at.inputs)
    place = None if kind in (Move, Clamp) else flat.left_out_by(at)
    if place is not None or is_float_function(at.eqn):
        make = functools.partial(Float, excluded_by=place)
    elif bounds:
        make = functools.partial(Clamp, bounds=bounds)
    return flat.emit(at, make, display_name(at.eqn, bounds), bound(at.eqn))


RULES: tuple[Rule, ...] = (
    _layer,
    _remat,
    _folded_constant,
    _zero,
    _scan,
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
        operands = varying_as_traced(eqn, values)
        result = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        return (tuple(result) or (_NO_RESULT,)) if eqn.primitive.multiple_results else (result,)

    return run


def inlined(eqn: core.JaxprEqn) -> _Run:
    """Return what computes the function that an equation calls, operation by operation."""
    closed = eqn.params["jaxpr"]
    return lambda *values: tuple(eval_jaxpr(closed.jaxpr, closed.consts, *values))

"""Capture a call of a Flax model as a Graph: an interceptor marks layers, a jaxpr shows all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core

from simqat_jax.graph import LAYER_KINDS, Constant, Graph, Kind, Node, Operand, simplify
from simqat_jax.interception import LAYER_MARK, PATH_MARK, Recorder, excluded

_KINDS: dict[str, Kind] = {
    "add": "add",
    "sub": "add",
    "add_any": "add",
    "mul": "mul",
    "reduce_sum": "mean",
    "reduce_window_sum": "mean",
    "concatenate": "concat",
    "stack": "concat",
}
_PASS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice dynamic_slice rev copy split "
    "tile convert_element_type stop_gradient gather reduce_max reduce_min reduce_window_max "
    "sharding_constraint name".split()
)
_ELEMENTWISE = frozenset(
    "neg abs sign floor ceil round exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt sin cos "
    "tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv integer_pow square pow "
    "div rem max min clamp select_n ge gt le lt eq ne and or not xor is_finite nextafter".split()
)
_DISPLAY = {
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_sum": "sum",
    "concatenate": "concat",
    "stack": "concat",
    "logistic": "sigmoid",
    "hard_silu": "hard_swish",
    "convert_element_type": "convert",
    "broadcast_in_dim": "broadcast",
}
# Kept whole, under their names, where the model calls them through jit.
_NAMED_FUNCTIONS = frozenset(
    "relu relu6 leaky_relu sigmoid silu hard_sigmoid hard_silu hard_tanh elu celu selu gelu "
    "softplus log_sigmoid soft_sign mish squareplus sparse_plus".split()
)
# Kept whole and float: eight bits of what they are made of are too few.
_FLOAT_FUNCTIONS = frozenset("log_softmax standardize _var _std norm".split())
_INLINED_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMAT = ("remat2", "remat", "checkpoint")


def _layers_inside(eqn: core.JaxprEqn) -> Iterator[int]:
    """Yield the numbers of the layers that a call holds at any depth."""
    for sub in core.jaxprs_in_params(eqn.params):
        for inner in sub.eqns:
            name = str(inner.params.get("name", ""))
            if name.startswith(LAYER_MARK):
                yield int(name.removeprefix(LAYER_MARK))
            yield from _layers_inside(inner)


# Stands for the result of an operation without one, so that every node has an output.
_NO_RESULT = (np.zeros((), bool),)


def _bind_eqn(eqn: core.JaxprEqn) -> Callable[..., tuple]:
    def run(*values):
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return (tuple(result) or _NO_RESULT) if eqn.primitive.multiple_results else (result,)

    return run


def _inlined(eqn: core.JaxprEqn) -> Callable[..., tuple]:
    closed = eqn.params["jaxpr"]
    return lambda *values: tuple(eval_jaxpr(closed.jaxpr, closed.consts, *values))


def _only_elementwise(jaxpr: core.Jaxpr) -> bool:
    avals: list[Any] = [v.aval for v in jaxpr.constvars]
    if any(aval.size != 1 for aval in avals):
        return False
    for eqn in jaxpr.eqns:
        subs = list(core.jaxprs_in_params(eqn.params))
        name = eqn.primitive.name
        plain = name in _ELEMENTWISE or name in ("add", "sub", "mul")
        neutral = name in ("convert_element_type", "copy", "stop_gradient", "broadcast_in_dim")
        if subs and not all(_only_elementwise(sub) for sub in subs):
            return False
        if not subs and not plain and not neutral:
            return False
    return True


def _scalar_value(operand: Any) -> float | None:
    value = operand.value if isinstance(operand, Constant) else None
    return None if value is None or np.size(value) != 1 else float(np.asarray(value).item())


def _clamp_bounds(
    eqn: core.JaxprEqn, inputs: Sequence[Operand | None]
) -> tuple[float, float] | None:
    """Return what the operation clamps its one tensor to, or None if it does anything else."""
    subs = list(core.jaxprs_in_params(eqn.params))
    if subs:
        return _chain_bounds(subs[0])
    known = [value for value in map(_scalar_value, inputs) if value is not None]
    match eqn.primitive.name, known:
        case "max", [bound]:
            return bound, np.inf
        case "min", [bound]:
            return -np.inf, bound
        case "clamp", [lo, hi]:
            return lo, hi
    return None


def _chain_bounds(jaxpr: core.Jaxpr) -> tuple[float, float] | None:
    """Return what a function of one tensor clamps it to, one operation behind the other."""
    values, (lo, hi) = jaxpr.invars, (-np.inf, np.inf)
    for eqn in jaxpr.eqns:
        literals = [Constant(v.val) if isinstance(v, core.Literal) else None for v in eqn.invars]
        bounds = _clamp_bounds(eqn, literals)
        if bounds is None or [v for v in eqn.invars if not isinstance(v, core.Literal)] != values:
            return None
        lo, hi = (min(max(b, bounds[0]), bounds[1]) for b in (lo, hi))
        values = eqn.outvars
    return (lo, hi) if len(values) == 1 and jaxpr.outvars == values else None


def _is_floating(v: Any) -> bool:
    return bool(jnp.issubdtype(v.aval.dtype, jnp.floating))


def _classify(eqn: core.JaxprEqn, inputs: Sequence[Operand]) -> Kind:
    """Return the kind of one operation."""
    name = eqn.primitive.name
    subs = list(core.jaxprs_in_params(eqn.params))
    if subs:
        table = len(eqn.outvars) == 1 and _only_elementwise(subs[0])
        return "elementwise" if table else "float"
    if not eqn.outvars or not _is_floating(eqn.outvars[0]):
        return "elementwise" if name in _ELEMENTWISE else "float"
    if name == "gather" and eqn.params["fill_value"] not in (None, 0):
        return "float"  # the fill need not lie on the grid
    if name in _PASS or (name == "pad" and _scalar_value(inputs[1]) == 0.0):
        return "pass" if _is_floating(eqn.invars[0]) else "float"
    return _KINDS.get(name, "elementwise" if name in _ELEMENTWISE else "float")


class _Flattener:
    """Turns a jaxpr with its nested calls into nodes."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.nodes: list[Node] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self.unquantizable = list(recorder.unquantizable)
        self.remats = 0

    def new(self, aval) -> int:
        v = len(self.avals)
        self.avals[v] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return v

    def inline(self, jaxpr, consts, inputs, path, remat) -> tuple[Operand, ...]:
        """Append the nodes of `jaxpr` called on `inputs`; return its outputs."""
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))

        def read(v) -> Operand:
            return Constant(v.val) if isinstance(v, core.Literal) else env[v]

        for eqn in jaxpr.eqns:
            where = self.path_of(str(eqn.source_info.name_stack), path)
            outputs = self.call(eqn, tuple(map(read, eqn.invars)), where, remat)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return tuple(map(read, jaxpr.outvars))

    def path_of(self, name_stack: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Return the path of the innermost module that the name stack names."""
        marks = [part for part in name_stack.split("/") if part.startswith(PATH_MARK)]
        return self.recorder.paths[int(marks[-1].removeprefix(PATH_MARK))] if marks else default

    def call(self, eqn, inputs, path, remat) -> Sequence[Operand]:
        primitive, name = eqn.primitive.name, str(eqn.params.get("name", ""))
        if name.startswith(LAYER_MARK):
            return self.layer(eqn, int(name.removeprefix(LAYER_MARK)), inputs, remat)
        if primitive in _REMAT:
            self.remats += 1
            params = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
            inner = remat or (self.remats, params)
            return self.inline(eqn.params["jaxpr"], (), inputs, path, inner)
        if primitive == "convert_element_type" and isinstance(inputs[0], Constant):
            return (Constant(np.asarray(inputs[0].value, eqn.params["new_dtype"])),)
        bounds = _clamp_bounds(eqn, inputs)
        kind: Kind = "clamp" if bounds else _classify(eqn, inputs)
        layers = list(_layers_inside(eqn))
        if primitive in _INLINED_CALLS and not (
            (name in _NAMED_FUNCTIONS and kind in ("clamp", "elementwise"))
            or (name in _FLOAT_FUNCTIONS and not layers)
        ):
            closed = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            return self.inline(closed.jaxpr, closed.consts, inputs, path, remat)
        for number in layers:
            self.unreachable(number, primitive)
        left_out = excluded(path, self.recorder.exclude) and kind not in ("pass", "clamp")
        if left_out or name in _FLOAT_FUNCTIONS:
            kind = "float"
        is_call = primitive in _INLINED_CALLS or "call" in primitive
        op = name.lstrip("_") if name and is_call else primitive
        if primitive == "reduce_window_max" and eqn.params["window_dimensions"][-1] == 1:
            op = "max_pool"
        op = "relu" if bounds == (0.0, np.inf) else "clip" if bounds and not name else op
        extra = {"bounds": bounds} if bounds else {}
        return self.emit(
            eqn, kind, _DISPLAY.get(op, op), path, inputs, _bind_eqn(eqn), remat, extra
        )

    def unreachable(self, number: int, where: str) -> None:
        call = self.recorder.calls[number]
        if call.kind in LAYER_KINDS:
            self.unquantizable.append((call.layer.path, f"it is called inside `{where}`"))

    def layer(self, eqn, number, inputs, remat) -> Sequence[Operand]:
        call = self.recorder.calls[number]
        path = call.layer.path
        if tuple(v.aval.shape for v in eqn.invars) != call.shapes:
            self.unreachable(number, "vmap or grad")
            return self.emit(eqn, "float", call.op, path, inputs, _bind_eqn(eqn), remat, {})
        extra = {"layer": call.layer}
        return self.emit(eqn, call.kind, call.op, path, inputs, _inlined(eqn), remat, extra)

    def emit(self, eqn, kind, op, path, inputs, run, remat, extra) -> tuple[int, ...]:
        avals = [v.aval for v in eqn.outvars] or _NO_RESULT
        outputs = tuple(map(self.new, avals))
        effects = bool(eqn.effects)
        self.nodes.append(
            Node(
                kind, op, path, inputs, outputs, run, remat=remat, effects=effects, eqn=eqn, **extra
            )
        )
        return outputs[: len(eqn.outvars)]


# Capture -----------------------------------------------------------------------------------------


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _input_names(args: tuple, kwargs: Mapping[str, Any], leaves: list[Any]) -> list[str | None]:
    """Name each floating-point argument: "input" if it is the only one, else by its place."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path((args, kwargs))[0]]
    floats = [_is_array(v) and jnp.issubdtype(v.dtype, jnp.floating) for v in leaves]
    if sum(floats) == 1:
        return ["input" if f else None for f in floats]
    return [
        "input/" + jax.tree_util.keystr(path[1:], simple=True, separator="/") if f else None
        for path, f in zip(paths, floats, strict=True)
    ]


def _data_tensors(nodes: Sequence[Node], sources: Sequence[int]) -> frozenset[int]:
    data = set(sources)
    for node in nodes:
        if any(isinstance(v, int) and v in data for v in node.inputs):
            data.update(node.outputs)
    return frozenset(data)


class Capture(NamedTuple):
    """A captured call.

    Attributes:
      graph: the call as a graph.
      inputs: the value of each of `graph.inputs`.
      restore: maps the values of `graph.outputs` to the call's `(output, updated collections)`.
    """

    graph: Graph
    inputs: list[Any]
    restore: Callable[[Sequence[Any]], tuple[Any, Mapping[str, Any]]]


def capture(
    module: nn.Module,
    variables: Mapping[str, Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    method: Any,
    rngs: Mapping[str, Any],
    mutable: Any,
    exclude: tuple[str, ...],
    forbidden: type[nn.Module],
) -> Capture:
    """Trace `module.apply(variables, *args, method=method, **kwargs)` into a graph.

    Args:
      module: an unbound module.
      variables: its variables; arrays, tracers or ShapeDtypeStructs.
      args: positional arguments; arrays are inputs of the graph, everything else is part of it.
      kwargs: keyword arguments, likewise.
      method: which of the module's methods, as Flax takes it.
      rngs: one key, or Flax's own LazyRng, per random stream.
      mutable: the collections that the call may update.
      exclude: patterns of module paths to leave float.
      forbidden: a module class that must not occur inside.
    Raises: ValueError: a pattern that matches no module, a `forbidden` module inside.
    """
    leaves, in_tree = jax.tree.flatten((args, dict(kwargs)))
    dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    recorder = Recorder(exclude, forbidden)
    trees: list[Any] = []

    def call(variables, arrays, rngs):
        merged = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            merged[i] = array
        args, kwargs = jax.tree.unflatten(in_tree, merged)
        with recorder.traces, nn.intercept_methods(recorder.intercept):
            recorder.forget_traces()
            result = module.apply(
                variables, *args, rngs=rngs, mutable=mutable, method=method, **kwargs
            )
        out_leaves, out_tree = jax.tree.flatten(result)
        trees.append((out_tree, [None if _is_array(v) else v for v in out_leaves]))
        return [v for v in out_leaves if _is_array(v)]

    operands = (variables, [leaves[i] for i in dynamic], rngs)
    with jax.disable_jit(False):  # layers are marked as named jitted calls
        closed = jax.make_jaxpr(call)(*operands)
    unmatched = recorder.unmatched()
    if unmatched:
        raise ValueError(
            f"SimQATConfig.exclude holds {unmatched[0]!r}, which matches no module of "
            f"{type(module).__name__}. Its modules: {recorder.module_names()}."
        )
    flattener = _Flattener(recorder)
    inputs = tuple(flattener.new(v.aval) for v in closed.jaxpr.invars)
    # A method of its own has inputs of its own, whose ranges are not those of `__call__`.
    start = () if method is None else (method if isinstance(method, str) else method.__name__,)
    outputs = flattener.inline(closed.jaxpr, closed.consts, inputs, start, None)
    fixed = len(jax.tree.leaves(variables))
    arg_names = _input_names(args, kwargs, leaves)
    prefix = "".join(f"{name}/" for name in start)
    names = [None] * fixed + [(name := arg_names[i]) and prefix + name for i in dynamic]
    names += [None] * (len(inputs) - len(names))
    graph = Graph(
        nodes=tuple(flattener.nodes),
        inputs=inputs,
        input_names=tuple(names),
        outputs=outputs,
        avals=flattener.avals,
        data=_data_tensors(flattener.nodes, inputs[fixed:]),
        unquantizable=tuple(dict(flattener.unquantizable).items()),
    )
    out_tree, statics = trees[-1]

    def restore(values):
        values = iter(values)
        return jax.tree.unflatten(out_tree, [next(values) if s is None else s for s in statics])

    return Capture(simplify(graph), jax.tree.leaves(operands), restore)

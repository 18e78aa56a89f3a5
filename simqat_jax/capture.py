"""Capture a call of a Flax model as a Graph: an interceptor marks layers, a jaxpr shows all."""

import contextlib
import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import eval_jaxpr
from jax.extend import core

from simqat_jax.graph import LAYER_KINDS, Constant, Graph, Kind, Layer, Node, Operand, simplify

_LAYER_MARK = "simqat_layer_"
_PATH_MARK = "simqat_path_"
# Part of the key of every jit cache while a model is captured: without it `nn.jit` would hand out
# traces made without the interceptor, or made for another module of the same class.
_trace_context = jax.make_user_context()
_fresh = itertools.count(1)

_QUANTIZED: dict[type[nn.Module], Kind] = {
    nn.Conv: "conv",
    nn.Dense: "dense",
    nn.DenseGeneral: "dense",
}
_UNSUPPORTED = (nn.ConvTranspose, nn.ConvLocal, nn.Einsum)
_FLOAT_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
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
_BASES = (*_QUANTIZED, *_UNSUPPORTED, *_FLOAT_MODULES, nn.BatchNorm, nn.Dropout)

_PASS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice dynamic_slice rev copy split "
    "tile convert_element_type stop_gradient gather reduce_max reduce_min reduce_window_max "
    "sharding_constraint optimization_barrier name".split()
)
_ELEMENTWISE = frozenset(
    "neg abs sign floor ceil round exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt sin cos "
    "tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv integer_pow square pow "
    "div rem max min clamp select_n ge gt le lt eq ne and or not xor is_finite nextafter".split()
)
_DISPLAY = {
    "reduce_window_max": "max_pool",
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


def excluded(path: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the module path or a module around it."""
    prefixes = ["/".join(path[:depth]) for depth in range(1, len(path) + 1)]
    return any(fnmatch.filter(prefixes, pattern) for pattern in patterns)


class _LayerCall(NamedTuple):
    layer: Layer
    kind: Kind
    op: str
    shapes: tuple[tuple[int, ...], ...]


@dataclasses.dataclass
class _Recorder:
    """What the interceptor notes down while the model is traced."""

    exclude: tuple[str, ...]
    forbidden: type[nn.Module]
    calls: list[_LayerCall] = dataclasses.field(default_factory=list)
    paths: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    unquantizable: list[tuple[tuple[str, ...], str]] = dataclasses.field(default_factory=list)
    traces: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    states: list[Any] = dataclasses.field(default_factory=list)
    inside_layer: bool = False

    def module_names(self) -> list[str]:
        return ["/".join(path) for path in dict.fromkeys(self.paths) if path]

    def unmatched(self) -> list[str]:
        return [p for p in self.exclude if not fnmatch.filter(self.module_names(), p)]

    def forget_traces(self) -> None:
        """From here on, until `traces` closes, use no trace that was made before."""
        self.traces.enter_context(_trace_context(next(_fresh)))

    @contextlib.contextmanager
    def forget_if_lifted(self) -> Iterator[None]:
        """Forget the trace of a module that runs in another trace than its caller (`nn.jit`)."""
        state = core.get_opaque_trace_state(convention="simqat")
        self.states.append(state)
        yield
        self.states.pop()
        if self.states and self.states[-1] != state:
            self.forget_traces()

    # The interceptor -------------------------------------------------------------------------

    def intercept(self, next_fun, args, kwargs, context):
        module = context.module
        if self.inside_layer:
            return next_fun(*args, **kwargs)
        path = module.path
        if isinstance(module, self.forbidden):
            raise ValueError(
                f"SimQAT was applied twice: {'/'.join(path) or type(module).__name__} is already "
                "quantization-aware. Apply it once, to the outermost model."
            )
        self.paths.append(path)
        marker = jax.named_scope(f"{_PATH_MARK}{len(self.paths) - 1}")
        with self.forget_if_lifted(), marker:
            base = _base_of(module, context)
            if base is None or excluded(path, self.exclude):
                return next_fun(*args, **kwargs)
            if base in _QUANTIZED:
                return self._call_linear(base, next_fun, module, args, kwargs)
            if base is nn.BatchNorm:
                return self._call_batch_norm(module, args, kwargs)
            if base is nn.Dropout:
                return self._call_dropout(next_fun, module, args, kwargs)
            if base in _FLOAT_MODULES:
                return self._call_float(base, module, args, kwargs)
            self.unquantizable.append((path, f"nn.{base.__name__} has no quantized form"))
            return next_fun(*args, **kwargs)

    def _bind(self, layer: Layer, kind: Kind, op: str, fn: Callable, *operands):
        """Call `fn` behind a boundary that the jaxpr shows as one named call."""

        def boundary(*operands):
            self.inside_layer = True
            try:
                return fn(*operands)
            finally:
                self.inside_layer = False

        boundary.__name__ = f"{_LAYER_MARK}{len(self.calls)}"
        self.calls.append(_LayerCall(layer, kind, op, tuple(map(jnp.shape, operands))))
        return jax.jit(boundary)(*operands)

    def _call_linear(self, base, next_fun, module, args, kwargs):
        reason = _not_plain(base, module)
        if reason:
            self.unquantizable.append((module.path, reason))
            return next_fun(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        params = _own_variables(module, "params", ("kernel", "bias"))
        layer = Layer(_unbound(base, module), module.path, tuple(params))

        def fn(x, *values):
            return (layer.module.apply({"params": dict(zip(params, values, strict=True))}, x),)

        return self._bind(layer, _QUANTIZED[base], base.__name__, fn, x, *params.values())[0]

    def _call_batch_norm(self, module, args, kwargs):
        x, *rest = args if args else (kwargs["x"],)
        running = nn.merge_param(
            "use_running_average",
            module.use_running_average,
            rest[0] if rest else kwargs.get("use_running_average"),
        )
        mask = kwargs.get("mask")
        params = _own_variables(module, "params", ("scale", "bias"))
        stats = _own_variables(module, "batch_stats", ("mean", "var"))
        if len(stats) < 2:
            raise ValueError(
                f"{'/'.join(module.path)}: the variables hold no batch_stats 'mean' and 'var'. "
                "Pass the batch_stats of init, or of the float checkpoint."
            )
        layer = Layer(
            _unbound(nn.BatchNorm, module),
            module.path,
            (*params, *stats, *(() if mask is None else ("mask",))),
            training=not running,
        )
        results = self._bind(
            layer,
            "batch_norm",
            "BatchNorm",
            lambda x, *values: batch_norm(layer, x, *values, use_running_average=running),
            x,
            *params.values(),
            *stats.values(),
            *(() if mask is None else (mask,)),
        )
        for name, value in zip(stats, results[1:], strict=False):
            module.variable("batch_stats", name).value = value
        return results[0]

    def _call_dropout(self, next_fun, module, args, kwargs):
        call = dict(zip(("inputs", "deterministic", "rng"), args, strict=False)) | kwargs
        deterministic = nn.merge_param(
            "deterministic", module.deterministic, call.get("deterministic")
        )
        if deterministic or module.rate == 0.0:
            return next_fun(*args, **kwargs)
        rng = call.get("rng")
        rng = module.make_rng(module.rng_collection) if rng is None else rng
        layer = Layer(_unbound(nn.Dropout, module), module.path, ("rng",))

        def fn(x, rng):
            return (layer.module.apply({}, x, deterministic=False, rng=rng),)

        return self._bind(layer, "pass", "dropout", fn, call["inputs"], rng)[0]

    def _call_float(self, base, module, args, kwargs):
        params = _own_variables(module, "params", ("scale", "bias"))
        layer = Layer(_unbound(base, module), module.path, tuple(params))
        count = len(params)

        def fn(*values):
            variables = {"params": dict(zip(params, values[:count], strict=True))}
            return (layer.module.apply(variables, *values[count:], **kwargs),)

        return self._bind(layer, "float", base.__name__, fn, *params.values(), *args)[0]


def batch_norm(
    layer: Layer, x: jax.Array, *values: jax.Array, use_running_average: bool
) -> tuple[jax.Array, ...]:
    """Run a BatchNorm layer as a pure function.

    Args:
      layer: the layer; `layer.names` tells what `values` are.
      x: the input, features along the layer's axis.
      values: scale and bias (if the layer has them), running mean and variance, mask (if any).
      use_running_average: normalise with the running statistics.
    Returns: the output; with batch statistics also the new running mean and variance.
    """
    named = dict(zip(layer.names, values, strict=True))
    variables = {
        "params": {k: v for k, v in named.items() if k in ("scale", "bias")},
        "batch_stats": {k: v for k, v in named.items() if k in ("mean", "var")},
    }
    y, updates = layer.module.apply(
        variables,
        x,
        use_running_average=use_running_average,
        mask=named.get("mask"),
        mutable=["batch_stats"],
    )
    if use_running_average:
        return (y,)
    stats: Any = updates["batch_stats"]
    return y, stats["mean"], stats["var"]


def _base_of(module: nn.Module, context) -> type[nn.Module] | None:
    """Return the Flax layer whose own `__call__` this is, also for a subclass that calls super."""
    if context.method_name != "__call__":
        return None
    method = getattr(context.orig_method, "func", context.orig_method)
    for base in _BASES:
        if isinstance(module, base) and method.__qualname__ == base.__call__.__qualname__:
            return base
    return None


def _unbound(base: type[nn.Module], module: nn.Module) -> nn.Module:
    """Return the layer with the module's attributes and no parent, name or scope.

    Of a BatchNorm or Dropout, `use_running_average` and `deterministic` are left to the call.
    """
    per_call = ("use_running_average", "deterministic")
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(base)
        if f.init and f.name not in ("parent", "name", *per_call)
    }
    return base(**fields, parent=None)


def _own_variables(
    module: nn.Module, collection: str, names: Sequence[str]
) -> dict[str, jax.Array]:
    return {
        name: meta.unbox(module.get_variable(collection, name))
        for name in names
        if module.has_variable(collection, name)
    }


def _not_plain(base: type[nn.Module], module: nn.Module) -> str | None:
    """Return why this Conv or Dense is not one plain convolution or matrix product."""
    if base is nn.DenseGeneral and module.batch_dims:
        return "DenseGeneral with batch_dims is not one matrix product"
    for hook in ("dot_general", "dot_general_cls", "conv_general_dilated"):
        if getattr(module, hook, None) is not None:
            return f"it computes with a {hook} of its own"
    return None


# From jaxpr to graph -----------------------------------------------------------------------------


def _layers_inside(eqn: core.JaxprEqn) -> Iterator[int]:
    """Yield the numbers of the layers that a call holds at any depth."""
    for sub in core.jaxprs_in_params(eqn.params):
        for inner in sub.eqns:
            name = str(inner.params.get("name", ""))
            if name.startswith(_LAYER_MARK):
                yield int(name.removeprefix(_LAYER_MARK))
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
    if name in _PASS or (name == "pad" and _scalar_value(inputs[1]) == 0.0):
        return "pass" if _is_floating(eqn.invars[0]) else "float"
    return _KINDS.get(name, "elementwise" if name in _ELEMENTWISE else "float")


class _Flattener:
    """Turns a jaxpr with its nested calls into nodes."""

    def __init__(self, recorder: _Recorder):
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
        marks = [part for part in name_stack.split("/") if part.startswith(_PATH_MARK)]
        return self.recorder.paths[int(marks[-1].removeprefix(_PATH_MARK))] if marks else default

    def call(self, eqn, inputs, path, remat) -> Sequence[Operand]:
        primitive, name = eqn.primitive.name, str(eqn.params.get("name", ""))
        if name.startswith(_LAYER_MARK):
            return self.layer(eqn, int(name.removeprefix(_LAYER_MARK)), inputs, remat)
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
            Node(kind, op, path, inputs, outputs, run, remat=remat, effects=effects, **extra)
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
    rngs: Mapping[str, Any],
    mutable: Any,
    exclude: tuple[str, ...],
    forbidden: type[nn.Module],
) -> Capture:
    """Trace `module.apply(variables, *args, **kwargs)` into a graph, without running it.

    Args:
      module: an unbound module.
      variables: its variables; arrays, tracers or ShapeDtypeStructs.
      args: positional arguments; arrays are inputs of the graph, everything else is part of it.
      kwargs: keyword arguments, likewise.
      rngs: one key, or Flax's own LazyRng, per random stream.
      mutable: the collections that the call may update.
      exclude: patterns of module paths to leave float.
      forbidden: a module class that must not occur inside.
    Raises: ValueError: a pattern that matches no module, a `forbidden` module inside.
    """
    leaves, in_tree = jax.tree.flatten((args, dict(kwargs)))
    dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    recorder = _Recorder(exclude, forbidden)
    trees: list[Any] = []

    def call(variables, arrays, rngs):
        merged = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            merged[i] = array
        args, kwargs = jax.tree.unflatten(in_tree, merged)
        with recorder.traces, nn.intercept_methods(recorder.intercept):
            recorder.forget_traces()
            result = module.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
        out_leaves, out_tree = jax.tree.flatten(result)
        trees.append((out_tree, [None if _is_array(v) else v for v in out_leaves]))
        return [v for v in out_leaves if _is_array(v)]

    operands = (variables, [leaves[i] for i in dynamic], rngs)
    closed = jax.make_jaxpr(call)(*operands)
    unmatched = recorder.unmatched()
    if unmatched:
        raise ValueError(
            f"SimQATConfig.exclude holds {unmatched[0]!r}, which matches no module of "
            f"{type(module).__name__}. Its modules: {recorder.module_names()}."
        )
    flattener = _Flattener(recorder)
    inputs = tuple(flattener.new(v.aval) for v in closed.jaxpr.invars)
    outputs = flattener.inline(closed.jaxpr, closed.consts, inputs, (), None)
    fixed = len(jax.tree.leaves(variables))
    arg_names = _input_names(args, kwargs, leaves)
    names = [None] * fixed + [arg_names[i] for i in dynamic]
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

"""What happens while a captured model is traced: an interceptor marks its layers."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.module import InterceptorContext
from flax.typing import VariableDict
from jax.extend import core

from simqat_jax.capture.flax_norms import norm_form
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.compound import Norm
from simqat_jax.ir.graph import (
    BatchNorm,
    Dropout,
    Float,
    Layer,
    Node,
)
from simqat_jax.rules import Rule, left_out

LAYER_MARK = "simqat_layer_"
PATH_MARK = "simqat_path_"
# Part of the key of every jit cache while a model is captured: without it `nn.jit` would hand out
# traces made without the interceptor, or made for another module of the same class. What holds no
# module may be traced once and for all: under `_SHARED`.
_trace_context = jax.make_user_context()
_SHARED = 0
_fresh = itertools.count(1)
_numbers = itertools.count()

Kwargs = Mapping[str, Any]
"""Keyword arguments of a call."""
MakeNode = Callable[..., Node]
"""Makes a node of one class, given what all nodes have in common."""
_Function = Callable[..., Sequence[jax.Array]]


class OldTraceError(Exception):
    """A trace holds the marks of another capture."""


class LayerCall(NamedTuple):
    """One call of a layer, as the interceptor saw it.

    Attributes:
      layer: the layer, a pure function of its inputs and parameters.
      make: makes its node.
      op: the name of the node, for display.
      shapes: those of its operands.
    """

    layer: Layer
    make: MakeNode
    op: str
    shapes: tuple[tuple[int, ...], ...]


class Scope(NamedTuple):
    """A call of a module's method, as the interceptor saw it.

    Attributes:
      path: what the operations inside are called.
      module: the Flax layer of convolutions and matrix products that it is, unbound; else None.
    """

    path: tuple[str, ...]
    module: nn.Module | None


@dataclasses.dataclass(frozen=True)
class _ModuleCall:
    """A call of a Flax layer's own `__call__`, before it happens."""

    base: type[nn.Module]
    module: nn.Module
    next_fun: Callable[..., object]
    args: tuple
    kwargs: Kwargs

    def proceed(self) -> object:
        """Call it as Flax would."""
        return self.next_fun(*self.args, **self.kwargs)

    def layer(self, names: Iterable[str]) -> Layer:
        return Layer(_unbound(self.base, self.module), self.module.path, tuple(names))


@dataclasses.dataclass
class Recorder:
    """What the interceptor notes down while the model is traced.

    Attributes:
      config: says what stays float.
      forbidden: a module class that must not occur inside.
      dry: nothing is computed: a BatchNorm whose mapped axis is not there takes statistics alone.
      calls: of layers; the number in a layer's mark is its place here.
      modules: the paths of all modules that were called, and of products outside of Flax's layers.
      scopes: the methods called; the number in a path's mark is its place here.
      traces: closes when traces made outside of captures may be used again.
      number: of the capture; a part of its marks.
    """

    config: SimQATConfig
    forbidden: type[nn.Module]
    dry: bool = False
    calls: list[LayerCall] = dataclasses.field(default_factory=list)
    modules: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    scopes: list[Scope] = dataclasses.field(default_factory=list)
    traces: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    _states: list[object] = dataclasses.field(default_factory=list)
    _inside_layer: bool = False

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """What decides, in order."""
        return self.config.decisions

    def scopes_of(self, eqn: core.JaxprEqn) -> list[Scope]:
        """Return the method calls that an equation's name stack names, outermost first.

        Those of the call that the equation stands in are not among them.
        """
        parts = str(eqn.source_info.name_stack).split("/")
        return [self.scopes[self.place(part)] for part in parts if part.startswith(PATH_MARK)]

    def scope_of(self, eqn: core.JaxprEqn, default: Scope) -> Scope:
        """Return the innermost method call that an equation's name stack names."""
        return next(reversed(self.scopes_of(eqn)), default)

    def module_names(self) -> list[str]:
        """Return the names of the modules called, in order, each once."""
        return ["/".join(path) for path in dict.fromkeys(self.modules) if path]

    def share_traces(self) -> None:
        """From here on, until `traces` closes, use traces made by captures."""
        self.traces.enter_context(_trace_context(_SHARED))

    def place(self, mark: str) -> int:
        """Return the place that a mark of this capture names.

        Raises:
          OldTraceError: it is another capture's.
        """
        number, place = map(int, mark.rsplit("_", 2)[1:])
        if number != self.number:
            raise OldTraceError
        return place

    def forget_traces(self) -> None:
        """From here on, until `traces` closes, use no trace that was made before."""
        self.traces.enter_context(_trace_context(next(_fresh)))

    @contextlib.contextmanager
    def _forget_if_lifted(self) -> Iterator[None]:
        """Forget the trace of a module that runs in another trace than its caller (`nn.jit`)."""
        state = core.get_opaque_trace_state(convention="simqat")
        self._states.append(state)
        yield
        self._states.pop()
        if self._states and self._states[-1] != state:
            self.forget_traces()

    def intercept(
        self,
        next_fun: Callable[..., object],
        args: tuple,
        kwargs: Kwargs,
        context: InterceptorContext,
    ) -> object:
        """Mark the call of a module; of a layer that is known, put a boundary around it."""
        module = context.module
        if self._inside_layer:
            return next_fun(*args, **kwargs)
        if isinstance(module, self.forbidden):
            raise ValueError(
                f"SimQAT was applied twice: {'/'.join(module.path) or type(module).__name__} is "
                "already quantization-aware. Apply it once, to the outermost model."
            )
        base = _base_of(module, context)
        with self._forget_if_lifted(), self._path_mark(module, context.method_name):
            if base is None or left_out(self.rules, module.path) is not None:
                return next_fun(*args, **kwargs)
            return _HANDLERS[base](self, _ModuleCall(base, module, next_fun, args, kwargs))

    def _path_mark(
        self, module: nn.Module, method: str
    ) -> contextlib.AbstractContextManager[object]:
        path = module.path
        self.modules.append(path)
        base = _product_layer(module)
        # Operations of a method keep its name, whoever calls it.
        path = path if method in ("__call__", "setup") else (*path, method)
        self.scopes.append(Scope(path, None if base is None else _unbound(base, module)))
        return jax.named_scope(f"{PATH_MARK}{self.number}_{len(self.scopes) - 1}")

    def bind(
        self, layer: Layer, make: MakeNode, op: str, fn: _Function, *operands: jax.Array
    ) -> Sequence[jax.Array]:
        """Call `fn` behind a boundary that the jaxpr shows as one named call."""

        def boundary(*operands: jax.Array) -> Sequence[jax.Array]:
            self._inside_layer = True
            try:
                return fn(*operands)
            finally:
                self._inside_layer = False

        boundary.__name__ = f"{LAYER_MARK}{self.number}_{len(self.calls)}"
        self.calls.append(LayerCall(layer, make, op, tuple(map(jnp.shape, operands))))
        return jax.jit(boundary)(*operands)


# Layers ------------------------------------------------------------------------------------------


def _call_batch_norm(recorder: Recorder, call: _ModuleCall) -> object:
    module, kwargs = call.module, call.kwargs
    assert isinstance(module, nn.BatchNorm)
    x, *rest = call.args if call.args else (kwargs["x"],)
    running = nn.merge_param(
        "use_running_average",
        module.use_running_average,
        rest[0] if rest else kwargs.get("use_running_average"),
    )
    mask = {}
    if not running and kwargs.get("mask") is not None:  # running averages have none
        mask["mask"] = kwargs["mask"]
    params = _own_variables(module, "params", ("scale", "bias"))
    stats = _own_variables(module, "batch_stats", ("mean", "var"))
    if len(stats) < 2:
        raise ValueError(
            f"{'/'.join(module.path)}: the variables hold no batch_stats 'mean' and 'var'. "
            "Pass the batch_stats of init, or of the float checkpoint."
        )
    operands = params | stats | mask
    layer = call.layer(operands)
    if recorder.dry and module.axis_name is not None and not _is_mapped(module.axis_name):
        layer = dataclasses.replace(layer, module=_unbound(nn.BatchNorm, module, axis_name=None))
    make = functools.partial(BatchNorm, training=not running)
    fn = functools.partial(batch_norm, layer, use_running_average=running)
    y, *updated = recorder.bind(layer, make, "BatchNorm", fn, x, *operands.values())
    for name, value in zip(stats, updated, strict=False):
        module.variable("batch_stats", name).value = value
    return y


def _is_mapped(axis_name: Hashable) -> bool:
    """Whether an axis of this name is mapped here."""
    try:
        jax.lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def _call_dropout(recorder: Recorder, call: _ModuleCall) -> object:
    module = call.module
    assert isinstance(module, nn.Dropout)
    names = ("inputs", "deterministic", "rng")
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    deterministic = nn.merge_param(
        "deterministic", module.deterministic, given.get("deterministic")
    )
    if deterministic or module.rate == 0.0:
        return call.proceed()
    rng = given.get("rng")
    rng = module.make_rng(module.rng_collection) if rng is None else rng
    layer = call.layer(("rng",))

    def fn(x: jax.Array, rng: jax.Array) -> Sequence[jax.Array]:
        return _applied(layer, {}, x, deterministic=False, rng=rng)

    return recorder.bind(layer, Dropout, "dropout", fn, given["inputs"], rng)[0]


def _call_norm(recorder: Recorder, call: _ModuleCall) -> object:
    params = _own_variables(call.module, "params", ("scale", "bias"))
    module, layer, given = call.module, call.layer(params), dict(call.kwargs)
    x, *rest = call.args if call.args else (given.pop("x"),)
    count = len(params)

    def fn(x: jax.Array, *values: jax.Array) -> Sequence[jax.Array]:
        variables = {"params": layer.named(values[:count])}
        return _applied(layer, variables, x, *values[count:], **given)

    def make(**common: Any) -> Node:
        special = bool(rest) or any(v is not None for v in given.values())
        if special or module.axis_name is not None:
            return Float(**common)
        return Norm(**norm_form(module, jnp.shape(x), tuple(params)), **common)

    operands = (x, *params.values(), *rest)
    return recorder.bind(layer, make, call.base.__name__, fn, *operands)[0]


# Their operations stand in the graph as they ran; the layer gives them a name.
_PRODUCT_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Conv, nn.ConvTranspose, nn.ConvLocal),
    *(nn.Dense, nn.DenseGeneral, nn.Einsum),
)
# What Flax puts on every subclass, or a module may add to without changing what a layer does.
_MADE_BY_FLAX = {"setup", "scope", "_state", "_parent_ref", "_compact_name_scope_methods"}
# In this order: the first whose `__call__` it is tells what a module is.
_HANDLERS: dict[type[nn.Module], Callable[[Recorder, _ModuleCall], object]] = {
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm), _call_norm),
    nn.BatchNorm: _call_batch_norm,
    nn.Dropout: _call_dropout,
}


def batch_norm(
    layer: Layer, x: jax.Array, *values: jax.Array, use_running_average: bool
) -> tuple[jax.Array, ...]:
    """Run a BatchNorm layer as a pure function.

    Args:
      layer: the layer; `layer.names` tells what `values` are.
      x: the input, features along the layer's axis.
      values: scale and bias (if the layer has them), running mean and variance, mask (if any).
      use_running_average: normalise with the running statistics.

    Returns:
      The output; with batch statistics also the new running mean and variance.
    """
    named = layer.named(values)
    variables = {
        "params": {k: v for k, v in named.items() if k in ("scale", "bias")},
        "batch_stats": {k: v for k, v in named.items() if k in ("mean", "var")},
    }
    assert layer.module is not None
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


# Flax modules ------------------------------------------------------------------------------------


def _base_of(module: nn.Module, context: InterceptorContext) -> type[nn.Module] | None:
    """Return the Flax layer whose own `__call__` this is, also for a subclass that calls super.

    A subclass that overrides anything else is no such layer: what it computes stands in the graph.
    """
    if context.method_name != "__call__":
        return None
    method = getattr(context.orig_method, "func", context.orig_method)
    for base in _HANDLERS:
        if isinstance(module, base) and method.__qualname__ == base.__call__.__qualname__:
            return None if _overrides(type(module), base) else base
    return None


def _overrides(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class changes a method or constant of the layer that it derives from."""
    classes = cls.__mro__[: cls.__mro__.index(base)]
    own = {name for c in classes for name in vars(c) if not name.startswith("__")}
    fields = {f.name for f in dataclasses.fields(base)}
    return any(hasattr(base, name) for name in own - fields - _MADE_BY_FLAX)


def _product_layer(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in _PRODUCT_LAYERS if isinstance(module, base)), None)


def _unbound(base: type[nn.Module], module: nn.Module, **changes: object) -> nn.Module:
    """Return the layer with the module's attributes and no parent, name or scope.

    Of a BatchNorm or Dropout, `use_running_average` and `deterministic` are left to the call.
    """
    per_call = ("use_running_average", "deterministic")
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(base)
        if f.init and f.name not in ("parent", "name", *per_call)
    }
    return base(**{**fields, **changes}, parent=None)


def _applied(
    layer: Layer, variables: VariableDict, *args: jax.Array, **kwargs: Any
) -> Sequence[jax.Array]:
    assert layer.module is not None
    y = layer.module.apply(variables, *args, **kwargs)
    assert isinstance(y, jax.Array)
    return (y,)


def _own_variables(
    module: nn.Module, collection: str, names: Sequence[str]
) -> dict[str, jax.Array]:
    return {
        name: meta.unbox(module.get_variable(collection, name))
        for name in names
        if module.has_variable(collection, name)
    }

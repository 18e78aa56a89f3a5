"""What happens while a captured model is traced: an interceptor marks its layers."""

import contextlib
import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.extend import core

from simqat_jax.graph import Kind, Layer

LAYER_MARK = "simqat_layer_"
PATH_MARK = "simqat_path_"
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
_BASES = (*_QUANTIZED, *_UNSUPPORTED, *_FLOAT_MODULES, nn.BatchNorm, nn.Dropout)


def excluded(path: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the module path or a module around it."""
    prefixes = ["/".join(path[:depth]) for depth in range(1, len(path) + 1)]
    return any(fnmatch.filter(prefixes, pattern) for pattern in patterns)


class LayerCall(NamedTuple):
    """One call of a layer, as the interceptor saw it; `shapes` are those of its operands."""

    layer: Layer
    kind: Kind
    op: str
    shapes: tuple[tuple[int, ...], ...]


@dataclasses.dataclass
class Recorder:
    """What the interceptor notes down while the model is traced."""

    exclude: tuple[str, ...]
    forbidden: type[nn.Module]
    calls: list[LayerCall] = dataclasses.field(default_factory=list)
    modules: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    paths: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    unquantizable: list[tuple[tuple[str, ...], str]] = dataclasses.field(default_factory=list)
    traces: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    states: list[Any] = dataclasses.field(default_factory=list)
    inside_layer: bool = False

    def module_names(self) -> list[str]:
        return ["/".join(path) for path in dict.fromkeys(self.modules) if path]

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
        self.modules.append(path)
        name = context.method_name
        # Operations of a method keep its name, whoever calls it.
        self.paths.append(path if name in ("__call__", "setup") else (*path, name))
        marker = jax.named_scope(f"{PATH_MARK}{len(self.paths) - 1}")
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

        boundary.__name__ = f"{LAYER_MARK}{len(self.calls)}"
        self.calls.append(LayerCall(layer, kind, op, tuple(map(jnp.shape, operands))))
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

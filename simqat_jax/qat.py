"""SimQAT: wrap a Flax module so that it trains and evaluates with simulated quantization."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import subtract_filters
from jax.core import Tracer

from simqat_jax.capture import Capture, capture
from simqat_jax.config import SimQATConfig
from simqat_jax.evaluation import evaluate
from simqat_jax.observers import RangeState, as_range_state, init_range
from simqat_jax.planning import Placement, check_batch_statistics, place_quantizers
from simqat_jax.report import Plan

COLLECTION = "quant_stats"


class SimQAT:
    """Simulated quantization-aware training.

    Args:
      config: what to quantize and how; `SimQATConfig()` by default.
    Raises: TypeError: `config` is no SimQATConfig.
    Example:
      >>> qmodel = SimQAT(SimQATConfig()).apply(nn.Dense(10))
      >>> variables = qmodel.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> sorted(variables["quant_stats"])
      ['input', 'output', 'step']
    """

    def __init__(self, config: SimQATConfig | None = None):
        config = SimQATConfig() if config is None else config
        if not isinstance(config, SimQATConfig):
            raise TypeError(
                f"SimQAT takes a SimQATConfig, got {config!r} of type {type(config).__name__}."
            )
        self.config = config

    def apply(self, module: nn.Module, *, name: str | None = None) -> "QuantizedModule":
        """Return a module that computes `module` with simulated quantization.

        Its `params` (and `batch_stats`) have the tree, the names and, for one key, the initial
        values of the float module's; the new collection `quant_stats` holds the ranges.

        Args:
          module: any linen module; it is not changed.
          name: its name inside a surrounding module's compact method.
        Raises: TypeError: `module` is no linen Module instance. ValueError: it is bound to
          variables, or is already quantization-aware.
        """
        if isinstance(module, type) or not isinstance(module, nn.Module):
            raise TypeError(
                f"SimQAT.apply takes an instance of a flax.linen Module, got {module!r}."
            )
        if isinstance(module, QuantizedModule):
            raise ValueError("SimQAT was applied twice: the module is already quantization-aware.")
        if module.scope is not None:
            raise ValueError(
                f"SimQAT.apply takes an unbound module, and this {type(module).__name__} is bound "
                "to variables. Apply it to the module as constructed, before bind or setup; inside "
                "a compact method, construct the module with parent=None."
            )
        return QuantizedModule(module, self.config, name=name)


SimulatedQuantizationAwareTraining = SimQAT
"""`SimQAT` under the full name that MindSpore Golden Stick uses."""


class QuantizedModule(nn.Module):
    """A linen module that computes `module` with simulated quantization.

    Made by `SimQAT.apply`. Where `quant_stats` is mutable, a call observes ranges and counts as a
    training step; where it is not, it uses the ranges and computes what an integer implementation
    computes, code for code. Only what has no exact integer form is rounded from real values:
    per-channel activations, BatchNorm on batch statistics, additions of more than 8 bits, and sums
    beyond 32 bits.

    Attributes:
      module: the float module.
      config: what to quantize and how.
    """

    module: nn.Module
    config: SimQATConfig

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; takes and returns what the float module does."""
        return self._run(None, args, kwargs)

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, method: Any = None, **kwargs: Any):
        """Apply as any linen module; `method`: one of the float module's, by name or function."""
        return super().apply(variables, *args, method=_quantized(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any):
        """Initialize as any linen module, as does `init`; `method` as in `apply`."""
        return super().init_with_output(rngs, *args, method=_quantized(method), **kwargs)

    def _run(self, method: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        result = None
        if self.is_initializing():
            result = _float_method(self.module, method)(*args, **kwargs)
        captured = self._capture(method, args, kwargs)
        placement = place_quantizers(captured.graph, self.config)
        stats = self._stats(placement)
        if self.is_initializing():
            return result
        check_batch_statistics(captured.graph)
        training = self.is_mutable_collection(COLLECTION)
        values, stats = evaluate(placement, self.config, captured.inputs, stats, training=training)
        if training:
            self._store(COLLECTION, stats)
        output, updates = captured.restore(values)
        for collection, tree in updates.items():
            self._store(collection, tree)
        return output

    def _capture(self, method: Any, args: tuple, kwargs: Mapping[str, Any]) -> Capture:
        assert self.scope is not None
        mutable: Any = None  # all: the updates are dropped
        if not self.is_initializing():
            mutable = subtract_filters(self.scope.mutable, COLLECTION)
        rngs = dict(self.scope.rngs)
        return self._trace(self.variables, method, args, kwargs, rngs, mutable)

    @nn.nowrap
    def _trace(
        self,
        variables: Mapping[str, Any],
        method: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        rngs: Any,
        mutable: Any,
    ) -> Capture:
        floats = {k: v for k, v in variables.items() if k != COLLECTION}
        if _function(method) is type(self.module).__call__:
            method = None
        return capture(
            self.module.clone(parent=None, name=None),
            floats,
            args,
            kwargs,
            method=method,
            rngs=rngs,
            mutable=list(floats) if mutable is None else mutable,
            exclude=self.config.exclude,
            forbidden=QuantizedModule,
        )

    def _store(self, collection: str, tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            self.put_variable(collection, name, value)

    def _stats(self, placement: Placement) -> dict[str, Any]:
        """Return the range of every quantizer; create what is missing where that is allowed."""
        names = ["step", *placement.stateful]
        stats = {
            name: state if name == "step" else as_range_state(state)
            for name in names
            if (state := self.get_variable(COLLECTION, name)) is not None
        }
        missing = [name for name in names if name not in stats]
        if not self.is_mutable_collection(COLLECTION):
            check_numbers(placement, self.variables.get(COLLECTION, {}))
            check_observed(placement, stats, missing)
        for name in missing:
            quantizer = placement.stateful.get(name)
            stats[name] = (
                jnp.zeros((), jnp.int32)
                if quantizer is None
                else init_range(quantizer.num_channels, nonnegative=quantizer.nonnegative)
            )
            self.put_variable(COLLECTION, name, stats[name])
        return {name: stats[name] for name in names}

    @nn.nowrap
    def plan(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        **kwargs: Any,
    ) -> Plan:
        """Tell what is quantized and how, for a call with these arguments; computes nothing.

        Args:
          variables: what `init` returned, or a trained version of it.
          args: the arguments of the call (arrays or ShapeDtypeStructs).
          rngs: keys of random streams, where the call needs any; by default dummies are used.
          method: as in `apply`.
          kwargs: its keyword arguments.
        Returns: a Plan; print it.
        Raises: ValueError: what the call itself would raise.
        """
        rngs = {"params": jax.random.key(0)} if rngs is None else rngs
        captured = self._trace(variables, method, args, kwargs, rngs, mutable=None)
        placement = place_quantizers(captured.graph, self.config)
        return Plan(placement, self.config, variables.get(COLLECTION, {}))


def _quantized(method: Any) -> Any:
    """Return what Flax is to call on a QuantizedModule for a method of the float module."""
    if method in (None, "__call__") or _function(method) is QuantizedModule.__call__:
        return None
    return lambda qmodule, *args, **kwargs: qmodule._run(method, args, kwargs)


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def _float_method(module: nn.Module, method: Any) -> Callable[..., Any]:
    if callable(method):
        return functools.partial(_function(method), module)
    return module if method is None else getattr(module, method)


def check_numbers(placement: Placement, stats: Mapping[str, Any]) -> None:
    """Raise ValueError if training counted more operations of one kind than this call has.

    The first add of a module in training need not be its first add here.
    """
    kinds = {_unnumbered(name) for name in placement.numbered}
    extra = [k for k in stats if k not in placement.stateful and _unnumbered(k) in kinds]
    if extra:
        raise ValueError(
            f"quant_stats holds {', '.join(extra)}, and this call makes fewer operations of that "
            "kind, so that their ranges cannot be told apart. Put what only training computes "
            "into a module of its own, or make the same operations in training and evaluation."
        )


def _unnumbered(name: str) -> str:
    return re.sub(r"_\d+(?=/output$)", "", name)


def check_observed(placement: Placement, stats: Mapping[str, Any], missing: list[str]) -> None:
    """Raise ValueError if evaluation needs a range that is missing or, where values are at hand
    (outside of jit), empty."""
    if missing:
        raise ValueError(
            f"the variables hold no quant_stats for {', '.join(missing)}. Pass the quant_stats "
            "of this model's init (called with the same kind of arguments), or make the "
            "collection mutable: apply(..., mutable=['quant_stats'])."
        )
    concrete = {
        name: state
        for name, state in stats.items()
        if isinstance(state, RangeState) and not isinstance(state.lo, Tracer)
    }
    empty = [name for name, s in concrete.items() if np.any(np.asarray(s.lo) > np.asarray(s.hi))]
    if empty:
        raise ValueError(
            f"the ranges of {', '.join(empty)} were never observed, so evaluation has no grid for "
            "them. Train, or calibrate with apply(..., mutable=['quant_stats']), and evaluate "
            "with the updated quant_stats."
        )


def nonfinite_ranges(quant_stats: Mapping[str, Any]) -> dict[str, int]:
    """Name the tensors that held NaN or Inf.

    Args:
      quant_stats: the collection, after training steps; of a model inside another one as well.
    Returns: for each such tensor the number of steps in which it did. Those batches did not enter
      its range.
    Raises: TypeError: an entry that is no range.
    Example:
      >>> nonfinite_ranges({"input": init_range()})
      {}
    """
    counts = {name: int(state.nonfinite) for name, state in _ranges(quant_stats)}
    return {name: count for name, count in counts.items() if count}


def _ranges(stats: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, RangeState]]:
    for name, value in stats.items():
        if isinstance(value, Mapping) and set(value) != set(RangeState._fields):
            yield from _ranges(value, f"{path}{name}/")
        elif name != "step":
            yield path + name, as_range_state(value)

"""The module that computes a Flax module with simulated quantization."""

import html
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import flax.errors
import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, LazyRng, subtract_filters, union_filters
from flax.typing import PRNGKey, RNGSequences, VariableDict

from simqat_jax.capture import Call, Capture, capture
from simqat_jax.capture.capture import Filter
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.plan import Placement
from simqat_jax.ir.program import PyTree
from simqat_jax.training.arguments import (
    check_arrays,
    check_collections,
    check_keys,
    check_method,
    check_variables,
)
from simqat_jax.training.batch_norm import check_batch_statistics
from simqat_jax.training.compiled import evaluate
from simqat_jax.training.network import network, short
from simqat_jax.training.plan_rows import plan_of
from simqat_jax.training.plan_table import Plan
from simqat_jax.training.planner import place_quantizers
from simqat_jax.training.ranges import (
    COLLECTION,
    OWN,
    STEP,
    STEPS,
    Stats,
    check,
    check_all,
    check_steps,
    initial,
    parted,
    ranges_and_steps,
    restored,
)
from simqat_jax.training.run import run
from simqat_jax.training.widths import warn_of_zeros

Method = Callable[..., PyTree] | str | None
"""One of the float module's methods, by name or function; None: its `__call__`."""
Kwargs = Mapping[str, PyTree]
"""Keyword arguments of a call."""
Rngs = Mapping[str, jax.Array | LazyRng]
"""A key for each random stream."""
_VARIABLES = "Pass what init returned, or a trained version of it, in front of the arguments."


_FLAGS = ("capture_intermediates", "mutable", "rngs")
"""The keywords of Flax's `init` and `apply` that the module's own call does not get."""


class _Sample(NamedTuple):
    """A call: its arrays described, all else as it was."""

    variables: VariableDict
    args: tuple[PyTree, ...]
    kwargs: Kwargs


def _shape(x: PyTree) -> PyTree:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x


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

    _sample: ClassVar["_Sample | None"] = None
    """Of an instance: the shapes of a call, so that `print` knows the layers."""

    @nn.nowrap
    def __repr__(self) -> str:
        return f"QuantizedModule({type(self.module).__name__}: {short(self.config)})"

    @nn.nowrap
    def __str__(self) -> str:
        known = self._sample
        plan = None if known is None else self.plan(known.variables, *known.args, **known.kwargs)
        return network(type(self.module).__name__, self.config, plan)

    @nn.nowrap
    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    @nn.nowrap
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_sample"}  # it may hold a lambda

    def setup(self) -> None:
        """Share the scope with the float module: its variables are this module's."""
        nn.share_scope(self, self.module)

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Call the module; takes and returns what the float module does."""
        return self._run(None, args, kwargs)

    @nn.nowrap
    def apply(
        self,
        variables: VariableDict,
        *args: PyTree,
        method: Method = None,
        mutable: CollectionFilter = False,
        capture_intermediates: Filter = False,
        **kwargs: PyTree,
    ) -> Any:
        """Apply as any linen module; `method`: one of the float module's, by name or function.

        With `capture_intermediates` the outputs of the float module's layers are in the collection,
        as the quantized call computes them. What is fused with the layer behind it is there as it
        would be alone, not rounded.
        """
        check_variables(variables, _VARIABLES)
        check_collections(mutable)
        check_arrays(args, kwargs)
        if kwargs.get("rngs") is not None:
            check_keys(kwargs["rngs"], "rngs={'dropout': jax.random.key(0)}")
        check_method(method, self.module)
        called = _quantized(method, capture_intermediates)
        if capture_intermediates:  # as Flax does
            mutable = union_filters(mutable, "intermediates")
        result = super().apply(variables, *args, method=called, mutable=mutable, **kwargs)
        _remember(self, variables, args, {**kwargs, "method": method})
        return result

    @nn.nowrap
    def init(
        self, rngs: PRNGKey | RNGSequences, *args: PyTree, method: Method = None, **kwargs: PyTree
    ) -> dict[str, Any]:
        """Initialize as any linen module; see `init_with_output`."""
        return self.init_with_output(rngs, *args, method=method, **kwargs)[1]

    @nn.nowrap
    def init_with_output(
        self, rngs: PRNGKey | RNGSequences, *args: PyTree, method: Method = None, **kwargs: PyTree
    ) -> tuple[Any, dict[str, Any]]:
        """Initialize as any linen module, as does `init`; `method` as in `apply`.

        Raises:
          TypeError: what is no key, no method, no collection or no array.
          ValueError: several keys in the place of one.
        """
        check_keys(rngs, "init(jax.random.key(0), x)")
        check_collections(kwargs.get("mutable", True))
        check_arrays(args, kwargs)
        check_method(method, self.module)
        output, made = super().init_with_output(rngs, *args, method=_quantized(method), **kwargs)
        variables = cast(dict[str, Any], made)  # or as Flax is configured to return them
        _remember(self, variables, args, {**kwargs, "method": method}, anew=True)
        return output, variables

    def _run(
        self, method: Method, args: tuple, kwargs: Kwargs, intermediates: Filter = False
    ) -> PyTree:
        assert self.scope is not None
        result, mutable = None, True  # all: the updates are dropped
        if self.is_initializing():
            result = _initialized(self, method, args, kwargs)
        else:
            mutable = subtract_filters(self.scope.mutable, list(OWN))
        captured = _traced(self, args, kwargs, method, intermediates, mutable)
        placement = place_quantizers(captured.graph, self.config)
        training = self.is_mutable_collection(COLLECTION)
        if training:
            warn_of_zeros(placement)
        else:
            _check_statistics_stay(captured)
        stored = ranges_and_steps(self.variables)
        stats = _stats(self, placement) if training else check(placement, *stored)
        if self.is_initializing():
            return result
        check_batch_statistics(captured.graph)
        if training:
            look, trained = captured.seen.values, stats[STEP]
            values, stats = run(placement, captured.inputs, stats, training=True, look=look)
            stats, steps = parted(placement, stats, trained)
            self._store(COLLECTION, stats)
            if self.is_mutable_collection(STEPS):
                self._store(STEPS, steps)
        else:
            statics = [v for v in jax.tree.leaves((args, kwargs)) if not hasattr(v, "dtype")]
            about = (self.config, self.module, statics)
            values = evaluate(placement, captured.inputs, stats, captured.seen, about)
        output, updates = captured.restore(values)
        for collection, tree in updates.items():
            self._store(collection, tree)
        return output

    def _store(self, collection: str, tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            self.put_variable(collection, name, value)

    @nn.nowrap
    def check(
        self, variables: VariableDict, *args: PyTree, method: Method = None, **kwargs: PyTree
    ) -> None:
        """Check that variables can be evaluated, before a long evaluation under `jax.jit`.

        A call outside of `jit` checks as much by itself. Under `jit` there are no values to look
        at: a range that was never observed makes every result NaN there.

        Args:
          variables: what `init` returned, trained or calibrated.
          args: the arguments of the call (arrays or ShapeDtypeStructs), to check what it needs and
            nothing else; none: every range that the variables hold is checked.
          method: as in `apply`.
          kwargs: keyword arguments of the call: `train=False`.

        Raises:
          TypeError: no dictionary of variables; traced ones.
          ValueError: a range is missing, was never observed, or holds NaN or Inf; what the call
            itself would raise.
        """
        check_variables(variables, _VARIABLES)
        if not args and not kwargs:
            return check_all(variables, _longest_delay(self.config))
        placement = _placed(self, variables, args, kwargs, method, {"params": jax.random.key(0)})
        check(placement, *ranges_and_steps(variables))

    @nn.nowrap
    def plan(
        self,
        variables: VariableDict,
        *args: PyTree,
        rngs: Rngs | None = None,
        method: Method = None,
        **kwargs: PyTree,
    ) -> Plan:
        """Tell what is quantized and how, for a call with these arguments; computes nothing.

        Args:
          variables: what `init` returned, or a trained version of it.
          args: the arguments of the call (arrays or ShapeDtypeStructs).
          rngs: keys of random streams, where the call needs any; by default dummies are used.
          method: as in `apply`.
          kwargs: its keyword arguments.

        Returns:
          A Plan; print it.

        Raises:
          ValueError: what the call itself would raise.
        """
        check_variables(variables, _VARIABLES)
        rngs = {"params": jax.random.key(0)} if rngs is None else rngs
        check_keys(rngs, "rngs={'dropout': jax.random.key(0)}")
        placement = _placed(self, variables, args, kwargs, method, rngs)
        stats = restored(placement, *ranges_and_steps(variables))
        return plan_of(placement, self.config, stats)


def trace(
    qmodule: QuantizedModule,
    variables: VariableDict,
    args: tuple,
    kwargs: Kwargs,
    method: Method,
    *,
    rngs: Rngs,
    mutable: CollectionFilter = True,
    dry: bool = False,
    intermediates: Filter = False,
) -> Capture:
    """Capture a call of a quantized module's float module.

    Args:
      qmodule: the quantized module.
      variables: its variables.
      args: the call's positional arguments.
      kwargs: its keyword arguments.
      method: which of the float module's methods, by name or function; None: `__call__`.
      rngs: the keys of random streams.
      mutable: which collections the call may update, by default all.
      dry: nothing will be computed, see Call.
      intermediates: the methods whose results are wanted besides.

    Raises:
      ValueError: what the call itself raises; an exclusion that matches nothing.
    """
    check_method(method, qmodule.module)
    floats = {k: v for k, v in variables.items() if k not in OWN}
    own = type(qmodule.module).__call__, QuantizedModule.__call__
    if method == "__call__" or _function(method) in own:
        method = None
    call = Call(
        module=_alone(qmodule.module),
        variables=floats,
        args=args,
        kwargs=kwargs,
        method=method,
        rngs=rngs,
        mutable=list(floats) if mutable is True else mutable,
        dry=dry,
        intermediates=intermediates,
    )
    captured = capture(call, config=qmodule.config, forbidden=QuantizedModule)
    _remember(qmodule, variables, args, {**kwargs, "method": method})
    return captured


def _remember(
    qmodule: QuantizedModule,
    variables: VariableDict,
    args: tuple,
    kwargs: Kwargs,
    *,
    anew: bool = False,
) -> None:
    """Keep the shapes of a call from outside, of the first or `anew`, for `print`."""
    if qmodule.scope is not None or not (anew or qmodule._sample is None):
        return
    kwargs = {k: v for k, v in kwargs.items() if k not in _FLAGS}
    sample = _Sample(*jax.tree.map(_shape, (dict(variables), args, kwargs)))
    object.__setattr__(qmodule, "_sample", sample)


def _placed(
    qmodule: QuantizedModule,
    variables: VariableDict,
    args: tuple,
    kwargs: Kwargs,
    method: Method,
    rngs: Rngs,
) -> Placement:
    """Plan a call, of which nothing is computed."""
    captured = trace(qmodule, variables, args, kwargs, method, rngs=rngs, dry=True)
    return place_quantizers(captured.graph, qmodule.config)


def _traced(
    qmodule: QuantizedModule,
    args: tuple,
    kwargs: Kwargs,
    method: Method,
    intermediates: Filter,
    mutable: CollectionFilter,
) -> Capture:
    """Capture a call from inside of it.

    Raises:
      ValueError: what the call itself raises; it updates a collection that is not mutable.
    """
    assert qmodule.scope is not None
    try:
        return trace(
            qmodule,
            qmodule.variables,
            args,
            kwargs,
            method,
            rngs=dict(qmodule.scope.rngs),
            mutable=mutable,
            dry=qmodule.is_initializing(),
            intermediates=intermediates,
        )
    except flax.errors.ModifyScopeVariableError as error:
        raise ValueError(_immutable(error)) from error


def _initialized(qmodule: QuantizedModule, method: Method, args: tuple, kwargs: Kwargs) -> PyTree:
    """Initialize the float module by itself, store its variables here, and return its output.

    As a part of that, its own submodules would draw their values under other names.
    """
    assert qmodule.scope is not None
    module = _alone(qmodule.module)
    rngs: Any = dict(qmodule.scope.rngs)
    made = {k: v for k, v in qmodule.variables.items() if k not in OWN}
    if made:  # by an earlier call: it is part of another model, which calls it again
        flags = dict(rngs=rngs, mutable=True)
        return module.apply(made, *args, method=method, **flags, **kwargs)[0]
    mutable = qmodule.scope.mutable
    result, made = module.init_with_output(rngs, *args, method=method, mutable=mutable, **kwargs)
    for collection, tree in made.items():
        qmodule._store(collection, tree)
    return result


def _stats(qmodule: QuantizedModule, placement: Placement) -> Stats:
    """Return the state of every quantizer; create what is missing.

    Where learned steps are mutable they are taken from ranges, whatever they were; one whose start
    is delayed starts once.
    """
    kept, steps = ranges_and_steps(qmodule.variables)
    learned = placement.learned
    if qmodule.is_mutable_collection(STEPS):
        first = {name: observer.init().step for name, observer in learned.items()}
        delayed = {name for name, observer in learned.items() if observer.spec.quant_delay}
        steps = first | {name: steps[name] for name in delayed.intersection(steps)}
        qmodule._store(STEPS, steps)
    check_steps(placement, steps)
    stats = restored(placement, kept, steps)
    missing = [name for name in (STEP, *placement.stateful) if name not in stats]
    stats |= {name: initial(placement.stateful.get(name)) for name in missing}
    created = parted(placement, stats, 0)[0]
    qmodule._store(COLLECTION, {name: created[name] for name in missing})
    return stats | {n: o.forgetful(stats[n], stats[STEP]) for n, o in learned.items()}


def _quantized(method: Method, intermediates: Filter = False) -> Callable[..., PyTree] | None:
    """Return what Flax is to call on a QuantizedModule for a method of the float module."""
    if method in (None, "__call__") or _function(method) is QuantizedModule.__call__:
        if not intermediates:
            return None
        method = None
    return lambda qmodule, *args, **kwargs: qmodule._run(method, args, kwargs, intermediates)


def _immutable(error: flax.errors.ModifyScopeVariableError) -> str:
    """Say what to do where a call updates a collection that is not mutable."""
    reason = str(error).split(" (http")[0].rstrip(".")
    return (
        f"{reason}. Train with mutable=['batch_stats', 'quant_stats']; to take ranges alone, call "
        "calibrate(qmodel, variables, batches, train=False), or apply(..., train=False, "
        "mutable=['quant_stats'])."
    )


def _check_statistics_stay(captured: Capture) -> None:
    """Raise ValueError where a call updates BatchNorm's statistics but no ranges."""
    _, updates = captured.restore([*captured.graph.outputs, *captured.seen.tensors])
    kept = set(captured.graph.inputs)
    tree = dict(updates).get("batch_stats", {})
    moved = [
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, v in jax.tree.leaves_with_path(tree)
        if not isinstance(v, int) or v not in kept
    ]
    if moved:
        names = list(dict.fromkeys(moved))
        listing = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        raise ValueError(
            f"this call updates the batch_stats of {listing} and leaves quant_stats as they are: "
            "ranges would stand still, and no step would count. Train with "
            "mutable=['batch_stats', 'quant_stats'], or evaluate with running statistics "
            "(train=False). To renew batch_stats alone, make both mutable and drop the quant_stats "
            "that come back."
        )


def _function(method: Method) -> Any:
    return getattr(method, "__func__", method)


def _longest_delay(config: SimQATConfig) -> int:
    """Return that of the learned step that starts last."""
    specs = [spec for owner in (config, *config.rules) for spec in (owner.weight, owner.activation)]
    learned = (spec for spec in specs if spec is not None and spec.observer == "learned")
    return max((spec.quant_delay for spec in learned), default=0)


def _alone(module: nn.Module) -> nn.Module:
    """Return a module that is part of no other."""
    return module.clone(parent=None, name=None)

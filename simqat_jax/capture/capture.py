"""Capture a call of a Flax model as a Graph: an interceptor marks layers, a jaxpr shows all."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import CollectionFilter, LazyRng
from flax.typing import VariableDict
from jax.extend import core

from simqat_jax.capture.compound import find_compound
from simqat_jax.capture.counts import find_counted_means
from simqat_jax.capture.exact import keep_exact
from simqat_jax.capture.far import keep_far_float
from simqat_jax.capture.flatten import Flattener, Where
from simqat_jax.capture.interception import Kwargs, OldTraceError, Recorder, Scope
from simqat_jax.capture.masked import find_masked
from simqat_jax.capture.passes import dependent, name_random, prune, random_keys, share, simplify
from simqat_jax.capture.poles import keep_norms_float
from simqat_jax.capture.products import find_products
from simqat_jax.capture.repetitions import move_repetitions
from simqat_jax.capture.shares import find_shares
from simqat_jax.capture.state import Beside, beside, stored
from simqat_jax.capture.truths import read_truths
from simqat_jax.capture.unreachable import unreachable_products
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.graph import Graph, shape_of
from simqat_jax.rules import Rule

Result = tuple[object, VariableDict]
"""What a call returns: `(output, updated collections)`."""
Restore = Callable[[Sequence[Any]], Result]
"""Maps the values of a graph's outputs, then of what was seen, to the call's result."""
Filter = bool | Callable[[nn.Module, str], bool]
"""Which calls of methods are seen, as Flax's `capture_intermediates` takes it."""
_INTERMEDIATES = "intermediates"


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call `module.apply(variables, *args, method=method, **kwargs)`.

    Attributes:
      module: an unbound module.
      variables: its variables; arrays, tracers or ShapeDtypeStructs.
      args: positional arguments; arrays are inputs of the graph, everything else is part of it.
      kwargs: keyword arguments, likewise.
      method: which of the module's methods, as Flax takes it; None for `__call__`.
      rngs: one key, or Flax's own LazyRng, per random stream.
      mutable: the collections that the call may update.
      dry: nothing is computed, so that a BatchNorm's mapped axis need not be there.
      intermediates: the methods whose results are wanted besides.
    """

    module: nn.Module
    variables: VariableDict
    args: tuple
    kwargs: Kwargs
    method: Callable[..., object] | str | None
    rngs: Mapping[str, jax.Array | LazyRng]
    mutable: CollectionFilter
    dry: bool = False
    intermediates: Filter = False

    @property
    def start(self) -> tuple[str, ...]:
        """The path of what is outside of every module.

        A method of its own has inputs of its own, whose ranges are not those of `__call__`.
        """
        if self.method is None:
            return ()
        return (self.method if isinstance(self.method, str) else self.method.__name__,)


class Capture(NamedTuple):
    """A captured call.

    Attributes:
      graph: the call as a graph.
      inputs: the value of each of `graph.inputs`.
      restore: maps the values of `graph.outputs`, then those of `seen`, to the call's
        `(output, updated collections)`.
      seen: what the call stores: state, sown values, intermediates.
    """

    graph: Graph
    inputs: list[jax.Array]
    restore: Restore
    seen: Beside = Beside()

    def returned(self, values: Sequence[Any]) -> Any:
        """Return what the call returns of the values of `graph.outputs`, without what it stores."""
        return self.restore([*values, *self.seen.tensors])[0]


def capture(call: Call, *, config: SimQATConfig, forbidden: type[nn.Module]) -> Capture:
    """Trace a call of a model into a graph.

    Args:
      call: what is called, and how.
      config: what it leaves float is left out.
      forbidden: a module class that must not occur inside.

    Returns:
      The graph, the values of its inputs, and what makes the call's result of its outputs.

    Raises:
      ValueError: a pattern that matches no module, a `forbidden` module inside, a BatchNorm
        without its statistics.
    """
    recorder = Recorder(config, forbidden, dry=call.dry)
    try:
        return _captured(call, recorder, forget=False)
    except OldTraceError:  # of a module under `nn.jit`
        recorder = Recorder(config, forbidden, dry=call.dry)
        return _captured(call, recorder, forget=True)


def _captured(call: Call, recorder: Recorder, *, forget: bool) -> Capture:
    arguments = _flattened(call)
    operands = (call.variables, arguments.arrays, call.rngs)
    closed, restore = _trace(call, arguments, operands, recorder, forget=forget)
    places = [_Place(n) for n, _ in enumerate(closed.jaxpr.outvars)]
    returned, updates = restore(places)
    count = sum(isinstance(leaf, _Place) for leaf in jax.tree.leaves(returned))
    graph = _graph(call, arguments, closed, recorder, count)
    asked = _asked_for(updates) if call.intermediates else []
    looked_at = sorted({*asked, *stored(graph)})
    order = [*(n for n, _ in enumerate(places) if n not in looked_at), *looked_at]
    outputs = tuple(graph.outputs[n] for n in order)
    kept = len(outputs) - len(looked_at)
    seen = beside(graph, outputs[kept:])
    rest = dataclasses.replace(graph, outputs=outputs[:kept])

    def reordered(values: Sequence[Any]) -> Result:
        at = dict(zip(order, values, strict=True))
        return restore([at[n] for n, _ in enumerate(places)])

    inputs = jax.tree.leaves(operands)
    return Capture(_understood(call, rest, recorder), inputs, reordered, seen)


def _understood(call: Call, graph: Graph, recorder: Recorder) -> Graph:
    """Find in a graph, as it was traced, what a plan is made of."""
    graph = prune(read_truths(share(prune(graph))))
    graph = prune(find_counted_means(prune(find_masked(prune(find_shares(graph))))))
    missed = unreachable_products(graph, recorder)
    graph = find_products(dataclasses.replace(graph, unquantizable=missed), recorder)
    _check_patterns(recorder, call.module)
    graph = simplify(find_compound(graph))
    return move_repetitions(keep_exact(keep_far_float(keep_norms_float(name_random(graph)))))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for an output of a graph, by its number."""

    number: int


def _asked_for(updates: VariableDict) -> list[int]:
    """Return the outputs that are intermediates."""
    leaves = jax.tree.leaves(dict(updates).get(_INTERMEDIATES, {}))
    return [leaf.number for leaf in leaves if isinstance(leaf, _Place)]


# Arguments ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Arguments:
    """The arguments of a call, flattened.

    Attributes:
      leaves: all of them.
      unflatten: makes `(args, kwargs)` of them.
      places: which of them are arrays.
      names: of each array that is floating-point its name; None for others.
    """

    leaves: list[object]
    unflatten: Callable[[list[object]], tuple[tuple, Kwargs]]
    places: list[int]
    names: list[str | None]

    @property
    def arrays(self) -> list[object]:
        """Those that are inputs of the graph."""
        return [self.leaves[i] for i in self.places]

    def with_arrays(self, arrays: Sequence[jax.Array]) -> tuple[tuple, Kwargs]:
        """Return `(args, kwargs)` with other arrays."""
        leaves = list(self.leaves)
        for i, array in zip(self.places, arrays, strict=True):
            leaves[i] = array
        return self.unflatten(leaves)


def _flattened(call: Call) -> _Arguments:
    at_paths, tree = jax.tree.flatten_with_path((call.args, dict(call.kwargs)))
    leaves = [leaf for _, leaf in at_paths]
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    floats = [i for i in places if jnp.issubdtype(leaves[i].dtype, jnp.floating)]
    prefix = "".join(f"{name}/" for name in call.start)

    def name(i: int) -> str | None:
        """Name an array: "input" if it is the only one, else by its place."""
        if i not in floats:
            return None
        if len(floats) == 1:
            return f"{prefix}input"
        place = jax.tree_util.keystr(at_paths[i][0][1:], simple=True, separator="/")
        return f"{prefix}input/{place}"

    unflatten = functools.partial(jax.tree.unflatten, tree)
    return _Arguments(leaves, unflatten, places, list(map(name, places)))


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


# Tracing -----------------------------------------------------------------------------------------


def _trace(
    call: Call,
    arguments: _Arguments,
    operands: tuple[object, ...],
    recorder: Recorder,
    *,
    forget: bool,
) -> tuple[core.ClosedJaxpr, Restore]:
    """Trace a call, its layers marked; return also what makes its result of its arrays."""
    restores: list[Restore] = []

    def traced(
        variables: VariableDict, arrays: Sequence[jax.Array], rngs: dict[str, jax.Array]
    ) -> list[jax.Array]:
        args, kwargs = arguments.with_arrays(arrays)
        with recorder.traces, nn.intercept_methods(recorder.intercept):
            recorder.forget_traces() if forget else recorder.share_traces()
            result = call.module.apply(
                variables,
                *args,
                rngs=rngs,
                mutable=call.mutable,
                method=call.method,
                capture_intermediates=call.intermediates,
                **kwargs,
            )
        leaves, tree = jax.tree.flatten(result)
        restores.append(_restore(functools.partial(jax.tree.unflatten, tree), leaves))
        return [v for v in leaves if _is_array(v)]

    with jax.disable_jit(False):  # layers are marked as named jitted calls
        closed = jax.make_jaxpr(traced)(*operands)
    return closed, restores[-1]


def _restore(unflatten: Callable[[list[object]], Result], leaves: Sequence[object]) -> Restore:
    """Return what makes a result of its arrays; the other leaves are part of it."""
    statics = [None if _is_array(v) else v for v in leaves]

    def restore(values: Sequence[jax.Array]) -> Result:
        rest = iter(values)
        return unflatten([next(rest) if s is None else s for s in statics])

    return restore


def _check_patterns(recorder: Recorder, module: nn.Module) -> None:
    names = recorder.module_names()
    for pattern in recorder.config.exclude:
        rule = Rule(path=pattern)
        if not any(rule.matches(name.split("/")) for name in names):
            raise ValueError(
                f"SimQATConfig.exclude holds {pattern!r}, which matches no module of "
                f"{type(module).__name__}. Its modules and products: {names}. "
                f"An operation that is neither takes Rule(path={pattern!r}, quantize=False)."
            )


# The graph ---------------------------------------------------------------------------------------


def _graph(
    call: Call,
    arguments: _Arguments,
    closed: core.ClosedJaxpr,
    recorder: Recorder,
    returned: int,
) -> Graph:
    """Turn a traced call into a graph, as it was traced."""
    flattener = Flattener(recorder)
    inputs = tuple(flattener.new(shape_of(v)) for v in closed.jaxpr.invars)
    paths = [path for path, _ in jax.tree.leaves_with_path(call.variables)]
    fixed = len(paths)
    streams = inputs[fixed + len(arguments.names) :]
    flattener.fed.update(inputs[fixed : fixed + len(arguments.names)])
    trained = _trained(zip(inputs, paths, strict=False))
    for v, (collection, *path) in trained.items():
        if collection == "params":
            flattener.parameter(v, tuple(path))
    where = Where(Scope(call.start, None))
    outputs = flattener.inline(closed.jaxpr, closed.consts, inputs, where)
    given = inputs[fixed : fixed + len(arguments.names)]
    return Graph(
        nodes=tuple(flattener.nodes),
        inputs=inputs,
        input_names=(*[None] * fixed, *arguments.names, *[None] * len(streams)),
        outputs=outputs,
        returned=returned,
        avals=flattener.avals,
        data=dependent(flattener.nodes, inputs[fixed:]),
        arguments=given,
        keys=random_keys(flattener.nodes, given, flattener.avals) | set(streams),
        parameters=flattener.parameters,
        trained=trained,
        unquantizable=(),
        repeated=flattener.repeated,
        carried=frozenset(flattener.carried),
    )


def _trained(
    inputs: Iterable[tuple[int, jax.tree_util.KeyPath]],
) -> dict[int, tuple[str, ...]]:
    """Return the path of each parameter and statistic, boxes around values left out."""
    named = {
        v: tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        for v, path in inputs
    }
    return {v: path for v, path in named.items() if path[:1] in (("params",), ("batch_stats",))}

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
from simqat_jax.capture.exact import keep_exact
from simqat_jax.capture.flatten import Flattener, Where
from simqat_jax.capture.interception import Kwargs, OldTraceError, Recorder, Scope
from simqat_jax.capture.passes import dependent, name_random, prune, share, simplify
from simqat_jax.capture.poles import keep_norms_float
from simqat_jax.capture.products import find_products
from simqat_jax.capture.state import separate_state
from simqat_jax.capture.unreachable import unreachable_products
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.graph import Constant, Graph, Node, Operand, shape_of
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


@dataclasses.dataclass(frozen=True)
class Intermediates:
    """Tensors that somebody looks at: they are no outputs, and nothing is planned otherwise.

    Attributes:
      tensors: which.
      nodes: of the graph as it was traced.
    """

    tensors: tuple[Operand, ...] = ()
    nodes: tuple[Node, ...] = ()

    def values(self, known: Mapping[int, jax.Array]) -> list[jax.Array]:
        """Return their values.

        Args:
          known: those of the tensors that the plan makes. Of what it fuses or merges the nodes are
            run by themselves.
        """
        env, makers = dict(known), {v: node for node in self.nodes for v in node.outputs}

        def value(v: Operand) -> Any:
            if isinstance(v, Constant):
                return v.value
            if v not in env:
                node = makers[v]
                env.update(zip(node.outputs, node.run(*map(value, node.inputs)), strict=True))
            return env[v]

        return [jnp.asarray(value(v)) for v in self.tensors]


class Capture(NamedTuple):
    """A captured call.

    Attributes:
      graph: the call as a graph.
      inputs: the value of each of `graph.inputs`.
      restore: maps the values of `graph.outputs`, then those of `seen`, to the call's
        `(output, updated collections)`.
      seen: the intermediates that were asked for.
    """

    graph: Graph
    inputs: list[jax.Array]
    restore: Restore
    seen: Intermediates = Intermediates()


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
    returned, _ = restore([_Place() for _ in closed.jaxpr.outvars])
    count = sum(isinstance(leaf, _Place) for leaf in jax.tree.leaves(returned))
    graph = _graph(call, arguments, closed, recorder, count)
    inputs = jax.tree.leaves(operands)
    if not call.intermediates:
        return Capture(_understood(call, graph, recorder), inputs, restore)
    looked_at = _looked_at(restore, len(graph.outputs))
    order = [*(i for i in range(len(graph.outputs)) if i not in looked_at), *looked_at]
    outputs = [graph.outputs[i] for i in order]
    kept = len(outputs) - len(looked_at)
    rest = dataclasses.replace(graph, outputs=tuple(outputs[:kept]))
    seen = Intermediates(tuple(outputs[kept:]), graph.nodes)

    def reordered(values: Sequence[Any]) -> Result:
        at = dict(zip(order, values, strict=True))
        return restore([at[i] for i in range(len(order))])

    return Capture(_understood(call, rest, recorder), inputs, reordered, seen)


def _understood(call: Call, graph: Graph, recorder: Recorder) -> Graph:
    """Find in a graph, as it was traced, what a plan is made of."""
    graph = share(prune(graph))
    missed = unreachable_products(graph, recorder)
    graph = find_products(dataclasses.replace(graph, unquantizable=missed), recorder)
    _check_patterns(recorder, call.module)
    graph = simplify(separate_state(find_compound(graph)))
    return keep_exact(keep_norms_float(name_random(graph)))


def _looked_at(restore: Restore, count: int) -> list[int]:
    """Return the outputs that are intermediates."""
    _, updates = restore(list(range(count)))
    return jax.tree.leaves(dict(updates).get(_INTERMEDIATES, {}))


class _Place:
    """Stands for an output of a graph."""


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
                f"{type(module).__name__}. Its modules and products: {names}."
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
    keys = len(inputs) - fixed - len(arguments.names)
    flattener.fed.update(inputs[fixed : fixed + len(arguments.names)])
    for v, path in _parameters(zip(inputs, paths, strict=False)).items():
        flattener.parameter(v, path)
    where = Where(Scope(call.start, None))
    outputs = flattener.inline(closed.jaxpr, closed.consts, inputs, where)
    return Graph(
        nodes=tuple(flattener.nodes),
        inputs=inputs,
        input_names=(*[None] * fixed, *arguments.names, *[None] * keys),
        outputs=outputs,
        returned=returned,
        avals=flattener.avals,
        data=dependent(flattener.nodes, inputs[fixed:]),
        arguments=inputs[fixed : fixed + len(arguments.names)],
        parameters=flattener.parameters,
        unquantizable=(),
        repeated=flattener.repeated,
        carried=frozenset(flattener.carried),
    )


def _parameters(
    inputs: Iterable[tuple[int, jax.tree_util.KeyPath]],
) -> dict[int, tuple[str, ...]]:
    """Return the path of each parameter among the variables, boxes around values left out."""
    named = {
        v: tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        for v, path in inputs
    }
    return {v: path[1:] for v, path in named.items() if path[:1] == ("params",)}

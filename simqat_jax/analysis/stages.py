"""A planned call in a few stages, each compiled once for every version of the model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simqat_jax.analysis.layers import is_static, layers_of
from simqat_jax.analysis.measures import Measured, Summaries, joined
from simqat_jax.analysis.switched import Switched, Version
from simqat_jax.ir.plan import Placement
from simqat_jax.numerics.affine import quant_params
from simqat_jax.training.ranges import Stats
from simqat_jax.training.values import Value, Values

_MOST = 8
"""Stages of a call: with more of them less is computed again, and more is kept and compiled."""
_STEPS = 8
"""Steps of a stage, at least."""
Tensors = dict[int, jax.Array]
"""Tensors that depend on the data."""


class Stages:
    """The stages of a call.

    What comes before a layer does not depend on it: a run that differs from a known one in one
    layer starts where the layer's stage does.

    Args:
      placement: the call; the first of its inputs are the variables.
      stats: its ranges.
      leaves: how many variables there are.

    Attributes:
      placement: the call.
      layers: its layers.
      stage_of: the stage of each step on data, by the step's place.
      first: of each layer the stage of its first step.
      outputs: the results by which the model is judged.
      tensors: the names of the quantized tensors.
    """

    def __init__(self, placement: Placement, stats: Stats, leaves: int):
        self.placement = placement
        self.layers = layers_of(placement, leaves)
        self._stats = stats
        graph, steps = placement.graph, placement.steps
        self._variables = graph.inputs[:leaves]
        self._data = graph.inputs[leaves:]
        moving = [n for n, step in enumerate(steps) if not is_static(placement, step)]
        self._static = [n for n, step in enumerate(steps) if is_static(placement, step)]
        size = max(_STEPS, -(-len(moving) // _MOST))
        self._parts = [moving[k : k + size] for k in range(0, len(moving), size)]
        judged = graph.activations() - set(graph.inputs)
        floating = {v for v in judged if jnp.issubdtype(graph.avals[v].dtype, jnp.floating)}
        self.outputs: tuple[int, ...] = tuple(sorted(floating))
        self.stage_of = {n: stage for stage, part in enumerate(self._parts) for n in part}
        self.first = self._first_stages()
        self.tensors = self._tensor_names()
        self._kept = self._kept_tensors()
        self._compiled = functools.cache(self._compile)

    def __len__(self) -> int:
        return len(self._parts)

    def real_kernels(self, leaves: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """Return the kernels of these variables, folded where they fold, by the step's place."""
        avals = [self.placement.graph.avals[v] for v in self._data]

        def found(leaves: tuple[jax.Array, ...]) -> dict[int, jax.Array]:
            data = {  # on which no kernel depends
                v: jnp.zeros(aval.shape, aval.dtype)
                for v, aval in zip(self._data, avals, strict=True)
            }
            off = Version(leaves, {}, jnp.zeros(len(self.layers.names), bool))
            run = Switched(self.placement, self._stats, self.layers, off)
            env = self._env(leaves, data)
            for step in self.placement.steps:
                run.step(step, env, {})
            return run.kernels

        return jax.jit(found)(tuple(leaves))

    def start(self, arrays: Sequence[jax.Array]) -> Tensors:
        """Return the tensors that the first stage reads: the arrays of a batch."""
        return dict(zip(self._data, arrays, strict=True))

    def advance(self, stage: int, version: Version, tensors: Tensors) -> Tensors:
        """Run a stage; return what is read behind it."""
        return self._compiled(stage)(version, tensors)

    def finish(self, stage: int, version: Version, tensors: Tensors) -> list[jax.Array]:
        """Run a stage and all behind it; return what the model is judged by."""
        for number in range(stage, len(self)):
            tensors = self.advance(number, version, tensors)
        return [tensors[v] for v in self.outputs]

    def compare(
        self, stage: int, versions: tuple[Version, Version], tensors: tuple[Tensors, Tensors]
    ) -> tuple[tuple[Tensors, Tensors], Summaries]:
        """Run a stage of the float model and the quantized one, and measure quantized tensors.

        Args:
          stage: which.
          versions: the float model and the quantized one.
          tensors: of each, what the stage reads.

        Returns:
          Of each, what the stage behind it reads; and the measures, by the name of the tensor.
        """
        after, found = self._compiled(stage, True)(versions, tensors)
        named: Summaries = {}
        for v, value in found.items():
            named = joined(named, {self.tensors[v]: value.summed()})
        return after, named

    # Compiled ---------------------------------------------------------------------------------

    def _compile(self, stage: int, compares: bool = False) -> Callable[..., Any]:
        compute = self._compare if compares else self._advance
        return jax.jit(functools.partial(compute, stage))

    def _advance(self, stage: int, version: Version, tensors: Tensors) -> Tensors:
        return self._advanced(stage, version, tensors)[1]

    def _compare(
        self, stage: int, versions: tuple[Version, Version], tensors: tuple[Tensors, Tensors]
    ) -> tuple[tuple[Tensors, Tensors], dict[int, Measured]]:
        real, after_real = self._advanced(stage, versions[0], tensors[0])
        exact, after_exact = self._advanced(stage, versions[1], tensors[1])
        found = {}
        for v, unrounded in exact.unrounded.items():
            quantizer = self.placement.at[v]
            params = quant_params(*exact.range(quantizer, unrounded), quantizer.spec)
            found[v] = Measured.of(real.unrounded[v], unrounded, params, quantizer.spec)
        return (after_real, after_exact), found

    def _advanced(self, stage: int, version: Version, tensors: Tensors) -> tuple[Switched, Tensors]:
        run = Switched(self.placement, self._stats, self.layers, version)
        env = self._env(version.leaves, tensors)
        if stage == 0:
            run.put_inputs(env)
        for number in (*self._static, *self._parts[stage]):
            run.step(self.placement.steps[number], env, {})
        return run, {v: env[v].real for v in self._kept[stage]}

    def _env(self, leaves: Sequence[jax.Array], tensors: Tensors) -> Values:
        known = {**dict(zip(self._variables, leaves, strict=True)), **tensors}
        return {v: Value(x) for v, x in known.items()}

    # Structure --------------------------------------------------------------------------------

    def _first_stages(self) -> tuple[int, ...]:
        first = {layer: 0 for layer in self.layers.inputs.values()}
        for number, layer in enumerate(self.layers.steps):
            if layer is not None:
                first.setdefault(layer, self.stage_of.get(number, 0))
        return tuple(first[layer] for layer in range(len(self.layers.names)))

    def _tensor_names(self) -> dict[int, str]:
        """Return the name of each quantized tensor: its layer's, where a grid is shared."""
        at, shared = self.placement.at, self.placement.shared
        names = {v: self.layers.names[layer] for v, layer in self.layers.inputs.items()}
        for step, layer in zip(self.placement.steps, self.layers.steps, strict=True):
            for v in (v for node in step.nodes for v in node.outputs if v in at):
                assert layer is not None
                own = f"{self.layers.names[layer]}/output"
                names[v] = own if at[v].name in shared else at[v].name
        return names

    def _kept_tensors(self) -> list[list[int]]:
        """Return for each stage the tensors on data that are read behind it."""
        steps = self.placement.steps
        read, kept = set(self.outputs), list[list[int]]()
        made = set(self._data)
        for part in self._parts:
            made |= {v for n in part for node in steps[n].nodes for v in node.outputs}
        for part in reversed(self._parts):
            own = {v for n in part for node in steps[n].nodes for v in node.outputs}
            kept.append(sorted(read))
            inputs = {v for n in part for node in steps[n].nodes for v in node.inputs}
            read = (read - own) | ({v for v in inputs if isinstance(v, int)} & made - own)
        return kept[::-1]

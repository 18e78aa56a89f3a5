"""Convert a trained quantization-aware model to integers only."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import flax.errors
import jax
from flax.typing import VariableDict
from jax.core import Tracer

from simqat_jax.capture import Capture
from simqat_jax.config import SimQATConfig
from simqat_jax.integer.batch_size import (
    other_size,
    same_but_for_moves,
    same_graphs,
    same_programs,
    same_values,
)
from simqat_jax.integer.lower import NOT_EVALUATION, lower
from simqat_jax.integer.model import KEYWORDS, IntegerModel
from simqat_jax.integer.refusals import refuse_float_parts
from simqat_jax.ir.graph import Graph
from simqat_jax.ir.plan import Placement
from simqat_jax.ir.program import Program, PyTree
from simqat_jax.ir.program_builder import BATCH, FixedBatchError, ProgramBuilder
from simqat_jax.numerics.arguments import check_kind, check_mapping, shown
from simqat_jax.numerics.observers import Range
from simqat_jax.numerics.rounding import Backend
from simqat_jax.ops.shared import SharedLayers
from simqat_jax.training.arguments import check_method, check_variables
from simqat_jax.training.module import Method, QuantizedModule, trace
from simqat_jax.training.planner import place_quantizers
from simqat_jax.training.ranges import COLLECTION, STEP, Stats, check, ranges_and_steps

_ORDER = "write convert(qmodel, variables, x)."


def convert(
    qmodule: QuantizedModule,
    variables: VariableDict,
    *args: PyTree,
    backend: Backend | None = None,
    method: Method = None,
    **kwargs: PyTree,
) -> IntegerModel:
    """Make the integer-only model of a trained quantization-aware model.

    Where all sample arrays have the same first length, that is the batch size, and the integer
    model takes any. Its codes are those of evaluation under `SimQATConfig.backend`; another
    `backend` rounds additions and products of tensors as that runtime does.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: its trained variables.
      args: a sample of the model's arguments, arrays or ShapeDtypeStructs.
      backend: "tflite" or "onnx"; by default `SimQATConfig.backend`.
      method: of the float model, by name or function; by default its `__call__`.
      kwargs: keyword arguments of the call in evaluation: `train=False`; arrays among them are
        arguments of the integer model, by keyword.

    Returns:
      An IntegerModel.

    Raises:
      TypeError: no QuantizedModule, no or traced variables.
      ValueError: no sample, no such method, unobserved ranges, another model's variables, weights
        not finite, a `quant_delay` to come, per-channel activations, a layer of no integer form,
        float parts under `SimQATConfig(float_parts="refuse")`.

    Examples:
      >>> qmodel = SimQAT().apply(nn.Dense(2))
      >>> x = jnp.linspace(-1, 1, 12).reshape(4, 3)
      >>> variables = qmodel.init(jax.random.key(0), x)
      >>> _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
      >>> model = convert(qmodel, variables | updates, x)
      >>> model(x[:1]).shape
      (1, 2)
    """
    config = _checked(qmodule, variables, method, backend)
    call = _Call(qmodule, variables, args, method, kwargs)
    stats = ranges_and_steps(variables)
    lowered = partial(_lowered, config, _metadata(config, call), SharedLayers(), stats)
    sample = call.sample()
    builder, program = lowered(sample)
    if config.float_parts == "refuse":
        refuse_float_parts(program)
    free = _of_any_batch(call, lowered, _Lowered(sample, builder, program))
    return IntegerModel(program if free is None else free)


class _Lowered(NamedTuple):
    """A captured call, and the program that it became."""

    captured: Capture
    builder: ProgramBuilder
    program: Program


_Lower = Callable[..., tuple[ProgramBuilder, Program]]
"""From a captured call to a program."""


def _of_any_batch(call: "_Call", lowered: _Lower, sample: _Lowered) -> Program | None:
    """Return the program for batches of any size; None: the model holds on to the sample's."""
    if call.size is None:
        return None
    free = call.resized(BATCH)
    if free is None:
        return None
    found = _same(lowered, sample, free, call.size)
    if found is not None or call.size != 1:
        return found
    # For one example `jnp.matmul` leaves out the batch axis: two examples tell.
    two = call.resized(2)
    if two is None:
        return None
    try:
        found = _same(lowered, _Lowered(two, *lowered(two)), free, 2)
    except ValueError:
        return None
    return found if found and same_but_for_moves(sample.program, found) else None


def _same(lowered: _Lower, sample: _Lowered, free: Capture, size: int) -> Program | None:
    """Return the program of a free batch size; None: it is not that of a sample of `size`."""
    if not same_graphs(sample.captured.graph, free.graph, size):
        return None
    try:
        builder, program = lowered(free, free_batch=True, examples=other_size(size))
    except FixedBatchError:
        return None
    held = sample.builder.float_constants, builder.float_constants
    same = same_programs(sample.program, program, size) and same_values(*held)
    return program if same else None


def _metadata(config: SimQATConfig, call: "_Call") -> dict[str, object]:
    known: dict[str, object] = {"simqat_jax": version("simqat-jax")}
    known["config"] = dataclasses.asdict(config)
    if call.keywords:
        known[KEYWORDS] = call.keywords
    return known


def _lowered(
    config: SimQATConfig,
    metadata: Mapping[str, object],
    shared: SharedLayers,
    stats: tuple[Stats, ...],
    captured: Capture,
    *,
    free_batch: bool = False,
    examples: int = 1,
) -> tuple[ProgramBuilder, Program]:
    """Plan a captured call, and lower it."""
    placement = place_quantizers(captured.graph, config)
    _check_per_tensor(placement)
    ranges = _ranges(placement, *stats)
    builder = ProgramBuilder(captured.graph, captured.inputs, free_batch, examples)
    program = lower(placement, ranges, builder, captured.returned, shared, metadata)
    return builder, program


def _checked(
    qmodule: QuantizedModule, variables: VariableDict, method: Method, backend: Backend | None
) -> SimQATConfig:
    """Return the configuration to convert with; raise for what cannot be converted at all."""
    check_kind(
        "qmodule", qmodule, QuantizedModule, f"SimQAT(...).apply(model) returns one; {_ORDER}"
    )
    check_variables(variables, f"Pass what init returned, trained: {_ORDER}")
    check_method(method, qmodule.module)
    check_mapping(
        COLLECTION, variables.get(COLLECTION, {}), "Pass the collection that apply returned."
    )
    if any(isinstance(v, Tracer) for v in jax.tree.leaves(variables)):
        raise TypeError("convert takes concrete variables: call it outside of jit.")
    config = qmodule.config
    if backend is not None:
        config = dataclasses.replace(config, backend=backend)
    return config


def _check_per_tensor(placement: Placement) -> None:
    names = [q.name for q in placement.at.values() if q.num_channels is not None]
    if names:
        raise ValueError(
            "an integer layer cannot sum over channels of different scales: convert takes models "
            "whose activations have QuantSpec(per_channel=False), in SimQATConfig.activation and "
            f"in its rules; {len(names)} have not, as {names[0]}."
        )


def _ranges(placement: Placement, stats: Stats, steps: Stats) -> dict[str, Range]:
    """Return the range of each quantizer that looks for none in a constant, by name.

    Raises:
      ValueError: one was never observed; quantization is delayed to a later step.
    """
    states = check(placement, stats, steps)
    delay = max(placement.delay("weight"), placement.delay("activation"))
    if int(states[STEP]) < delay:
        raise ValueError(
            f"the model has trained for {int(states[STEP])} steps and quantizes from step {delay} "
            "on (quant_delay): what it computes by now is not quantized. Train on, or lower the "
            "delay."
        )
    known = {name: q.observer.known_range for name, q in placement.quantizers.items()}
    known = {name: ends for name, ends in known.items() if ends is not None}
    return known | {n: q.observer.range(states[n]) for n, q in placement.stateful.items()}


def _is_array(x: object) -> bool:
    return hasattr(x, "dtype")


def _shape(x: PyTree) -> PyTree:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x


class _Call:
    """A call of a quantized module, to be captured with one batch size or another."""

    def __init__(
        self,
        qmodule: QuantizedModule,
        variables: VariableDict,
        args: tuple,
        method: Method,
        kwargs: Mapping[str, PyTree],
    ):
        self.qmodule = qmodule
        self.variables = variables
        self.method = method
        self.args, self.kwargs = jax.tree.map(_shape, (args, dict(kwargs)))
        arrays = [x for x in jax.tree.leaves((self.args, self.kwargs)) if _is_array(x)]
        if not arrays:
            raise ValueError(
                "args must hold a sample of the model's arguments, arrays or ShapeDtypeStructs, "
                f"got {shown(args)}."
            )
        lengths = {x.shape[0] if x.shape else None for x in arrays}
        self.size = lengths.pop() if len(lengths) == 1 else None

    @property
    def keywords(self) -> dict[str, int]:
        """How many arrays are in each keyword argument that holds any."""
        counts = {k: sum(map(_is_array, jax.tree.leaves(v))) for k, v in self.kwargs.items()}
        return {k: count for k, count in sorted(counts.items()) if count}

    def sample(self) -> Capture:
        """Capture the call as it was given; raise ValueError where it draws random numbers."""
        captured = self.captured(None)
        self._check_no_keys(captured.graph)
        return captured

    def _check_no_keys(self, graph: Graph) -> None:
        """Raise ValueError for random keys: no file takes any."""
        leaves = jax.tree.leaves_with_path((self.args, self.kwargs))
        arrays = [(path, x) for path, x in leaves if _is_array(x)]
        for ((place, *inner), x), v in zip(arrays, graph.arguments, strict=True):
            if v in graph.keys:
                path = jax.tree_util.keystr(tuple(inner), simple=True, separator="/")
                kind = "keyword argument" if place.idx else "argument"
                raise ValueError(
                    f"{kind} {path} is a random key ({x.dtype}), and an integer model draws no "
                    "random numbers. Let the model draw none in evaluation and pass None, or give "
                    "it the random numbers themselves as an argument."
                )

    def captured(self, batch: int | None) -> Capture:
        def resized(x: PyTree) -> PyTree:
            if batch is None or not _is_array(x):
                return x
            return jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)

        args, kwargs = jax.tree.map(resized, (self.args, self.kwargs))
        try:
            return self._traced(args, kwargs)
        except flax.errors.InvalidRngError as error:
            raise ValueError(NOT_EVALUATION.format(path="the model")) from error

    def _traced(self, args: tuple, kwargs: Mapping[str, PyTree]) -> Capture:
        call = (self.qmodule, self.variables, args, kwargs, self.method)
        try:
            return trace(*call, rngs={}, mutable=[])  # evaluation updates nothing
        except flax.errors.ModifyScopeVariableError:  # or the model does, whatever the mode
            return trace(*call, rngs={})

    def resized(self, batch: int) -> Capture | None:
        """Capture with another batch size; None where the model takes none but its own."""
        try:
            return self.captured(batch)
        except Exception:  # whatever a model raises for a batch size that it does not take
            return None

"""Tell whether a model that was captured with another batch size is the same model.

The integer model takes any batch size where the model itself does. It is therefore captured twice,
with the sample's batch size and with one that no other length is a multiple of. Whatever differs
between the two but for that length depends on the batch size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.ir import replay
from simqat_jax.ir.graph import Contraction, Float, Graph
from simqat_jax.ir.program import Op, Program, at_batch
from simqat_jax.ir.program_builder import BATCH
from simqat_jax.ops.moves import Broadcast, Reshape, Transpose, needs_function


def same_graphs(sample: Graph, free: Graph, size: int) -> bool:
    """Whether the operations on data are the same, but for the batch size in their shapes.

    What is computed of constants alone does not count: programs hold its results.

    Args:
      sample: captured with batches of `size`.
      free: captured with batches of `BATCH`.
      size: the sample's batch size.
    """
    nodes = [[n for n in g.nodes if n.data_inputs(g.data)] for g in (sample, free)]
    if [(type(n), len(n.outputs)) for n in nodes[0]] != [
        (type(n), len(n.outputs)) for n in nodes[1]
    ]:
        return False
    shapes = (
        (sample.avals[v].shape, free.avals[w].shape)
        for a, b in zip(*nodes, strict=True)
        for v, w in zip(a.outputs, b.outputs, strict=True)
    )
    resized = all(a == tuple(_at(d, size) for d in b) for a, b in shapes)
    floats = (n for n in nodes[1] if isinstance(n, Float | Contraction) or needs_function(n))
    return resized and all(map(replay.scales_with_batch, floats))


def other_size(size: int) -> int:
    """Return with how many examples to compute the constants of a model with a free batch size.

    A constant that differs along the batch, or that is computed from its size, is another one then.

    Args:
      size: the sample's batch size.
    """
    return 2 if size == 1 else 1


def _at(length: int, size: int) -> int:
    return length // BATCH * size if length and length % BATCH == 0 else length


def same_programs(sample: Program, free: Program, size: int) -> bool:
    """Whether two programs are the same, with -k for k times the batch size in `free`.

    Args:
      sample: lowered with batches of `size`.
      free: lowered with a free batch size.
      size: the sample's batch size.
    """
    if len(sample.ops) != len(free.ops) or len(sample.tensors) != len(free.tensors):
        return False
    return (
        all(
            (a.kind, a.path, a.inputs, a.outputs) == (b.kind, b.path, b.inputs, b.outputs)
            and _same_attributes(_fields(a), _fields(b), size)
            and a.arrays.keys() == b.arrays.keys()
            and same_values(list(a.arrays.values()), list(b.arrays.values()))
            for a, b in zip(sample.ops, free.ops, strict=True)
        )
        and all(
            (a.name, a.dtype, a.grid) == (b.name, b.dtype, b.grid)
            and _same_attributes(a.shape, b.shape, size)
            and same_values([a.value], [b.value])
            for a, b in zip(sample.tensors, free.tensors, strict=True)
        )
        and sample.structure == free.structure
    )


def same_but_for_moves(sample: Program, free: Program) -> bool:
    """Whether a program of one example computes what one with a free batch size makes of one.

    What gives values other shapes may differ, but not the shapes that results have in the end.
    """
    computing = [[op for op in p.ops if not isinstance(op, _MOVES)] for p in (sample, free)]
    results = [[p.tensors[i] for i in p.outputs] for p in (sample, free)]
    return (
        list(map(_computed, computing[0])) == list(map(_computed, computing[1]))
        and all(
            a.arrays.keys() == b.arrays.keys()
            and same_values(list(a.arrays.values()), list(b.arrays.values()))
            for a, b in zip(*computing, strict=True)
        )
        and all(
            (a.shape, a.dtype, a.grid) == (at_batch(b.shape, 1), b.dtype, b.grid)
            for a, b in zip(*results, strict=True)
        )
        and sample.structure == free.structure
    )


_MOVES = (Reshape, Transpose, Broadcast)


def _computed(op: Op) -> tuple[str, dict[str, Any]]:
    """Return what an operation computes, whatever the shapes of its tensors."""
    fields = _fields(op).items()
    return op.kind, {k: v for k, v in fields if k == "clamp" or isinstance(v, float | np.floating)}


def _fields(op: Op) -> dict[str, Any]:
    """Return what an operation is, without the bytes of constants: those are compared."""
    return {k: v for k, v in op.attributes.items() if k != "constant_bytes"}


def _same_attributes(sample: Any, free: Any, size: int) -> bool:
    if isinstance(sample, Mapping):
        return sample.keys() == free.keys() and all(
            _same_attributes(sample[k], free[k], size) for k in sample
        )
    if isinstance(sample, (list, tuple)):
        return len(sample) == len(free) and all(
            _same_attributes(a, b, size) for a, b in zip(sample, free, strict=True)
        )
    return sample == free or (isinstance(free, int) and free < 0 and sample == -free * size)


def same_values(sample: Sequence[ArrayLike | None], free: Sequence[ArrayLike | None]) -> bool:
    """Whether constants are equal, once those of `free` are repeated along the batch."""
    return len(sample) == len(free) and all(map(_same_value, sample, free))


def _same_value(a: ArrayLike | None, b: ArrayLike | None) -> bool:
    if a is b:
        return True
    if a is None or b is None:
        return False
    a, b = map(_numbers, (a, b))
    if a.dtype != b.dtype or a.ndim != b.ndim:
        return False
    if any(n not in (1, m) for n, m in zip(b.shape, a.shape, strict=True)):
        return False
    return a.tobytes() == np.broadcast_to(b, a.shape).tobytes()


def _numbers(x: ArrayLike) -> np.ndarray:
    """Return an array of numbers: of a random key those that it is made of."""
    is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(jnp.asarray(x)) if is_key else x)

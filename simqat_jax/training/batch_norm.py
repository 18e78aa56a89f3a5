"""BatchNorm in a run: folded into the layer before it, frozen, or without statistics to take."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.capture import batch_norm
from simqat_jax.ir.graph import BatchNorm, Graph, Node, Product
from simqat_jax.ir.plan import Step
from simqat_jax.numerics import folding
from simqat_jax.numerics.observers import AxisName


def folded_step(
    step: Step,
    values: Sequence[jax.Array],
    norm_values: Sequence[jax.Array],
    quantize: Callable[[jax.Array, jax.Array], jax.Array],
    frozen: jax.Array | None,
    dtype: np.dtype,
) -> dict[int, jax.Array]:
    """Run a layer with the BatchNorm behind it folded in, on real values.

    Args:
      step: the layer and what is fused behind it.
      values: of the layer's inputs.
      norm_values: parameters and statistics of the BatchNorm.
      quantize: fake quantization of a kernel, times a factor for each output channel.
      frozen: whether running statistics are used after all; None: never.
      dtype: of the result.

    Returns:
      The tensors that the BatchNorm makes.
    """
    node, norm = step.node, step.norm
    assert isinstance(node, Product) and norm is not None
    x, named = values[0], node.layer.named(values[1:])
    kernel, module, old = named["kernel"], norm.module, norm.layer.named(norm_values)
    no_bias = [jnp.zeros_like(v) for name, v in named.items() if name != "kernel"]
    layer = folding.Layer(
        run=lambda folded: node.run(x, folded.astype(kernel.dtype), *no_bias)[0],
        kernel=kernel,
        bias=named.get("bias"),
        norm=folding.batch_norm_state(old, module.epsilon),
        epsilon=module.epsilon,
        quantize=quantize,
        moments=_moments(norm, old.get("mask")) if norm.training else None,
        frozen=frozen,
    )
    result = folding.FOLDS[step.fold](layer)
    results = {norm.outputs[0]: result.output.astype(dtype)}
    for v, name in zip(norm.outputs[1:], ("mean", "var"), strict=False):
        new = module.momentum * old[name] + (1 - module.momentum) * getattr(result, name)
        results[v] = layer.unless_frozen(new, old[name])
    return results


def _moments(norm: BatchNorm, mask: jax.Array | None) -> folding.Moments:
    module = norm.module
    return folding.Moments(
        module.axis_name, module.axis_index_groups, module.use_fast_variance, mask
    )


def unless_frozen(
    node: Node, values: Sequence[jax.Array], results: Sequence[jax.Array], frozen: jax.Array
) -> Sequence[jax.Array]:
    """Return a node's results; where BatchNorm is frozen, a BatchNorm's on running statistics."""
    if not isinstance(node, BatchNorm) or not node.training:
        return results
    still = batch_norm(node.layer, *values, use_running_average=True)
    kept = [values[1 + node.layer.names.index(name)] for name in ("mean", "var")]
    return [jnp.where(frozen, a, b) for a, b in zip((*still, *kept), results, strict=True)]


def check_batch_statistics(graph: Graph) -> None:
    """Raise ValueError for a BatchNorm that would take statistics of one value per channel."""
    for node in graph.nodes:
        if not isinstance(node, BatchNorm) or not node.training:
            continue
        shape = graph.avals[node.outputs[0]].shape
        features = math.prod(shape[axis] for axis in node.axes)
        if math.prod(shape) == features and node.module.axis_name is None:
            raise ValueError(
                f"{'/'.join(node.path)}: its batch holds one value per channel (shape {shape}), "
                "which has no variance. Train with a larger batch, or call the BatchNorm with "
                "use_running_average=True."
            )


def mapped_axis(graph: Graph) -> AxisName:
    """Return the axis over which BatchNorm takes its batch statistics; None: it takes its own.

    Raises:
      ValueError: several BatchNorms name different axes.
    """
    norms = [n for n in graph.nodes if isinstance(n, BatchNorm) and n.training]
    named = {n.module.axis_name: n for n in norms if n.module.axis_name is not None}
    if len(named) > 1:
        listing = ", ".join(f"{'/'.join(n.path)}: {axis!r}" for axis, n in named.items())
        raise ValueError(
            f"BatchNorms name different axes ({listing}), so that it is not clear over which "
            "ranges are taken. Give all of them the same axis_name."
        )
    return next(iter(named), None)

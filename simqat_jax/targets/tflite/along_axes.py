"""Write primitives that work along axes as TFLite operators: sums, products, convolutions."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from simqat_jax.targets.refusals import refuse
from simqat_jax.targets.tflite.at import At
from simqat_jax.targets.tflite.subgraph import Plain

_REDUCE = {"reduce_sum": "SUM", "reduce_prod": "REDUCE_PROD"}
_REDUCE |= {"reduce_max": "REDUCE_MAX", "reduce_min": "REDUCE_MIN"}
_TRUTH = {"reduce_or": "REDUCE_ANY", "reduce_max": "REDUCE_ANY"}
_TRUTH |= {"reduce_and": "REDUCE_ALL", "reduce_min": "REDUCE_ALL"}

VERSIONS = {
    **dict.fromkeys(("SUM", "REDUCE_PROD", "REDUCE_ALL", "REDUCE_ANY"), ("ReducerOptions", 1)),
    "ARG_MAX": ("ArgMaxOptions", 1),
    "ARG_MIN": ("ArgMinOptions", 1),
    "BATCH_MATMUL": ("BatchMatMulOptions", 1),
    "CUMSUM": ("CumsumOptions", 1),
    "TOPK_V2": (None, 1),
}
"""The options and the version of each operator that only these need."""


def _reduce(at: At, x: Plain) -> Plain:
    kinds = _TRUTH if x.dtype == "bool" else _REDUCE
    if at.op.name not in kinds:
        at.refuse(f"TFLite has no {at.op.name} of {x.dtype}")
    return at.make(kinds[at.op.name], x, at.ints(at.params["axes"]), keepDims=False)


def _arg(at: At, x: Plain) -> Plain:
    name = "ARG_MAX" if at.op.name == "argmax" else "ARG_MIN"
    kind = at.w.schema.TensorType.INT32
    made = at.make(name, x, at.ints(at.params["axis"]), dtype="int32", outputType=kind)
    return at.cast(made, at.output().dtype)


def _cumsum(at: At, x: Plain) -> Plain:
    given = {"exclusive": False, "reverse": at.params["reverse"]}
    return at.make("CUMSUM", x, at.ints(at.params["axis"]), **given)


def _top(at: At, x: Plain, count: int) -> tuple[Plain, Plain]:
    """Return the largest along the last axis, descending, and their places."""
    shape = (*x.shape[:-1], count)
    values, places = (at.w.plain(at.op.path, shape, d) for d in (x.dtype, "int32"))
    inputs = [x.index, at.ints(count).index]
    at.w.emit("TOPK_V2", inputs, [values.index, places.index])
    return values, places


def _swapped(x: Plain, axis: int) -> list[int]:
    """Return the order of axes in which one is the last, and the last there."""
    order = list(range(len(x.shape)))
    order[axis], order[-1] = order[-1], order[axis]
    return order


def _sort(at: At, x: Plain) -> Plain:
    order = _swapped(x, at.params["axis"])
    x = at.transposed(x, order)
    if x.shape[-1] < 0:
        refuse(at.op, "it sorts the batch", "Sort it outside of the model.")
    falling, _ = _top(at, x, x.shape[-1])
    last = at.ints([len(x.shape) - 1])
    return at.transposed(at.make("REVERSE_V2", falling, last, shape=x.shape), order)


def _top_k(at: At, x: Plain) -> list[Plain]:
    order = _swapped(x, at.params["axis"])
    return [at.transposed(y, order) for y in _top(at, at.transposed(x, order), at.params["k"])]


def _dot_general(at: At, a: Plain, b: Plain) -> Plain:
    """Bring both to (batch ..., rows, columns), multiply, and bring the product to its shape."""
    if a.dtype != "float32" or at.output().dtype != "float32":
        at.refuse(f"TFLite multiplies no matrices of {a.dtype}")
    batch = at.params["batch"]
    contract = at.params["contract"]
    free = [
        [k for k in range(len(x.shape)) if k not in batch[p] and k not in contract[p]]
        for p, x in enumerate((a, b))
    ]
    orders = (*batch[0], *free[0], *contract[0]), (*batch[1], *contract[1], *free[1])
    lead = [a.shape[k] for k in batch[0]]
    depth = _product(at, [a.shape[k] for k in contract[0]])
    rows, columns = (
        _product(at, [x.shape[k] for k in axes]) for x, axes in zip((a, b), free, strict=True)
    )
    left = at.reshaped(at.transposed(a, orders[0]), (*lead, rows, depth))
    right = at.reshaped(at.transposed(b, orders[1]), (*lead, depth, columns))
    if rows < 0 and columns < 0:
        at.refuse("it multiplies one batch by another")
    shape = (*lead, rows, columns)
    return at.reshaped(at.make("BATCH_MATMUL", left, right, shape=shape), at.output().shape)


def _product(at: At, lengths: Sequence[int]) -> int:
    """Return a product of lengths, -k for k times the batch size."""
    if sum(d < 0 for d in lengths) > 1:
        at.refuse("it multiplies one batch by another")
    return math.prod(lengths)


def _kernel(at: At, depthwise: bool) -> Plain:
    """Return a convolution's kernel: (out, rows, columns, in), or (1, rows, columns, out)."""
    _, weights, _ = at.params["layout"]
    kernel = at.w.source.tensors[at.op.inputs[1]].value
    if kernel is None:
        at.refuse("TFLite convolves with constant kernels")
    kernel = kernel.transpose(weights[0], *weights[2:], weights[1])
    kernel = kernel.reshape(len(kernel), *(1,) * (4 - kernel.ndim), *kernel.shape[1:])
    return at.number(kernel.transpose(3, 1, 2, 0) if depthwise else kernel)


def _conv(at: At, x: Plain, _: Plain) -> Plain:
    """Convolve with channels last, and one axis as two."""
    given, (data, _, result) = at.params, at.params["layout"]
    strides, dilation, padding = (given[k] for k in ("strides", "kernel_dilation", "padding"))
    if len(strides) > 2 or any(d != 1 for d in given["input_dilation"]):
        at.refuse("TFLite convolves over one or two axes, and dilates no input")
    if any(v < 0 for p in padding for v in p):
        at.refuse("it cuts its input")
    if at.output().dtype != "float32":
        at.refuse("it convolves integers")
    x = at.transposed(x, (data[0], *data[2:], data[1]))
    if any(v for p in padding for v in p):
        ends = ((0, 0), *padding, (0, 0))
        shape = tuple(d + sum(p) if d >= 0 else d for d, p in zip(x.shape, ends, strict=True))
        x = at.make("PAD", x, at.ints(ends), shape=shape)
    if len(strides) < 2:
        x = at.reshaped(x, (x.shape[0], 1, *x.shape[1:]))
        strides, dilation = (1, *strides), (1, *dilation)
    options = {"strideH": strides[0], "strideW": strides[1], "padding": at.w.schema.Padding.VALID}
    options |= {"dilationHFactor": dilation[0], "dilationWFactor": dilation[1]}
    order = (result[0], *result[2:], result[1])
    last = tuple(at.output().shape[k] for k in order)
    planar = last if len(last) == 4 else (last[0], 1, *last[1:])
    depthwise = 1 < given["groups"] == x.shape[-1]
    name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    if depthwise:
        options["depthMultiplier"] = planar[-1] // given["groups"]
    bias = at.number(np.zeros(planar[-1]))
    made = at.make(name, x, _kernel(at, depthwise), bias, shape=planar, **options)
    return at.transposed(at.reshaped(made, last), [int(k) for k in np.argsort(order)])


WRITERS: Mapping[str, Callable[..., Plain | Sequence[Plain]]] = {
    **dict.fromkeys((*_REDUCE, *_TRUTH), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    "cumsum": _cumsum,
    "sort": _sort,
    "top_k": _top_k,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
"""What writes each primitive that works along axes."""

"""Write primitives that work along axes as ONNX nodes: sums, extremes, products, convolutions."""

from collections.abc import Callable, Mapping

import numpy as np

from simqat_jax.targets.onnx.at import At
from simqat_jax.targets.refusals import refuse

_REDUCE = {"reduce_sum": "ReduceSum", "reduce_prod": "ReduceProd"}
_EXTREME = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}
_TRUTH = {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}


def _reduce(at: At, x: str) -> str:
    name = at.op.name
    if name in _TRUTH and not at.is_bool:
        at.refuse("it joins the bits of integers")
    x = at.cast(x, "int32") if at.is_bool else x
    kind = (_REDUCE | _EXTREME | _TRUTH)[name]
    whole = at.node(kind, x, at.ints(at.params["axes"]), keepdims=0)
    return at.cast(whole, "bool") if at.is_bool else whole


def _arg(at: At, x: str) -> str:
    kind = "ArgMax" if at.op.name == "argmax" else "ArgMin"
    x = at.cast(x, "int32") if at.is_bool else x
    return at.cast(at.node(kind, x, axis=at.params["axis"], keepdims=0), at.output.dtype)


def _cumsum(at: At, x: str) -> str:
    axis = at.number(at.params["axis"], "int64")
    return at.node("CumSum", x, axis, reverse=int(at.params["reverse"]))


def _top(at: At, x: str, count: int, axis: int, largest: int) -> list[str]:
    names = [at.w.name(at.op.path) for _ in range(2)]
    given = {"axis": axis, "largest": largest, "sorted": 1}
    at.w.nodes.append(at.w.helper.make_node("TopK", [x, at.ints([count])], names, **given))
    return names


def _sort(at: At, x: str) -> str:
    axis = at.params["axis"]
    length = at.inputs[0].shape[axis]
    if length < 0:
        refuse(at.op, "it sorts the batch", "Sort it outside of the model.")
    return _top(at, x, length, axis, 0)[0]


def _top_k(at: At, x: str) -> list[str]:
    values, indices = _top(at, x, at.params["k"], at.params["axis"], 1)
    return [values, at.cast(indices, at.w.model.tensors[at.op.outputs[1]].dtype)]


def _dot_general(at: At, a: str, b: str) -> str:
    """Multiply matrices where both are some, in another order of axes; else sum as Einstein did."""
    batch, contract = at.params["batch"], at.params["contract"]
    ranks = [len(t.shape) for t in at.inputs]
    free = [
        [k for k in range(rank) if k not in batch[p] and k not in contract[p]]
        for p, rank in enumerate(ranks)
    ]
    if len(contract[0]) == 1 == len(free[1]) and (len(free[0]) == 1 or not batch[0]):
        orders = (*batch[0], *free[0], *contract[0]), (*batch[1], *contract[1], *free[1])
        pair = (
            x if list(order) == sorted(order) else at.node("Transpose", x, perm=order)
            for x, order in zip((a, b), orders, strict=True)
        )
        return at.node("MatMul", *pair)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names: list[dict[int, str]] = [{}, {}]
    for axes in (batch, contract):
        for left, right in zip(*axes, strict=True):
            names[0][left] = names[1][right] = next(letters)
    for side, axes in zip(names, free, strict=True):
        side.update((axis, next(letters)) for axis in axes)
    terms = ["".join(side[k] for k in range(r)) for side, r in zip(names, ranks, strict=True)]
    result = [names[0][k] for k in (*batch[0], *free[0])] + [names[1][k] for k in free[1]]
    return at.node("Einsum", a, b, equation=f"{','.join(terms)}->{''.join(result)}")


def _conv(at: At, x: str, kernel: str) -> str:
    given, (data, weights, result) = at.params, at.params["layout"]
    padding = given["padding"]
    if at.output.dtype != "float32":
        at.refuse("it convolves integers")
    if any(d != 1 for d in given["input_dilation"]) or any(v < 0 for p in padding for v in p):
        at.refuse("it dilates or cuts its input")
    constant = at.inputs[1].value
    if constant is None:
        kernel = at.node("Transpose", kernel, perm=weights)
    else:
        kernel = at.number(constant.transpose(weights))
    made = at.node(
        "Conv",
        at.node("Transpose", x, perm=data),
        kernel,
        pads=[p[end] for end in (0, 1) for p in padding],
        strides=given["strides"],
        dilations=given["kernel_dilation"],
        group=given["groups"],
    )
    return at.node("Transpose", made, perm=list(map(int, np.argsort(result))))


WRITERS: Mapping[str, Callable[..., str | list[str]]] = {
    **dict.fromkeys((*_REDUCE, *_EXTREME, *_TRUTH), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    "cumsum": _cumsum,
    "sort": _sort,
    "top_k": _top_k,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
"""What writes each primitive that works along axes."""

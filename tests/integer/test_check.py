"""Programs whose parts do not fit together are refused before they run."""

import dataclasses

import numpy as np
import pytest
from single_operations import integer_model, layer, operation

import simqat_jax as sq
from simqat_jax.integer.check import check
from simqat_jax.ir.program import Tensor

X, Y = sq.Grid(0.1, 7, 0, 255), sq.Grid(0.2, 9, 0, 255)


def program(kind, shapes, attributes=None, arrays=None, constant=None):
    """A program of one operation; the last of the shapes is its output's."""
    grids = [X] * (len(shapes) - 1) + [Y]
    tensors = [
        Tensor(f"t{n}", s, "float32", g) for n, (s, g) in enumerate(zip(shapes, grids, strict=True))
    ]
    last = len(shapes) - 1
    read = tuple(range(last))
    if constant is not None:
        tensors.append(constant)
        read = (*read, len(tensors) - 1)
    op = operation(kind, read, (last,), {"clamp": (0, 255), **(attributes or {})}, arrays)
    return integer_model("tflite", tensors, [op], range(last), [last]).program


def dense():
    arrays = layer(np.random.default_rng(0), (0.1, 7), (0.2, 9), (6, 4), False)
    return program("dense", [(-1, 6), (-1, 4)], {}, arrays)


WHOLE = {
    "dense": dense(),
    "table": program("table", [(-1, 3), (-1, 3)], {}, {"table": np.zeros(256, np.uint8)}),
    "mul": program("mul", [(-1, 3)] * 3, {}, {"multiplier": np.float32(0.3)}),
    "sum": program(
        "sum", [(-1, 5, 3), (-1, 3)], {"axes": (1,), "count": 5.0}, {"multiplier": np.float32(0.1)}
    ),
    "a mask": program(
        "softmax",
        [(-1, 4, 3), (-1, 4, 3)],
        {"axis": 2, "keeps": True},
        None,
        Tensor("mask", (1, 1, 3), "bool", None, np.array([[[True, False, True]]])),
    ),
    "a constant that repeats": program(
        "mul",
        [(-1, 3), (-1, 3)],
        {},
        {"multiplier": np.float32(0.3)},
        Tensor("constant", (-1, 3), "float32", X, np.ones((1, 3), np.uint8)),
    ),
}


def arrays(**changes):
    def change(given):
        (op,) = given.ops
        held = {k: v for k, v in {**op.arrays, **changes}.items() if v is not None}
        return dataclasses.replace(given, ops=(dataclasses.replace(op, arrays=held),))

    return change


def fields(**changes):
    return lambda given: dataclasses.replace(
        given, ops=(dataclasses.replace(given.ops[0], **changes),)
    )


def tensor(number, **changes):
    def change(given):
        tensors = list(given.tensors)
        tensors[number] = dataclasses.replace(tensors[number], **changes)
        return dataclasses.replace(given, tensors=tuple(tensors))

    return change


@pytest.mark.parametrize("name", WHOLE)
def test_what_runs_is_accepted(name):
    check(WHOLE[name])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("dense", arrays(kernel=None), r"layer \(dense\).*has arrays .* needs .*'kernel'"),
        ("dense", arrays(more=np.ones(3)), r"layer \(dense\).*'more'"),
        ("dense", arrays(kernel=np.zeros((5, 4), np.int8)), r"layer \(dense\) does not fit"),
        (
            "dense",
            arrays(kernel=np.zeros((6, 4), np.float32)),
            "kernel is float32 .* int8 or int16",
        ),
        ("dense", arrays(bias=np.zeros(1, np.int32)), r"bias is int32 of shape \(1,\).*\(4,\)"),
        ("dense", arrays(bias=np.zeros(4, np.int64)), "bias is int64 .* must be int32"),
        ("dense", arrays(multiplier=np.zeros((), np.float32)), r"multiplier is float32 .*\(4,\)"),
        ("dense", tensor(1, shape=(-1, 5)), r"layer \(dense\) .*\(5,\)"),
        ("dense", tensor(1, shape=(-2, 4)), r"it makes int8\[2, 4\] of t1, .* int8\[4, 4\]"),
        ("dense", tensor(1, grid=None), r"layer \(dense\) does not fit"),
        ("dense", fields(clamp=(0,)), r"layer \(dense\) does not fit"),
        ("table", arrays(table=np.zeros(255, np.uint8)), r"table is uint8 of shape \(255,\)"),
        ("table", arrays(table=np.zeros(256, np.int8)), "table is int8 .* must be uint8"),
        ("mul", arrays(multiplier=np.ones(3, np.float32)), r"multiplier .*\(3,\).* shape \(\)"),
        ("sum", fields(axes=(4,)), r"layer \(sum\) does not fit"),
        ("sum", fields(axes=("1",)), r"layer \(sum\) does not fit"),
        ("sum", arrays(multiplier=np.ones((7, 3), np.float32)), r"layer \(sum\) does not fit"),
        ("a mask", tensor(2, value=np.ones((1, 3), bool)), r"constant mask .*\(1, 3\)"),
        ("a mask", tensor(2, value=np.ones((1, 1, 3), np.int32)), "mask is int32 .* must be bool"),
        ("a constant that repeats", tensor(2, value=np.ones((2, 3), np.uint8)), r"\(1, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(name, change, said):
    with pytest.raises(ValueError, match=said):
        check(change(WHOLE[name]))

"""Integer models of one operation, with any grids: what the exporters' tests write and run."""

import dataclasses

import numpy as np
import pytest
from hypothesis import strategies as st
from models import export

import simqat_jax as sq
from simqat_jax.ir.program import Op, Program, Tensor
from simqat_jax.ops.registry import PROGRAM_OPERATIONS

points = st.integers(0, 255)
# Scales whose sums and products often lie in the middle of two codes.
ties = st.tuples(st.sampled_from([k / 64 for k in (1, 2, 3, 4, 6, 12)]), points)
grids = st.one_of(st.tuples(st.floats(0.003, 0.3), points), ties)
seeds = st.integers(0, 2**31)
kernel_bits = st.sampled_from([8, 4, 2])
both = pytest.mark.parametrize("backend", ["onnx", "tflite"])


def operation(kind, inputs, outputs, attributes=None, arrays=None, path="layer"):
    """An operation of a program by its name in files; attributes that it has not are left out."""
    op = PROGRAM_OPERATIONS[kind]
    names = {field.name for field in dataclasses.fields(op)}
    given = {k: as_tuple(v) for k, v in (attributes or {}).items() if k in names}
    return op(kind=kind, path=path, inputs=inputs, outputs=outputs, arrays=arrays or {}, **given)


def as_tuple(value):
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def integer_model(backend: str, tensors: list[Tensor], ops: list[Op], inputs, outputs):
    """An integer model that returns one array."""
    program = Program(
        tensors=tuple(tensors),
        ops=tuple(ops),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        structure=0,
        backend=backend,
        metadata={},
    )
    program.validate()
    return sq.IntegerModel(program)


def single(backend, kind, grids, attributes, arrays=None, shape=(-1, 16), out=None, clamp=(0, 255)):
    """An integer model of one operation; the last of `grids` is its output's."""
    shapes = [shape] * (len(grids) - 1) + [out or shape]
    tensors = [
        Tensor(f"t{n}", s, "float32", sq.Grid(float(np.float32(scale)), z, 0, 255))
        for n, (s, (scale, z)) in enumerate(zip(shapes, grids, strict=True))
    ]
    last = len(grids) - 1
    attributes = {"clamp": list(clamp), **attributes}
    op = operation(kind, tuple(range(last)), (last,), attributes, arrays)
    return integer_model(backend, tensors, [op], range(last), [last])


def layer(rng, x, y, shape, tie, bits=8):
    """Arrays of a layer with a kernel of this shape; 8 bits without the lowest code."""
    channels = shape[-1]
    scale = rng.uniform(0.001, 0.02, channels)
    scale = (2.0 ** rng.integers(-9, -5, channels) if tie else scale).astype(np.float32)
    return {
        "kernel": rng.integers(max(-(2 ** (bits - 1)), -127), 2 ** (bits - 1), shape).astype(
            np.int8
        ),
        "scale": scale,
        "bias": rng.integers(-5000, 5000, channels).astype(np.int32),
        "multiplier": np.float32(x[0]) * scale / np.float32(y[0]),
    }


def random_codes(model, batch, seed=0):
    """Codes for each input of a model, with every code as likely."""
    rng, inputs = np.random.default_rng(seed), [model.tensors[i] for i in model.inputs]
    shapes = [[-d * batch if d < 0 else d for d in t.shape] for t in inputs]
    return [
        rng.integers(t.grid.qmin, t.grid.qmax, shape, endpoint=True).astype(t.grid.dtype)
        for t, shape in zip(inputs, shapes, strict=True)
    ]


def compared(model, folder, codes):
    """Write the model, run the file, and compare all codes."""
    path = folder / f"single.{model.backend}"
    export(model, path, integer_io=True)
    file = sq.open_file(path, threads=1, isolated=False)
    dtype = np.uint8 if model.backend == "onnx" else np.int8

    def stored(values, i):
        return model.tensors[i].grid.in_file(values, dtype)

    got = file.run([stored(c, i) for c, i in zip(codes, model.inputs, strict=True)])
    want, (i,) = model.run_codes(*codes), model.outputs
    want = want if model.tensors[i].grid is None else stored(want, i)
    np.testing.assert_array_equal(got[0], want)

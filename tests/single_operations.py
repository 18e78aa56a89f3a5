"""Integer models of one operation, with any grids: what the exporters' tests write and run."""

import numpy as np
from hypothesis import strategies as st

from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Grid, Op, Tensor

points = st.integers(0, 255)
# Scales whose sums and products often lie in the middle of two codes.
ties = st.tuples(st.sampled_from([k / 64 for k in (1, 2, 3, 4, 6, 12)]), points)
grids = st.one_of(st.tuples(st.floats(0.003, 0.3), points), ties)
seeds = st.integers(0, 2**31)


def single(backend, kind, grids, attributes, arrays=None, shape=(-1, 16), out=None, clamp=(0, 255)):
    """An integer model of one operation; the last of `grids` is its output's."""
    shapes = [shape] * (len(grids) - 1) + [out or shape]
    tensors = [
        Tensor(f"t{n}", s, "float32", Grid(float(np.float32(scale)), z, 0, 255))
        for n, (s, (scale, z)) in enumerate(zip(shapes, grids, strict=True))
    ]
    last = len(grids) - 1
    attributes = {"clamp": list(clamp), **attributes}
    op = Op(kind, "layer", tuple(range(last)), (last,), attributes, arrays or {})
    return IntegerModel(tensors, [op], range(last), [last], 0, backend, {})


def layer(rng, x, y, shape, tie):
    """Arrays of a layer with a kernel of this shape."""
    channels = shape[-1]
    scale = rng.uniform(0.001, 0.02, channels)
    scale = (2.0 ** rng.integers(-9, -5, channels) if tie else scale).astype(np.float32)
    return {
        "kernel": rng.integers(-127, 128, shape).astype(np.int8),
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

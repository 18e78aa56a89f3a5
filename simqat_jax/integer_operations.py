"""What an integer model is made of: grids, tensors and operations on stored codes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax import integer_arithmetic as integer
from simqat_jax.numerics import QuantParams, along_channel, rounded_product, true_divide


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the codes of a tensor lie: `real = (code - zero_point) * scale`.

    Attributes:
      scale: real units per code, exactly a float32.
      zero_point: the code of real zero.
      qmin: lowest code.
      qmax: highest code.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer type that holds every code: uint8 for 8 asymmetric bits."""
        sign = "i" if self.qmin < 0 else "u"
        return np.dtype(f"{sign}{1 if self.qmax < 256 and self.qmin >= -128 else 2}")

    @property
    def params(self) -> QuantParams:
        return QuantParams(jnp.float32(self.scale), jnp.int32(self.zero_point))

    # Inside the model codes are int8 (uint8 less 128), or int32 where they are wider.

    @property
    def offset(self) -> int:
        return 128 if self.dtype == np.uint8 else 0

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.dtype.itemsize == 1 else np.int32)

    @property
    def stored_zero(self) -> int:
        return self.zero_point - self.offset

    def stored(self, codes: Any) -> jax.Array:
        return (jnp.asarray(codes).astype(jnp.int32) - self.offset).astype(self.stored_dtype)

    def codes(self, stored: jax.Array) -> jax.Array:
        return (stored.astype(jnp.int32) + self.offset).astype(self.dtype)

    def centered(self, stored: jax.Array) -> jax.Array:
        return stored.astype(jnp.int32) - self.stored_zero

    def from_float(self, centered: jax.Array, bounds: Sequence[int] | None = None) -> jax.Array:
        """Clip whole float32 numbers, `code - zero_point`, and store them."""
        lo, hi = (self.qmin, self.qmax) if bounds is None else bounds
        clipped = jnp.clip(centered + np.float32(self.zero_point), lo, hi)
        return (clipped - np.float32(self.offset)).astype(self.stored_dtype)

    def quantize(self, x: jax.Array) -> jax.Array:
        """Map real values to codes."""
        rounded = jnp.round(true_divide(x.astype(jnp.float32), np.float32(self.scale)))
        rounded = jnp.where(jnp.isnan(rounded), 0.0, rounded)
        return self.codes(self.from_float(rounded))

    def dequantize(self, codes: jax.Array) -> jax.Array:
        """Map codes to real values, float32."""
        centered = (codes.astype(jnp.int32) - self.zero_point).astype(jnp.float32)
        return rounded_product(centered, np.float32(self.scale))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an integer model.

    Attributes:
      name: its quantizer's name where it is the first on a grid: "Conv_0/output".
      shape: its lengths; -k stands for k times the batch size.
      dtype: the float type of its real values (of another tensor: its type).
      grid: where its codes lie; None: it is no tensor on a grid.
      value: codes or values of a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: Grid | None
    value: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation of an integer model.

    Attributes:
      kind: what it computes, a key of `OPERATIONS`.
      path: where it stands in the Flax model: "Block_0/Conv_1".
      inputs: numbers of the tensors that it reads.
      outputs: numbers of the tensors that it makes.
      attributes: what it needs to know: strides, axes, clamp codes.
      arrays: its weights: int8, int32 and multipliers in float32.
      function: of kind "float" and "move": what computes it, on values and the batch size.
    """

    kind: str
    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    function: Callable[..., Sequence[jax.Array]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, and of the constants that `function` holds."""
        held = self.attributes.get("constant_bytes", 0)
        return held + sum(a.nbytes for a in self.arrays.values())


# Operations --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operation sees: its tensors' grids, its arrays as traced, the batch size."""

    op: Op
    inputs: Sequence[Tensor]
    output: Tensor
    arrays: Mapping[str, jax.Array]
    batch: Any

    @property
    def grid(self) -> Grid:
        assert self.output.grid is not None
        return self.output.grid

    def in_grid(self, position: int = 0) -> Grid:
        grid = self.inputs[position].grid
        assert grid is not None
        return grid

    def shape(self, dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(-d * self.batch if d < 0 else d for d in dims)

    def __getitem__(self, name: str) -> Any:
        return self.op.attributes[name]


def _requantize(c: Context, acc: jax.Array) -> jax.Array:
    scaled = jnp.round(acc.astype(jnp.float32) * _last(c.arrays["multiplier"], acc))
    return c.grid.from_float(scaled, c["clamp"])


def _last(v: jax.Array, x: jax.Array) -> jax.Array:
    return along_channel(v, x.ndim, -1)


def _padded(c: Context, x: jax.Array) -> jax.Array:
    zero = np.asarray(c.in_grid().stored_zero, x.dtype)
    if c["pad_mode"] != "constant":
        pads = [(0, 0), *map(tuple, c["padding"]), (0, 0)]
        return jnp.pad(x, pads, mode=c["pad_mode"])
    steps = [d - 1 for d in c["input_dilation"]]
    inner = [(lo, hi, s) for (lo, hi), s in zip(c["padding"], steps, strict=True)]
    return lax.pad(x, zero, [(0, 0, 0), *inner, (0, 0, 0)])


def _conv(c: Context, x: jax.Array) -> jax.Array:
    spatial = "DHW"[-len(c["strides"]) :]
    kernel = c.arrays["kernel"]
    acc = lax.conv_general_dilated(
        _padded(c, x),
        kernel.astype(x.dtype),
        c["strides"],
        "VALID",
        rhs_dilation=c["kernel_dilation"],
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=c["groups"],
        preferred_element_type=jnp.int32,
    )
    axes = tuple(range(kernel.ndim - 1))
    return _requantize(c, acc + _last(_offset_bias(c, axes), acc))


def _offset_bias(c: Context, axes: tuple[int, ...]) -> jax.Array:
    """The bias for codes as they are stored: less zero point times the kernel's sums."""
    sums = jnp.sum(c.arrays["kernel"].astype(jnp.int32), axis=axes)
    return c.arrays["bias"] - c.in_grid().stored_zero * sums


def _dense(c: Context, x: jax.Array) -> jax.Array:
    kernel = c.arrays["kernel"].astype(x.dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    acc = lax.dot_general(x, kernel, dims, preferred_element_type=jnp.int32)
    return _requantize(c, acc + _last(_offset_bias(c, (0,)), acc))


def _affine(c: Context, x: jax.Array) -> jax.Array:
    kernel, bias = (_last(c.arrays[name].astype(jnp.int32), x) for name in ("kernel", "bias"))
    return _requantize(c, c.in_grid().centered(x) * kernel + bias)


def _add(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    ma, mb, shift = c["multipliers"]
    total = c.in_grid(0).centered(a) * ma + c.in_grid(1).centered(b) * mb + (1 << (shift - 1))
    return c.grid.from_float((total >> shift).astype(jnp.float32), c["clamp"])


def _add_onnx(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    codes = integer.add_onnxruntime(
        *(grid.centered(v) + grid.zero_point for grid, v in ((c.in_grid(0), a), (c.in_grid(1), b))),
        *(np.float32(v) for v in c["multipliers"]),
    )
    return c.grid.from_float(codes - np.float32(c.grid.zero_point), c["clamp"])


def _sub_onnx(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    x, y = c.in_grid(0), c.in_grid(1)
    codes = integer.subtract_onnxruntime(
        x.centered(a), y.centered(b), x.params, y.params, c.grid.params
    )
    return c.grid.from_float(codes - np.float32(c.grid.zero_point), c["clamp"])


def _mul(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    return _requantize(c, c.in_grid(0).centered(a) * c.in_grid(1).centered(b))


def _mul_onnx(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    product = c.in_grid(0).centered(a) * c.in_grid(1).centered(b)
    codes = integer.multiply_onnxruntime(product, c.arrays["multiplier"], c.grid.zero_point)
    return c.grid.from_float(codes - np.float32(c.grid.zero_point), c["clamp"])


def _sum(c: Context, x: jax.Array) -> jax.Array:
    return _requantize(c, jnp.sum(c.in_grid().centered(x), axis=tuple(c["axes"])))


def _sum_pool(c: Context, x: jax.Array) -> jax.Array:
    return _requantize(c, _windows(c, c.in_grid().centered(x), 0, lax.add))


def _windows(c: Context, x: jax.Array, start: int, combine: Any) -> jax.Array:
    pads = [tuple(p) for p in c["padding"]]
    first = np.asarray(start, x.dtype)
    return lax.reduce_window(x, first, combine, c["window"], c["strides"], pads)


def _max_pool(c: Context, x: jax.Array) -> jax.Array:
    return _windows(c, x, jnp.iinfo(x.dtype).min, lax.max)


def _table(c: Context, x: jax.Array) -> jax.Array:
    index = c.in_grid().codes(x).astype(jnp.int32) - c.in_grid().qmin
    return c.grid.stored(jnp.take(c.arrays["table"], index))


def _clip(c: Context, x: jax.Array) -> jax.Array:
    lo, hi = (v - c.grid.offset for v in c["clamp"])
    return jnp.clip(x, np.asarray(lo, x.dtype), np.asarray(hi, x.dtype))


def _concat(c: Context, *xs: jax.Array) -> jax.Array:
    return lax.concatenate(xs, c["axis"])


def _slice(c: Context, x: jax.Array) -> jax.Array:
    return lax.slice(x, c["start"], c.shape(c["limit"]), c["strides"])


def _pad(c: Context, x: jax.Array) -> jax.Array:
    zero = np.asarray(c.in_grid().stored_zero, x.dtype)
    return lax.pad(x, zero, [tuple(p) for p in c["padding"]])


def _move(c: Context, *xs: jax.Array) -> jax.Array:
    assert c.op.function is not None
    first = c.in_grid().centered(xs[0])
    (moved,) = c.op.function((first, *xs[1:]), c.batch)
    return (moved + c.grid.stored_zero).astype(c.grid.stored_dtype)


OPERATIONS: dict[str, Callable[..., jax.Array]] = {
    "conv": _conv,
    "dense": _dense,
    "affine": _affine,  # a BatchNorm of its own: one weight for each channel
    "add": _add,
    "add_onnx": _add_onnx,
    "sub_onnx": _sub_onnx,
    "mul": _mul,
    "mul_onnx": _mul_onnx,
    "sum": _sum,  # a mean, once its multiplier divides
    "sum_pool": _sum_pool,  # an average pooling
    "max_pool": _max_pool,
    "max": lambda c, x: jnp.max(x, axis=tuple(c["axes"])),
    "min": lambda c, x: jnp.min(x, axis=tuple(c["axes"])),
    "table": _table,
    "clip": _clip,
    "concat": _concat,
    "reshape": lambda c, x: jnp.reshape(x, c.shape(c.output.shape)),
    "transpose": lambda c, x: jnp.transpose(x, c["permutation"]),
    "broadcast": lambda c, x: lax.broadcast_in_dim(x, c.shape(c.output.shape), c["dimensions"]),
    "slice": _slice,
    "reverse": lambda c, x: lax.rev(x, c["axes"]),
    "take": lambda c, x: jnp.take(x, np.asarray(c["indices"]), axis=c["axis"]),
    "pad": _pad,
    "move": _move,
    # "quantize" and "float" read real values and are run by the model itself.
}

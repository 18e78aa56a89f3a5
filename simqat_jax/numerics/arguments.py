"""Check what users pass: each error names the argument, the value and the remedy.

Types are always checked, and values where they are at hand: under `jit` they are not. The functions
of this package that call each other do without.
"""

import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from simqat_jax.numerics.spec import QuantSpec

_LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""Smaller numbers are subnormal, which some backends take for zero."""


def shown(value: object) -> str:
    """Write a value so that it fits into a message."""
    if isinstance(value, jax.Array | np.ndarray) and value.ndim:
        return f"an array of shape {value.shape} and type {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    """Raise TypeError unless `value` is of a class; `remedy` says where one comes from."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {shown(value)}. {remedy}")


def check_spec(value: object) -> None:
    """Raise TypeError unless `value` is a QuantSpec."""
    check_kind("spec", value, QuantSpec, "Write QuantSpec(num_bits=8), for example.")


def check_code_range(value: Any) -> None:
    """Raise TypeError unless `value` has a lowest and a highest code."""
    ends = [getattr(value, name, None) for name in ("qmin", "qmax")]
    if not all(type(end) is int for end in ends):
        raise TypeError(
            f"spec must be a QuantSpec or a Grid, got {shown(value)}. Write QuantSpec(num_bits=8), "
            "for example."
        )


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")


def check_whole(name: str, value: Any, least: int, otherwise: str = "") -> None:
    """Raise TypeError unless `value` is a whole number, ValueError if it is below `least`."""
    text = f"{name} must be a whole number, {least} or more{otherwise}, got {shown(value)}."
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(text)
    if value < least:
        raise ValueError(text)


def check_seconds(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number or None, ValueError unless it is above 0."""
    text = f"{name} must be a number of seconds above 0, or None, got {shown(value)}."
    number = isinstance(value, int | float | np.integer | np.floating)
    if value is not None and (isinstance(value, bool) or not number):
        raise TypeError(text)
    if value is not None and not 0 < value <= threading.TIMEOUT_MAX:
        raise ValueError(text)


def check_axis(value: object) -> None:
    """Raise TypeError unless `value` is the number of an axis, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise TypeError(
            f"channel_axis must be the number of an axis, or None for one grid per tensor, got "
            f"{shown(value)}."
        )


def check_mapping(name: str, value: object, remedy: str) -> None:
    """Raise TypeError unless `value` is a dictionary or like one."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary, got {shown(value)}. {remedy}")


# Arrays ------------------------------------------------------------------------------------------


def check_real(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an array, a list or a number, and real."""
    _array(name, value, "real numbers", jnp.floating, jnp.integer, jnp.bool_)


def check_floats(name: str, value: object) -> None:
    """Raise TypeError unless `value` holds numbers of a floating-point type."""
    _array(name, value, "numbers of a floating-point type", jnp.floating)


def check_codes(name: str, value: object) -> None:
    """Raise TypeError unless `value` holds integers of an integer type."""
    _array(name, value, "codes, of an integer type", jnp.integer)


def check_scale(value: object) -> None:
    """Raise TypeError unless `value` holds real numbers, ValueError unless each is a scale."""
    scales = _values(_array("scale", value, "real numbers", jnp.floating, jnp.integer))
    if scales is None:
        return
    wrong = scales[~(np.isfinite(scales) & (scales >= _LEAST_SCALE))]
    if wrong.size:
        raise ValueError(
            f"scale must be finite and above 0, {_LEAST_SCALE:.3g} or more in float32, got "
            f"{wrong[0]:g}: it is how many real units a code stands for. quant_params makes one "
            "from a range."
        )


def check_code_ends(qmin: Any, qmax: Any) -> None:
    """Check the lowest and the highest code of a grid.

    Raises:
      TypeError: one that is no whole number.
      ValueError: they are not in order, or need more than 16 bits.
    """
    for name, value in (("qmin", qmin), ("qmax", qmax)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be a whole number, got {shown(value)}.")
    lowest, highest = -(2**15), (2**15 if int(qmin) < 0 else 2**16) - 1
    if not lowest <= qmin < qmax <= highest:
        raise ValueError(
            f"qmin must be below qmax, both of at most 16 bits, got qmin {shown(qmin)} and qmax "
            f"{shown(qmax)}. QuantSpec has both for a number of bits."
        )


def check_zero_point(value: object, qmin: int, qmax: int) -> None:
    """Raise TypeError unless `value` holds integers, ValueError unless each is a code."""
    codes = _array("zero_point", value, "codes, of an integer type", jnp.integer)
    if isinstance(codes, Tracer):
        return
    codes = np.asarray(codes)
    wrong = codes[(codes < qmin) | (codes > qmax)]
    if wrong.size:
        raise ValueError(
            f"zero_point must be a code, {qmin} to {qmax}, got {wrong[0]}. quant_params makes one "
            "from a range."
        )


def check_ends(lo: object, hi: object, *, finite: bool) -> None:
    """Check the ends of a range, or of several.

    Args:
      lo: the lowest values.
      hi: the highest values.
      finite: refuse NaN and Inf, but for what a range is that has seen nothing.

    Raises:
      TypeError: an end that is no array of real numbers.
      ValueError: a lowest value above the highest; NaN or Inf where they are refused.
    """
    kinds = jnp.floating, jnp.integer
    ends = [_array(n, v, "real numbers", *kinds) for n, v in (("lo", lo), ("hi", hi))]
    lows, highs = map(_values, ends)
    if lows is None or highs is None or lows.shape != highs.shape:
        return
    unseen = np.isneginf(highs) & (np.isposinf(lows) | (lows == 0))
    known = np.isfinite(lows) & np.isfinite(highs)
    if finite and not np.all(known | unseen):
        low, high = (end[~(known | unseen)][0] for end in (lows, highs))
        raise ValueError(
            f"lo and hi must be finite, got lo {low:g} and hi {high:g}. Leave NaN and Inf out of "
            "the values that the range is taken from, as observe does."
        )
    if np.any(crossed := known & (lows > highs)):
        raise ValueError(
            f"lo must not be above hi, got lo {lows[crossed][0]:g} and hi {highs[crossed][0]:g}. "
            "The lowest value comes first."
        )


def _array(name: str, value: Any, what: str, *kinds: type) -> jax.Array | np.ndarray | np.generic:
    """Return what `value` is as an array; raise TypeError if it is of none of the kinds."""
    array = value
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        try:
            array = np.asarray(value)
        except jax.errors.TracerArrayConversionError:  # a list of traced numbers
            array = jnp.asarray(value)
        except (TypeError, ValueError):  # lists of different lengths
            array = None
        if hasattr(value, "__jax_array__"):
            array = jnp.asarray(value)
    if array is None or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must hold {what}, got {shown(value)}.")
    return array


def _values(array: jax.Array | np.ndarray | np.generic) -> np.ndarray | None:
    """Return the values as float32, None while JAX traces."""
    if isinstance(array, Tracer):
        return None
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float32)

"""What a quantized module is called with: keys, methods and collections that Flax understands."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList, LazyRng

from simqat_jax.numerics.arguments import check_mapping, shown
from simqat_jax.training.ranges import OWN


def check_variables(variables: Any, remedy: str) -> None:
    """Raise TypeError unless it is a dictionary, and so is each collection of the float model."""
    check_mapping("variables", variables, remedy)
    for name, tree in variables.items():
        if name not in OWN and not isinstance(tree, Mapping):
            raise TypeError(
                "variables must hold collections such as 'params', each a dictionary, and "
                f"{name!r} is {shown(tree)}. Of a saved TrainState pass the model's alone: "
                "{'params': saved['params'], 'batch_stats': saved['batch_stats']}."
            )


def check_keys(rngs: Any, example: str) -> None:
    """Check that it is a random key, or a dictionary with a key for each random stream.

    Args:
      rngs: what was passed.
      example: a call as it should be.

    Raises:
      TypeError: it is none.
      ValueError: several keys in one array.
    """
    streams = rngs if isinstance(rngs, Mapping) else {"params": rngs}
    for name, key in streams.items():
        if _holds_keys(key) and key.shape:
            raise ValueError(
                f"rngs must be one key for each random stream, got {key.size} in an array of shape "
                f"{key.shape}. Pass one of them, or map over them with jax.vmap."
            )
        if not isinstance(name, str) or not (isinstance(key, LazyRng) or _is_key(key)):
            got = f"{shown(key)} for {shown(name)}" if isinstance(rngs, Mapping) else shown(key)
            raise TypeError(
                "rngs must be a random key, or a dictionary from the names of random streams to "
                f"keys, got {got}. Write {example}."
            )


def _holds_keys(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _is_key(value: Any) -> bool:
    """Whether it is one key, typed or (of jax.random.PRNGKey) as plain numbers."""
    if _holds_keys(value):
        return value.shape == ()
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    kind = getattr(value, "shape", None), getattr(value, "dtype", None)
    return kind == (raw.shape, raw.dtype)


def check_method(method: Any, module: nn.Module) -> None:
    """Check that it is one of a module's methods.

    Raises:
      TypeError: it is neither a name nor a function nor None.
      ValueError: the module has no method of this name.
    """
    text = (
        f"method must be one of {type(module).__name__}, by name or function, or None for its "
        f"__call__, got {shown(method)}."
    )
    if not (method is None or isinstance(method, str) or callable(method)):
        raise TypeError(text)
    if isinstance(method, str) and not callable(getattr(module, method, None)):
        raise ValueError(text)


def check_collections(mutable: Any) -> None:
    """Raise TypeError unless it names collections as Flax has it."""
    names = [mutable] if isinstance(mutable, str) else mutable
    if isinstance(names, bool | DenyList):
        return
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"mutable must be True, False or names of collections, got {shown(mutable)}. Write "
            "mutable=['batch_stats', 'quant_stats'] to train."
        )


def check_arrays(args: Any, kwargs: Any) -> None:
    """Raise TypeError for a description of an array in the place of one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            where = jax.tree_util.keystr(path[1:])
            raise TypeError(
                f"the call takes arrays, got {leaf} at {where}. Pass jnp.zeros of its shape, or "
                "describe the whole call: jax.eval_shape(qmodel.init, key, x)."
            )

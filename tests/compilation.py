"""How much XLA optimizes in tests."""

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def _disabled(value: bool) -> Iterator[None]:
    before = jax.config.read(_FLAG)
    try:
        jax.config.update(_FLAG, value)
        yield
    finally:
        jax.config.update(_FLAG, before)


def optimized() -> contextlib.AbstractContextManager[None]:
    """Compile as users do what is jitted here: with fusions and contractions, which change bits.

    What was compiled before stays as it is, whatever the flag was: jit a function of its own, or
    take the fixture `optimized`, which forgets all.
    """
    return _disabled(False)


def quickly() -> contextlib.AbstractContextManager[None]:
    """Compile what is jitted here quickly, in a module of `optimized` as well.

    For what prepares a test, such as the ranges of a model whose evaluation is compared.
    """
    return _disabled(True)
